"""Two runs, sample by sample: how far apart they are, how sure that is, and which answers flipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 10_000
INTERVAL = (2.5, 97.5)  # percentiles
SEED = 0


@dataclass(frozen=True)
class Difference:
    """Of one task.

    Attributes:
        samples: that both runs scored.
        mean: second minus first, in points of the mean score of a sample.
        low, high: 95 % interval of the paired bootstrap.
        gained, lost: ids of samples that became better, and worse.
    """

    samples: int
    mean: float
    low: float
    high: float
    gained: tuple[Any, ...]
    lost: tuple[Any, ...]

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def compare(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> Difference:
    """Two runs of one task over the same samples.

    Args:
        first: samples with `id`, `question`, `gold` and `score`, 0 to 1.
        second: samples of the same task.

    Raises:
        ValueError: no sample in common, or one id with two questions or golds: the sets differ.
    """
    before = {each["id"]: each for each in first if each["score"] is not None}
    after = {each["id"]: each for each in second if each["score"] is not None}
    common = sorted(before.keys() & after.keys())
    if not common:
        raise ValueError("the two runs have no scored sample in common")
    for number in common:
        if any(before[number][name] != after[number][name] for name in ("question", "gold")):
            raise ValueError(f"sample {number} is another question in the second run; the sets differ")
    changes_N = np.array([after[number]["score"] - before[number]["score"] for number in common])
    chosen = np.random.default_rng(SEED)
    # a mean at a time: all draws at once would take samples x draws
    means = np.array([changes_N[chosen.integers(0, len(common), len(common))].mean() for _ in range(DRAWS)])
    low, high = np.percentile(means, INTERVAL)
    gained = tuple(number for number, change in zip(common, changes_N, strict=True) if change > 0)
    lost = tuple(number for number, change in zip(common, changes_N, strict=True) if change < 0)
    return Difference(len(common), 100 * float(changes_N.mean()), 100 * float(low), 100 * float(high), gained, lost)

"""The numbers of a study: results of finished runs, their means and spreads over seeds, and its claims decided."""

import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..evaluate.synthetic import ALL
from .config import Claim, Study
from .plan import RESULT_FILE, Run

logger = logging.getLogger(__name__)

CONFIDENCE = 0.95
Verdict = Literal["holds", "does not hold", "not resolved by these seeds"]


@dataclass(frozen=True)
class Spread:
    """A number measured with several seeds."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the sample; None with a single seed."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    @property
    def low(self) -> float:
        return min(self.by_seed.values())

    @property
    def high(self) -> float:
        return max(self.by_seed.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "standard_deviation": self.deviation,
            "minimum": self.low,
            "maximum": self.high,
            "by_seed": {str(seed): value for seed, value in self.by_seed.items()},
        }


@dataclass(frozen=True)
class Difference:
    """Variant less reference, seed by seed, with the interval of a paired t test at `CONFIDENCE`."""

    spread: Spread
    low: float | None
    high: float | None

    def verdict(self, margin: float = 0.0) -> Verdict:
        """Whether the difference is above `-margin`, as far as the interval tells."""
        if self.low is None or self.high is None:
            return "not resolved by these seeds"
        if self.low > -margin:
            return "holds"
        return "does not hold" if self.high < -margin else "not resolved by these seeds"


@dataclass(frozen=True)
class VariantResults:
    """Finished runs of one variant by seed."""

    name: str
    label: str
    runs: dict[int, dict[str, Any]]

    def accuracy(self, key: str = ALL) -> Spread:
        """Exact match, as a share: `all`, a family, or `family/task`."""
        values = {seed: _accuracy(run["evaluation"], key) for seed, run in self.runs.items()}
        return Spread({seed: value for seed, value in values.items() if value is not None})

    def measured(self, *path: str) -> Spread:
        """A number of the result files, by its keys."""
        values = {}
        for seed, value in self.runs.items():
            for key in path:
                value = value[key]
            values[seed] = float(value)  # type: ignore[arg-type]  # the path leads to a number
        return Spread(values)


def collect(study: Study, runs: Sequence[Run]) -> dict[str, VariantResults]:
    """Results of the finished runs, in the study's order; variants without any are left out.

    Raises:
        ValueError: no run is finished.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        if run.is_finished:
            text = (run.folder / RESULT_FILE).read_text(encoding="utf-8")
            found.setdefault(run.variant, {})[run.seed] = json.loads(text)
    if not found:
        raise ValueError(f"no run of the study in {study.output_dir} is finished yet")
    results = {
        name: VariantResults(name, variant.label, found[name])
        for name, variant in study.variants.items()
        if name in found
    }
    _check_same_data(results.values())
    return results


def difference(variant: VariantResults, reference: VariantResults, key: str = ALL) -> Difference | None:
    """Paired over the seeds that both have; None where there is no such seed."""
    first, second = variant.accuracy(key).by_seed, reference.accuracy(key).by_seed
    common = [seed for seed in first if seed in second]
    if not common:
        return None
    spread = Spread({seed: first[seed] - second[seed] for seed in common})
    if len(common) < 2:
        return Difference(spread, None, None)
    if spread.deviation == 0:  # the t statistic is undefined: all seeds agree to the last answer
        return Difference(spread, spread.mean, spread.mean)
    from scipy.stats import ttest_rel

    test = ttest_rel([first[seed] for seed in common], [second[seed] for seed in common])
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(spread, float(interval.low), float(interval.high))


def decide(claim: Claim, results: dict[str, VariantResults], key: str = ALL) -> Difference | None:
    """The difference a claim is about; None where a variant has no result."""
    if claim.variant not in results or claim.reference not in results:
        return None
    return difference(results[claim.variant], results[claim.reference], key)


def task_names(results: dict[str, VariantResults]) -> list[str]:
    """Every `family/task` that was asked."""
    return sorted(
        {task for variant in results.values() for run in variant.runs.values() for task in run["evaluation"]["tasks"]}
    )


def majority(results: dict[str, VariantResults], key: str) -> float:
    """Exact match of the answer that is most frequent in training."""
    run = next(run for variant in results.values() for run in variant.runs.values())
    return float(run["evaluation"]["majority"][key]["accuracy"])


def _accuracy(evaluation: dict[str, Any], key: str) -> float | None:
    score = evaluation["overall"] if key == ALL else evaluation["tasks" if "/" in key else "families"].get(key)
    # from the counts: the accuracy beside them is rounded
    return score["correct"] / score["total"] if score and score["total"] else None


def _check_same_data(results: Iterable[VariantResults]) -> None:
    """Warn where variants of a seed learned from different answers or were asked different questions."""
    facts = {
        "answers to learn from (a length limit cuts them off)": lambda run: run["flops"]["labelled_tokens"],
        "images": lambda run: run["images"],
        "evaluation settings": lambda run: run["evaluation"]["settings"],
        "devices": lambda run: run["device"],
    }
    for what, get in facts.items():
        first: dict[int, tuple[str, Any]] = {}
        for variant in results:
            for seed, run in variant.runs.items():
                name, value = first.setdefault(seed, (variant.name, get(run)))
                if value != get(run):
                    logger.warning(
                        "%s and %s, seed %d, differ in their %s: %s and %s; their comparison is not fair",
                        name, variant.name, seed, what, value, get(run),
                    )  # fmt: skip

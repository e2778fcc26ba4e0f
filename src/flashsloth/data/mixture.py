"""Several sources mixed by weight, the same way for the same seed."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

# Every run of this many samples holds exactly each source's share, rounded to whole samples.
BLOCK = 10_000


class Order:
    """Which source gives the i-th sample of a mixture, and its how-many-eth sample that is.

    Args:
        weights: share of each source; they need not sum to one.

    Raises:
        ValueError: a share so small that a block of samples would hold none of it.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.names, self.seed = list(weights), seed
        shares = np.array(list(weights.values()), dtype=np.float64)
        exact = BLOCK * shares / shares.sum()
        counts = np.floor(exact).astype(np.int64)
        for index in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
            counts[index] += 1
        if not counts.all():
            name = self.names[int(np.argmin(counts))]
            raise ValueError(
                f"the weight of {name!r} is less than one sample in {BLOCK:,}; raise it or remove the source"
            )
        self.counts = counts
        self._block = lru_cache(maxsize=8)(self._make_block)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._block = lru_cache(maxsize=8)(self._make_block)

    def _make_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng((self.seed, number)).shuffle(sources)
        ordinals = np.empty(BLOCK, dtype=np.int64)
        for source, count in enumerate(self.counts):
            ordinals[sources == source] = number * count + np.arange(count)
        return sources, ordinals

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Number of the source, and which of its samples in the order they are drawn."""
        sources, ordinals = self._block(index // BLOCK)
        return int(sources[index % BLOCK]), int(ordinals[index % BLOCK])


class Passes:
    """Goes through a source with an index again and again, each time in another order."""

    def __init__(self, source: Any, seed: int) -> None:
        self.source, self.seed = source, seed
        self._pass: tuple[int, np.ndarray] | None = None

    def index(self, ordinal: int) -> int:
        """Index in the source of the ordinal-th sample drawn from it."""
        number, place = divmod(ordinal, len(self.source))
        if self.source.is_independent:
            return place
        if self._pass is None or self._pass[0] != number:
            self._pass = number, np.random.default_rng((self.seed, number)).permutation(len(self.source))
        return int(self._pass[1][place])


class MixedSamples(Dataset):
    """A mixture with an index. Sample i depends on the sources, the weights, the seed and i alone.

    Args:
        sources: data sets with an index, by name.
        weights: weight of each.
        size: samples in one epoch; the sources' sizes together when None. A source whose share is larger than it has
            samples gives them several times, one whose share is smaller gives a part of them.
    """

    def __init__(
        self, sources: Mapping[str, Any], weights: Mapping[str, float], seed: int, size: int | None = None
    ) -> None:
        self.order = Order(weights, seed)
        self.sources: Sequence[Any] = [sources[name] for name in weights]
        self.passes = [Passes(source, seed + number) for number, source in enumerate(self.sources)]
        self.size = sum(map(len, self.sources)) if size is None else size
        self.is_independent = all(source.is_independent for source in self.sources)

    @property
    def num_broken(self) -> int:
        """Different broken samples met so far, in all sources and worker processes."""
        return sum(source.num_broken for source in self.sources)

    def __len__(self) -> int:
        return self.size

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the source and index in it."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of a mixture of {self.size} samples")
        source, ordinal = self.order[index]
        return source, self.passes[source].index(ordinal)

    def __getitem__(self, index: int) -> Any:
        source, place = self.locate(int(index))
        return self.sources[source][place]

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Images and characters of every sample, in order; images are not read."""
        known = [list(source.sizes()) for source in self.sources]
        for index in range(self.size):
            source, place = self.locate(index)
            yield known[source][place]


class MixedStream(IterableDataset):
    """A mixture in which at least one source is streamed; it has no end. See `MixedSamples` for the arguments."""

    is_independent = False

    def __init__(self, sources: Mapping[str, Any], weights: Mapping[str, float], seed: int) -> None:
        self.order, self.seed = Order(weights, seed), seed
        self.sources: Sequence[Any] = [sources[name] for name in weights]

    @property
    def num_broken(self) -> int:
        """Different broken samples met so far, in all sources and worker processes."""
        return sum(source.num_broken for source in self.sources)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        streams = [iter(source) if isinstance(source, IterableDataset) else None for source in self.sources]
        passes = [
            Passes(source, self.seed + number) if stream is None else None
            for number, (source, stream) in enumerate(zip(self.sources, streams, strict=True))
        ]
        for index in itertools.count():
            number, ordinal = self.order[index]
            stream, indexed = streams[number], passes[number]
            if stream is not None:
                try:
                    yield next(stream)
                except StopIteration:
                    return  # a worker without shards has said so
            elif indexed is not None:
                yield indexed.source[indexed.index(first + step * ordinal)]

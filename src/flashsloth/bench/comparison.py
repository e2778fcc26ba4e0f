"""What result files say about models beside each other: groups, ratios, crossovers, losses. Pure functions of results.

Only what was measured by the same code on the same machine with the same dtype is compared. Seconds and bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .measured_tables import label
from .results import Machine, Measurement, Results, Roofline, Stage

# beyond this no crossover is looked for: longer than an answer about an image, and than the context of many models
LONGEST_ANSWER = 10_000


@dataclass(frozen=True)
class Variant:
    """A model and how it was run: one line of a plot.

    Attributes:
        title: for people; the other fields are those of `results.Settings` and `Measurement.under_load`.
    """

    model: str
    assembly: str
    attention: str
    compile: bool
    quantization: str | None
    kernels: str
    weights: str | None
    under_load: bool
    title: str = field(compare=False)

    @classmethod
    def of(cls, measurement: Measurement) -> Variant:
        s = measurement.settings
        return cls(
            s.model, s.assembly, s.attention, s.compile, s.quantization, s.kernels, s.weights,
            measurement.under_load,
            label(measurement),
        )  # fmt: skip

    @property
    def deviations(self) -> int:
        """How many of its settings are not the plain ones."""
        return sum((self.attention != "sdpa", self.compile, self.quantization is not None, self.weights is not None))


@dataclass(frozen=True, order=True)
class Condition:
    """What a model was asked to do, but for the length of its answer."""

    width: int
    height: int
    images: int
    batch: int
    text_tokens: int

    @classmethod
    def of(cls, measurement: Measurement) -> Condition:
        s = measurement.settings
        return cls(s.width, s.height, s.images, s.batch, s.text_tokens)

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def workload(self) -> Condition:
        """The same without the image's size."""
        return replace(self, width=0, height=0)

    def __str__(self) -> str:
        image = f"an image of {self.size}" if self.images == 1 else f"{self.images} images of {self.size}"
        return f"{image}, {self.text_tokens} text tokens, batch {self.batch}"


@dataclass(frozen=True)
class Case:
    """One model under one condition, at every length of answer that was measured.

    Attributes:
        by_length: measurements by output tokens, shortest first.
    """

    variant: Variant
    condition: Condition
    by_length: dict[int, Measurement]

    @property
    def longest(self) -> Measurement:
        """The measurement with the longest answer."""
        return self.by_length[max(self.by_length)]

    def stage(self, name: str) -> Stage | None:
        """Samples of a stage up to the first token from all lengths, since it does not depend on them."""
        samples = [value for m in self.by_length.values() if name in m.stages for value in m.stages[name].samples]
        return Stage(samples) if samples else None

    @property
    def per_token(self) -> float | None:
        """Seconds of a token after the first, from the longest answer that has any."""
        found = [m.median("decode_per_token") for _, m in sorted(self.by_length.items())]
        return next((value for value in reversed(found) if value is not None), None)

    def knots(self) -> list[tuple[int, float]]:
        """(output tokens, seconds of the whole answer) where measured; the first token is an answer of one."""
        found = {length: m.stages["total"].median for length, m in self.by_length.items() if "total" in m.stages}
        first = self.stage("time_to_first_token")
        if first is not None:
            found[1] = first.median
        return sorted(found.items())

    def total(self, tokens: float) -> float | None:
        """Seconds of an answer: measured, or on the line between two that were, or ms/token beyond the longest.

        Returns:
            None where the file lacks what it takes.
        """
        knots = self.knots()
        if not knots or tokens < knots[0][0]:
            return None
        for (left, low), (right, high) in zip(knots, knots[1:], strict=False):
            if left <= tokens <= right:
                return low + (high - low) * (tokens - left) / (right - left)
        last, seconds = knots[-1]
        if tokens == last:
            return seconds
        return None if self.per_token is None else seconds + (tokens - last) * self.per_token


@dataclass(frozen=True)
class Group:
    """What may be compared: measured by the same code on the same machine with the same dtype.

    Attributes:
        files: names of the files it came from.
        failures: one line for each thing that has no numbers.
        repeated: settings that several files have; the last file counts.
    """

    machine: Machine
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    commit: str | None
    files: list[str]
    rooflines: list[Roofline]
    measurements: list[Measurement]
    failures: list[str]
    repeated: list[str]

    @property
    def roofline(self) -> Roofline | None:
        """What the machine reached with this dtype, None where the file does not say."""
        key = (self.device, self.dtype, self.threads)
        return next((line for line in self.rooflines if (line.device, line.dtype, line.threads) == key), None)

    @property
    def title(self) -> str:
        machine = self.machine
        where = machine.gpu or f"{machine.cores} cores of {machine.cpu}"
        threads = "" if self.device == "cuda" else f", {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{where}, {self.dtype}{threads}"

    def cases(self) -> list[Case]:
        """All models under all conditions, in the order of the files."""
        found: dict[tuple[Variant, Condition], dict[int, Measurement]] = {}
        for measurement in self.measurements:
            key = Variant.of(measurement), Condition.of(measurement)
            found.setdefault(key, {})[measurement.settings.output_tokens] = measurement
        return [Case(*key, dict(sorted(lengths.items()))) for key, lengths in found.items()]


def groups_of(files: Mapping[str, Results]) -> list[Group]:
    """Results by machine, versions, commit, device, dtype and threads.

    Args:
        files: results by the name of their file.
    """
    found: dict[Any, Group] = {}
    for name, results in files.items():
        for measurement in results.measurements:
            s = measurement.settings
            code = (tuple(sorted(results.versions.items())), results.commit)
            machine = results.machine
            key = (*_hashable(machine), *code, s.device, s.dtype, s.threads)
            if key not in found:
                found[key] = Group(
                    machine, s.device, s.dtype, s.threads, results.versions, results.commit, [], [], [], [], []
                )
            _add(found[key], name, results, measurement)
    return list(found.values())


def _hashable(machine: Machine) -> tuple:
    return (*(value for name, value in vars(machine).items() if name != "cpu_flags"), tuple(machine.cpu_flags))


def _add(group: Group, name: str, results: Results, measurement: Measurement) -> None:
    if name not in group.files:
        group.files.append(name)
        group.rooflines.extend(results.rooflines)
    if measurement.error is not None:
        group.failures.append(f"{label(measurement)}, {Condition.of(measurement)}: {measurement.error}")
        return
    for index, known in enumerate(group.measurements):
        if known.settings == measurement.settings:
            group.measurements[index] = measurement
            group.repeated.append(
                f"{label(measurement)}, {Condition.of(measurement)}, {measurement.settings.output_tokens} output "
                f"tokens: {name} counts"
            )
            return
    group.measurements.append(measurement)


def baseline_of(cases: Iterable[Case], model: str) -> Variant | None:
    """The plainest variant of a model as shipped that was measured on a quiet machine; None without one."""
    own = [
        case.variant
        for case in cases
        if (case.variant.model, case.variant.assembly) == (model, "own") and not case.variant.under_load
    ]
    # packed layers are how a model is shipped, where they were measured
    return min(own, key=lambda variant: (variant.deviations, variant.kernels == "torch"), default=None)


def is_rival(variant: Variant, baseline: Variant) -> bool:
    """Whether losing to it counts: not the same model under other options, and not measured under load."""
    same = (variant.model, variant.assembly) == (baseline.model, baseline.assembly)
    return not same and not variant.under_load


def spread(samples: Iterable[float]) -> float:
    """From the lowest to the highest sample, as a share of the median."""
    values = list(samples)
    return (max(values) - min(values)) / statistics.median(values)


@dataclass(frozen=True)
class Pair:
    """A quantity of a model and of the baseline under the same settings.

    Attributes:
        metric: key of `TIMES` or `SIZES`, or "total".
        output_tokens: of both, None where the quantity does not depend on it.
        value, base: seconds, bytes or tokens.
        overlaps: whether the samples of the two overlap, None where there is one number each.
    """

    metric: str
    output_tokens: int | None
    value: float
    base: float
    overlaps: bool | None = None

    @property
    def ratio(self) -> float:
        return self.value / self.base

    @property
    def lost(self) -> bool:
        """Whether the baseline has more of it."""
        return self.value < self.base


# in the order in which they are told
TIMES = {
    "time_to_first_token": "first token",
    "encode": "encode",
    "compress": "compress",
    "prefill": "prefill",
}
SIZES = {
    "peak_memory_bytes": "peak memory",
    "parameter_bytes": "weights",
    "cache_bytes": "KV cache",
    "visual_tokens": "visual tokens",
}
METRICS = {**TIMES, "decode_per_token": "time a token", "total": "total", **SIZES}


def pairs(case: Case, base: Case) -> list[Pair]:
    """Everything that both have, under the same condition; sizes and time a token at their longest common answer.

    Raises:
        ValueError: the conditions differ.
    """
    if case.condition != base.condition:
        raise ValueError(f"{case.condition} and {base.condition} are not to be compared")
    found: list[Pair | None] = [_timed(name, None, case.stage(name), base.stage(name)) for name in TIMES]
    common = sorted(set(case.by_length) & set(base.by_length))
    for length in reversed(common):
        stage, other = (c.by_length[length].stages.get("decode_per_token") for c in (case, base))
        if stage is not None and other is not None:
            found.append(_timed("decode_per_token", length, stage, other))
            break
    for length in common:
        stage, other = (c.by_length[length].stages.get("total") for c in (case, base))
        if length > 1:  # an answer of one token is the first token
            found.append(_timed("total", length, stage, other))
    if common:
        mine, theirs = case.by_length[common[-1]], base.by_length[common[-1]]
        for name in SIZES:
            value, against = getattr(mine, name), getattr(theirs, name)
            if value is not None and against:
                depends = name in ("peak_memory_bytes", "cache_bytes")
                found.append(Pair(name, common[-1] if depends else None, value, against))
    return [pair for pair in found if pair is not None]


def _timed(metric: str, length: int | None, stage: Stage | None, base: Stage | None) -> Pair | None:
    if stage is None or base is None or not base.median:
        return None
    overlaps = min(stage.samples) <= max(base.samples) and min(base.samples) <= max(stage.samples)
    return Pair(metric, length, stage.median, base.median, overlaps)


@dataclass(frozen=True)
class Crossover:
    """A length of answer at which two models take the same time.

    Attributes:
        tokens: of the answer, the first included; between two whole numbers.
        seconds: both take.
        baseline_slower_after: longer answers are slower with the baseline.
        measured: within the lengths measured for both; otherwise found by ms/token.
    """

    tokens: float
    seconds: float
    baseline_slower_after: bool
    measured: bool


def crossovers(case: Case, base: Case, longest: int = LONGEST_ANSWER) -> list[Crossover]:
    """Where the total times of two models cross, shortest answer first.

    Both are lines from one measured length to the next and go on with ms/token, see `Case.total`.

    Args:
        longest: output tokens up to which to look.
    """
    ends = [knots[-1][0] for c in (case, base) if (knots := c.knots())]
    if len(ends) < 2:
        return []
    lengths = sorted({length for c in (case, base) for length, _ in c.knots() if length <= longest} | {longest})
    found: list[Crossover] = []
    earlier: tuple[int, float] | None = None
    for length in lengths:
        mine, theirs = case.total(length), base.total(length)
        if mine is None or theirs is None:
            continue
        gap = mine - theirs
        if gap == 0:
            continue  # touching is not crossing
        if earlier is not None and (gap < 0) != (earlier[1] < 0):
            start, before = earlier
            tokens = _zero(start, before, length, gap, case, base, lengths)
            found.append(Crossover(tokens, base.total(tokens) or 0.0, gap < 0, tokens <= min(ends)))
        earlier = length, gap
    return found


def _zero(start: int, before: float, end: int, after: float, case: Case, base: Case, lengths: list[int]) -> float:
    """Where the gap is zero between two lengths; a length between them at which it is exactly zero is it."""
    for length in lengths:
        if start < length < end and case.total(length) == base.total(length):
            return float(length)
    return start + (end - start) * before / (before - after)

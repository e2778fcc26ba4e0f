"""What result files say about models beside each other: groups, ratios, crossovers, losses. Pure functions of results.

Only what was measured by the same code on the same machine with the same dtype is compared. Seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .results import Machine, Measurement, Results, Roofline, Stage
from .tables import label

# beyond this no crossover is looked for: longer than an answer about an image, and than the context of many models
LONGEST_ANSWER = 10_000

# what is compared, in the order in which it is told
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
            measurement.under_load, label(measurement),
        )  # fmt: skip

    @property
    def deviations(self) -> int:
        """How many of its settings are not the plain ones."""
        return sum((self.attention != "sdpa", self.compile, self.quantization is not None, self.weights is not None))

    def is_rival_of(self, baseline: Variant) -> bool:
        """Whether losing to it counts: not the same model under other options, and not measured under load."""
        return (self.model, self.assembly) != (baseline.model, baseline.assembly) and not self.under_load


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
    def pixels(self) -> int:
        """Of one image."""
        return self.width * self.height

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

    def median(self, name: str) -> float | None:
        """Median seconds of that stage."""
        stage = self.stage(name)
        return None if stage is None else stage.median

    @property
    def per_token(self) -> float | None:
        """Seconds of a token after the first, from the longest answer that has any."""
        found = [m.median("decode_per_token") for _, m in sorted(self.by_length.items(), reverse=True)]
        return next((value for value in found if value is not None), None)

    def knots(self) -> list[tuple[int, float]]:
        """(output tokens, seconds of the whole answer) where measured; the first token is an answer of one."""
        found = {length: m.stages["total"].median for length, m in self.by_length.items() if "total" in m.stages}
        first = self.median("time_to_first_token")
        return sorted((found if first is None else {**found, 1: first}).items())

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
        failures: what has no numbers, and why.
        repeated: settings that several files have, and the file that counts, which is the last.
    """

    machine: Machine
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    commit: str | None
    files: list[str] = field(default_factory=list)
    rooflines: list[Roofline] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    repeated: list[tuple[str, str]] = field(default_factory=list)

    @property
    def roofline(self) -> Roofline | None:
        """What the machine reached with this dtype, None where the file does not say."""
        key = (self.device, self.dtype, self.threads)
        return next((line for line in self.rooflines if (line.device, line.dtype, line.threads) == key), None)

    @property
    def title(self) -> str:
        where = self.machine.gpu or f"{self.machine.cores} cores of {self.machine.cpu}"
        threads = "" if self.device == "cuda" else f", {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{where}, {self.dtype}{threads}"

    def cases(self) -> list[Case]:
        """All models under all conditions, in the order of the files."""
        found: dict[tuple[Variant, Condition], dict[int, Measurement]] = {}
        for measurement in self.measurements:
            key = Variant.of(measurement), Condition.of(measurement)
            found.setdefault(key, {})[measurement.settings.output_tokens] = measurement
        return [Case(*key, dict(sorted(lengths.items()))) for key, lengths in found.items()]

    def add(self, name: str, results: Results, measurement: Measurement) -> None:
        """Takes a measurement of a file of that name."""
        if name not in self.files:
            self.files.append(name)
            self.rooflines.extend(results.rooflines)
        what = f"{label(measurement)}, {Condition.of(measurement)}"
        if measurement.error is not None:
            self.failures.append((what, measurement.error))
            return
        known = [other.settings for other in self.measurements]
        if measurement.settings in known:
            self.measurements[known.index(measurement.settings)] = measurement
            self.repeated.append((f"{what}, {measurement.settings.output_tokens} output tokens", f"{name} counts"))
        else:
            self.measurements.append(measurement)


def groups_of(files: Mapping[str, Results]) -> list[Group]:
    """Results by machine, versions, commit, device, dtype and threads.

    Args:
        files: results by the name of their file.
    """
    found: dict[str, Group] = {}
    for name, results in files.items():
        versions = dict(sorted(results.versions.items()))
        for measurement in results.measurements:
            s = measurement.settings
            empty = Group(results.machine, s.device, s.dtype, s.threads, versions, results.commit)
            found.setdefault(repr(empty), empty).add(name, results, measurement)
    return list(found.values())


def baseline_of(cases: Iterable[Case], model: str) -> Variant | None:
    """The plainest variant of a model as shipped that was measured on a quiet machine; None without one."""
    own = [
        case.variant
        for case in cases
        if (case.variant.model, case.variant.assembly) == (model, "own") and not case.variant.under_load
    ]
    # packed layers are how a model is shipped, where they were measured
    return min(own, key=lambda variant: (variant.deviations, variant.kernels == "torch"), default=None)


def rivals_of(cases: Sequence[Case], baseline: Variant | None) -> list[tuple[Case, Case]]:
    """Every case of a rival, and that of the baseline under the same condition."""
    bases = {case.condition: case for case in cases if case.variant == baseline}
    return [
        (case, base)
        for case in cases
        if (base := bases.get(case.condition)) is not None and case.variant.is_rival_of(base.variant)
    ]


@dataclass(frozen=True)
class Pair:
    """A quantity of a model and of the baseline under the same settings.

    Attributes:
        metric: key of `METRICS`.
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


def pairs(case: Case, base: Case) -> list[Pair]:
    """Everything that both have, under the same condition; sizes and time a token at their longest common answer.

    Raises:
        ValueError: the conditions differ.
    """
    if case.condition != base.condition:
        raise ValueError(f"{case.condition} and {base.condition} are not to be compared")
    found: list[Pair] = []

    def add(metric: str, length: int | None, stage: Stage | None, other: Stage | None) -> None:
        if stage is not None and other is not None and other.median:
            overlaps = min(stage.samples) <= max(other.samples) and min(other.samples) <= max(stage.samples)
            found.append(Pair(metric, length, stage.median, other.median, overlaps))

    for name in TIMES:
        add(name, None, case.stage(name), base.stage(name))
    common = [
        (length, case.by_length[length], base.by_length[length])
        for length in sorted(set(case.by_length) & set(base.by_length))
    ]
    decoded = [both for both in common if all("decode_per_token" in m.stages for m in both[1:])]
    for length, mine, theirs in decoded[-1:]:
        add("decode_per_token", length, mine.stages["decode_per_token"], theirs.stages["decode_per_token"])
    for length, mine, theirs in common:
        if length > 1:  # an answer of one token is the first token
            add("total", length, mine.stages.get("total"), theirs.stages.get("total"))
    for length, mine, theirs in common[-1:]:
        for name in SIZES:
            value, against = getattr(mine, name), getattr(theirs, name)
            if value is not None and against:
                depends = name in ("peak_memory_bytes", "cache_bytes")
                found.append(Pair(name, length if depends else None, value, against))
    return found


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
    found: list[Crossover] = []
    earlier: tuple[int, float] | None = None
    touched: float | None = None
    for length in sorted({length for c in (case, base) for length, _ in c.knots() if length <= longest} | {longest}):
        mine, theirs = case.total(length), base.total(length)
        if mine is None or theirs is None:
            continue
        gap = mine - theirs
        if gap == 0:  # touching is not crossing
            touched = float(length) if touched is None else touched
            continue
        if earlier is not None and (gap < 0) != (earlier[1] < 0):
            start, before = earlier
            tokens = start + (length - start) * before / (before - gap) if touched is None else touched
            found.append(Crossover(tokens, base.total(tokens) or 0.0, gap < 0, tokens <= min(ends)))
        earlier, touched = (length, gap), None
    return found


@dataclass(frozen=True)
class Loss:
    """What a rival has less of than the baseline, under one condition."""

    rival: Variant
    condition: Condition
    pairs: list[Pair]
    crossovers: list[Crossover]


def losses(cases: Sequence[Case], baseline: Variant) -> list[Loss]:
    """Every condition and metric at which a rival is faster or smaller, rival by rival, in the order of the cases.

    A crossover counts where longer answers are slower with the baseline.
    """
    found = []
    for case, base in rivals_of(cases, baseline):
        lost = [pair for pair in pairs(case, base) if pair.lost]
        crossed = [crossing for crossing in crossovers(case, base) if crossing.baseline_slower_after]
        if lost or crossed:
            found.append(Loss(case.variant, case.condition, lost, crossed))
    return found

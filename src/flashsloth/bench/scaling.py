"""How time and memory grow with images, prompts and length: slopes of what was measured and of what was counted."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .comparison import Variant
from .results import Measurement, Settings

# axis of a plot -> how it is called; fields of Settings
AXES = {"images": "images a prompt", "batch": "prompts a batch", "output_tokens": "output tokens"}
# what is looked at along each: stages, or fields of Measurement
METRICS_OF = {
    "images": ("time_to_first_token", "peak_memory_bytes"),
    "batch": ("time_to_first_token", "decode_per_token", "peak_memory_bytes"),
    "output_tokens": ("total", "peak_memory_bytes"),
}
_WORK = ("width", "height", "images", "batch", "text_tokens", "output_tokens")


@dataclass(frozen=True)
class Series:
    """One model along one axis, everything else equal.

    Attributes:
        axis: key of `AXES`.
        metric: stage or field of `Measurement`.
        fixed: the other settings, for people.
        values: along the axis, rising.
        measured: seconds or bytes at each.
        expected: by the static tier, in the unit of `measured` or proportional to it; None where it cannot say.
    """

    variant: Variant
    axis: str
    metric: str
    fixed: str
    values: list[int]
    measured: list[float]
    expected: list[float] | None

    @property
    def slope(self) -> float:
        return log_log_slope(self.values, self.measured)

    @property
    def expected_slope(self) -> float | None:
        return None if self.expected is None else log_log_slope(self.values, self.expected)


def log_log_slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Exponent of the power of x that fits y best (least squares of the logarithms): 1.0 means proportional.

    Raises:
        ValueError: fewer than two different x, or a number that is not positive.
    """
    if len(set(xs)) < 2:
        raise ValueError(f"a slope needs two different values, not {list(xs)}")
    if min(*xs, *ys) <= 0:
        raise ValueError("a slope on logarithmic axes needs positive numbers")
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


Expected = Callable[[Settings, str], float | None]


def scaling(measurements: Sequence[Measurement], expected: Expected) -> tuple[list[Series], int]:
    """Series along every axis of which there is more than one value.

    Along an axis all models are shown at the same other settings: those at which most models have most values.

    Args:
        measurements: of one group.
        expected: from settings and metric to what the static tier expects, None where it cannot say.

    Returns:
        the series, and how many at other settings were left out.
    """
    found, left_out = [], 0
    for axis, metrics in METRICS_OF.items():
        families: dict[tuple, dict[Variant, list[Measurement]]] = {}
        for measurement in measurements:
            families.setdefault(_others(measurement.settings, axis), {}).setdefault(
                Variant.of(measurement), []
            ).append(measurement)
        sizes = Counter({others: _filled(lines.values(), metrics) for others, lines in families.items()})
        for rank, (others, points) in enumerate(sizes.most_common()):
            if not points:
                continue
            lines = {variant: members for variant, members in families[others].items() if len(members) > 1}
            if rank:
                left_out += len(lines)
                continue
            for metric in metrics:
                series = (_series(variant, axis, metric, members, expected) for variant, members in lines.items())
                found += [one for one in series if one is not None]
    return found, left_out


def _filled(lines: Iterable[Sequence[Measurement]], metrics: Sequence[str]) -> int:
    """How many numbers there are to draw."""
    return sum(
        value_of(m, metric) is not None for members in lines if len(members) > 1 for m in members for metric in metrics
    )


def _others(settings: Settings, axis: str) -> tuple[int, ...]:
    return tuple(getattr(settings, name) for name in _WORK if name != axis)


def value_of(measurement: Measurement, metric: str) -> float | None:
    """Median seconds of a stage, or a field of the measurement."""
    return getattr(measurement, metric) if metric.endswith("_bytes") else measurement.median(metric)


def _series(
    variant: Variant, axis: str, metric: str, members: Sequence[Measurement], expected: Expected
) -> Series | None:
    points = [
        (getattr(m.settings, axis), value, expected(m.settings, metric))
        for m in members
        if (value := value_of(m, metric))  # neither missing nor zero
    ]
    points.sort(key=lambda point: point[0])
    if len(points) < 2:
        return None
    values, measured, counted = zip(*points, strict=True)
    known = None if any(not value for value in counted) else list(counted)
    return Series(variant, axis, metric, _fixed(members[0].settings, axis), list(values), list(measured), known)


def _fixed(settings: Settings, axis: str) -> str:
    parts = {
        "images": f"{settings.images} image{'s' * (settings.images > 1)} of {settings.width}x{settings.height}",
        "batch": f"batch {settings.batch}",
        "output_tokens": f"{settings.output_tokens} output token{'s' * (settings.output_tokens > 1)}",
    }
    parts[axis] = f"images of {settings.width}x{settings.height}" if axis == "images" else ""
    return ", ".join([*filter(None, parts.values()), f"{settings.text_tokens} text tokens"])

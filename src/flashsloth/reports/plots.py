"""The look of all plots, and how they are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.files import replace_file

try:
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and looks for a display
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise ImportError("plots need matplotlib; install it with: pip install 'flashsloth[bench]'") from error

WIDTH = 9.0  # inches of a plot across the page
SMALL = 8.5  # points of what is written into a plot
LEGEND_COLUMNS = 3


def figure_of(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def error_bars(middles: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> list[list[float]]:
    """Lengths below and above the middles; rounding must not make them negative."""
    below = [max(0.0, middle - low) for middle, low in zip(middles, lows, strict=True)]
    return [below, [max(0.0, high - middle) for middle, high in zip(middles, highs, strict=True)]]


def logarithmic(axis: Any, base: int = 10) -> None:
    """Make an x or y axis logarithmic, with plain numbers on it, also where it spans less than a power of ten."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=base)
    if base == 10:
        low, high = axis.get_view_interval()
        steps = (1.0, 2.0, 5.0) if high > 12 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
        axis.set_major_locator(LogLocator(subs=steps if high > 3 * low else [1 + 0.5 * step for step in range(18)]))
    axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def stacked_bars(axes: Any, names: Sequence[str], parts: Mapping[str, tuple[Sequence[float], str]]) -> list[float]:
    """Horizontal bars, the first on top.

    Args:
        parts: lengths and colour by the name of the part.

    Returns:
        where each bar ends.
    """
    ends = [0.0] * len(names)
    for part, (lengths, color) in parts.items():
        axes.barh(range(len(names)), lengths, left=ends, color=color, label=part, height=0.65)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.margins(y=0.6 / (len(names) + 1))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    return ends


def legend_below(figure: Figure, axes: Any, columns: int = LEGEND_COLUMNS, note: str | None = None) -> None:
    """What the axes hold, below the figure, under a note."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize="small",
        frameon=False, title=note, title_fontsize="small",
    )  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """The file appears whole; without date and version in it, so that the same numbers give the same bytes."""
    replace_file(path, lambda staging: figure.savefig(staging, format="png", dpi=130, metadata={"Software": None}))

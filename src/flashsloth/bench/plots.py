"""Plots of the measured tier. Every function draws what it is given and knows nothing of files of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashsloth.reports.plots import (
    LEGEND_COLUMNS,
    SMALL,
    WIDTH,
    error_bars,
    figure_of,
    legend_below,
    logarithmic,
    save,
    stacked_bars,
)
from flashsloth.reports.table import GIGA

from .comparison import TIMES, Case, Crossover, Variant
from .counted import Memory
from .scaling import AXES, Series

_STAGE_COLORS = {"encode": "#4c78a8", "compress": "#e45756", "prefill": "#9ecae9"}
_MARKERS = "osD^vP*Xph<>"
_COLORS = (
    "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan",
    "darkblue", "goldenrod", "darkgreen", "darkred", "indigo", "teal", "deeppink",
)  # fmt: skip
_BENDS = 40  # pieces of a curve


class Style:
    """Colour and marker of every variant, the same in all plots of a report.

    Args:
        variants: in the order of the legend.
        baseline: drawn in black and thicker, so that it is found at once; None without one.
    """

    def __init__(self, variants: Sequence[Variant], baseline: Variant | None) -> None:
        self.variants, self.baseline = list(variants), baseline
        rivals = [variant for variant in variants if variant != baseline]
        self._ranks = {variant: rank for rank, variant in enumerate(rivals)}

    def line(self, variant: Variant) -> dict[str, Any]:
        """Arguments of a line with markers; one measured under load is hollow."""
        hollow = {"markerfacecolor": "white"} if variant.under_load else {}
        if variant == self.baseline:
            return {"color": "black", "marker": "o", "linewidth": 2.2, "markersize": 6.5, "zorder": 3, **hollow}
        rank = self._ranks[variant]
        color, marker = _COLORS[rank % len(_COLORS)], _MARKERS[(1 + rank) % len(_MARKERS)]
        return {"color": color, "marker": marker, "linewidth": 1.4, "markersize": 5.5, "zorder": 2, **hollow}


def draw_stages(cases: Sequence[Case], title: str, path: Path) -> None:
    """Bars of the stages up to the first token; a whisker from the lowest to the highest sample of their sum.

    Args:
        cases: of one condition, each with a first token.
    """
    ordered = sorted(cases, key=_first)
    figure = figure_of(WIDTH, 1.5 + 0.42 * len(ordered))
    axes = figure.subplots()
    parts = {TIMES[s]: ([case.median(s) or 0.0 for case in ordered], color) for s, color in _STAGE_COLORS.items()}
    stacked_bars(axes, [case.variant.title for case in ordered], parts)
    widest = max(max(_samples(case)) for case in ordered)
    for row, case in enumerate(ordered):
        ends = min(_samples(case)), max(_samples(case))
        axes.plot(ends, [row, row], color="black", linewidth=1.2, marker="|", markersize=7)
        first = _first(case)
        text = f"{first:.2f} s" if first >= 1 else f"{first * 1e3:.0f} ms"
        axes.text(ends[1] + 0.012 * widest, row, text, va="center", fontsize=SMALL)
    axes.set(xlim=(0, widest * 1.12), xlabel="seconds to the first token (preprocessing left out)")
    axes.set_title(title, fontsize="medium")
    legend_below(figure, axes)
    save(figure, path)


def draw_sizes(lines: Sequence[Sequence[Case]], style: Style, title: str, path: Path) -> None:
    """Time to the first token against the size of the image, one line a model.

    Args:
        lines: cases of one model each, at the sizes it was measured at.
    """
    figure, axes = _lines_plot(len(lines), title)
    ticks: dict[int, list[str]] = {}
    for cases in lines:
        ordered = sorted(cases, key=lambda case: case.condition.pixels)
        for case in ordered:
            sizes = ticks.setdefault(case.condition.pixels, [])
            if case.condition.size not in sizes:
                sizes.append(case.condition.size)
        medians = [_first(case) for case in ordered]
        lowest, highest = ([end(_samples(case)) for case in ordered] for end in (min, max))
        axes.errorbar(
            [case.condition.pixels for case in ordered], medians, yerr=error_bars(medians, lowest, highest), capsize=2,
            label=ordered[0].variant.title, **style.line(ordered[0].variant),
        )  # fmt: skip
    logarithmic(axes.xaxis, base=2)
    logarithmic(axes.yaxis)
    axes.set_xticks(list(ticks), ["\n".join(sizes) for sizes in ticks.values()], fontsize=SMALL)
    axes.set(xlabel="size of the image in pixels", ylabel="seconds to the first token")
    legend_below(figure, axes)
    save(figure, path)


def draw_totals(
    cases: Sequence[Case],
    crossings: Sequence[tuple[Case, Crossover]],
    longest: int,
    style: Style,
    title: str,
    path: Path,
) -> None:
    """Total time against output length: solid where measured, dashed beyond; crossovers are circled.

    Args:
        cases: of one condition.
        crossings: with the rival of each.
        longest: right end of the axis, in output tokens.
    """
    figure, axes = _lines_plot(len(cases), title)
    for case in cases:
        line, ends = style.line(case.variant), [length for length, _ in case.knots()]
        plain = {key: line[key] for key in ("color", "linewidth", "zorder")}
        axes.plot(*zip(*case.knots(), strict=True), label=case.variant.title, **line, linestyle="none")
        for start, end in zip(ends, [*ends[1:], longest], strict=True):
            if start < end and case.total(end) is not None:
                # a straight line is bent by logarithmic axes
                curve = [start * (end / start) ** (step / _BENDS) for step in range(_BENDS + 1)]
                dashes = (0, (4, 2)) if start == ends[-1] else "-"
                axes.plot(curve, [case.total(x) for x in curve], linestyle=dashes, **plain)
    for case, crossing in crossings:
        color, place = style.line(case.variant)["color"], (crossing.tokens, crossing.seconds)
        axes.plot(*place, marker="o", markersize=12, markerfacecolor="none", markeredgecolor=color, zorder=4)
        text = f"{math.ceil(crossing.tokens):,}"
        axes.annotate(text, place, (-9, 9), textcoords="offset points", ha="right", color=color, fontweight="bold")
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis)
    axes.set_xlim(0.9, longest * 1.1)
    axes.set(xlabel="output tokens, the first included", ylabel="seconds for the whole answer")
    marks = "marks: measured; solid: between them; dashed: the last total + ms/token a token more; rings: crossovers"
    legend_below(figure, axes, note=marks)
    save(figure, path)


def draw_tokens(cases: Sequence[Case], style: Style, title: str, path: Path) -> None:
    """Visual tokens against time to the first token; one model at several sizes is joined by a line."""
    lines = [[case for case in cases if case.variant == variant] for variant in style.variants]
    figure, axes = _lines_plot(len(lines), title)
    for own in filter(None, lines):
        own.sort(key=lambda case: case.condition.pixels)
        tokens, line = [case.longest.visual_tokens for case in own], style.line(own[0].variant)
        axes.plot(tokens, [_first(case) for case in own], label=own[0].variant.title, **{**line, "linewidth": 0.9})
    logarithmic(axes.xaxis, base=2)
    logarithmic(axes.yaxis)
    axes.set(xlabel="visual tokens of a prompt", ylabel="seconds to the first token")
    legend_below(figure, axes)
    save(figure, path)


def draw_memory(rows: Sequence[tuple[str, Memory | None, int | None]], title: str, path: Path) -> None:
    """Counted weights, KV cache and activations as bars, the measured peak as a diamond.

    Args:
        rows: name, counted bytes, measured bytes; None where not known.
    """
    figure = figure_of(WIDTH, 1.6 + 0.42 * len(rows))
    axes = figure.subplots()
    parts = {
        label: ([getattr(memory, part, 0) / GIGA for _, memory, _ in rows], color)
        for part, label, color in (
            ("weights", "weights", "#4c78a8"),
            ("cache", "KV cache", "#e45756"),
            ("activations", "activations (estimate)", "#f2b447"),
        )
    }
    ends = stacked_bars(axes, [name for name, _, _ in rows], parts)
    peaks = [math.nan if peak is None else peak / GIGA for _, _, peak in rows]
    axes.plot(peaks, range(len(rows)), "D", color="black", markerfacecolor="white", label="measured peak")
    widest = max(*ends, *(peak for peak in peaks if not math.isnan(peak)), 0.0)
    for row, (_, memory, peak) in enumerate(rows):
        counted = "not counted" if memory is None else f"{memory.total / GIGA:.2f}"
        text = f"{counted} / {'not measured' if peak is None else f'{peaks[row]:.2f}'}"
        end = ends[row] if peak is None else max(ends[row], peaks[row])
        axes.text(end + 0.02 * widest, row, text, va="center", fontsize=SMALL)
    axes.set(xlim=(0, widest * 1.2), xlabel="GB (behind the bars: counted / measured)")
    axes.set_title(title, fontsize="medium")
    legend_below(figure, axes, len(parts) + 1)
    save(figure, path)


_UNITS = {
    "time_to_first_token": (1.0, "seconds to the first token"),
    "decode_per_token": (1e3, "ms for one more token of all prompts"),
    "total": (1.0, "seconds for the whole answer"),
    "peak_memory_bytes": (1 / GIGA, "peak memory in GB"),
}


def draw_scaling(series: Sequence[Series], style: Style, path: Path) -> None:
    """A panel for each axis and metric: what was measured, and dashed the expected shape through the first point."""
    panels: dict[tuple[str, str], list[Series]] = {}
    for one in series:
        panels.setdefault((one.axis, one.metric), []).append(one)
    rows = math.ceil(len(panels) / LEGEND_COLUMNS)
    figure = figure_of(4.4 * LEGEND_COLUMNS, 3.6 * rows + 0.5 + 0.07 * len(series))
    grid = list(figure.subplots(rows, LEGEND_COLUMNS, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axes, ((axis, metric), members) in zip(grid, panels.items(), strict=False):
        scale, unit = _UNITS[metric]
        for one in members:
            line = style.line(one.variant)
            measured = [value * scale for value in one.measured]
            (handles[one.variant.title],) = axes.plot(one.values, measured, **line)
            if one.expected is not None:
                shape = [measured[0] * value / one.expected[0] for value in one.expected]
                axes.plot(one.values, shape, "--", linewidth=1.2, color=line["color"], alpha=0.8)
        logarithmic(axes.xaxis, base=2)
        logarithmic(axes.yaxis)
        axes.set_xticks(sorted({value for one in members for value in one.values}))
        axes.set(xlabel=AXES[axis], ylabel=unit)
        axes.set_title(members[0].fixed, fontsize="small")
        axes.grid(alpha=0.3, which="both")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    (handles["expected from counted operations and bytes"],) = grid[0].plot([], [], "--", color="gray")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize="small",
        frameon=False,
    )  # fmt: skip
    save(figure, path)


def _lines_plot(lines: int, title: str) -> tuple[Any, Any]:
    """A figure with so many lines in the legend below it, and its axes."""
    figure = figure_of(WIDTH, 4.9 + 0.17 * math.ceil(lines / LEGEND_COLUMNS))
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _first(case: Case) -> float:
    seconds = case.median("time_to_first_token")
    assert seconds is not None, "only cases with a first token are drawn"
    return seconds


def _samples(case: Case) -> list[float]:
    stage = case.stage("time_to_first_token")
    return [] if stage is None else stage.samples

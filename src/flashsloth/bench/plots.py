"""Plots of the measured tier. Every function draws what it is given and knows nothing of files of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashsloth.checkpoints.files import replace_file

from .comparison import TIMES, Case, Crossover, Variant
from .scaling import AXES, Series
from .tables import GIGA
from .tokens import Memory

try:
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and looks for a display
    from matplotlib.ticker import LogLocator, NullFormatter
except ImportError as error:
    raise ImportError("plots need matplotlib; install it with: pip install 'flashsloth[bench]'") from error

STAGES = tuple(name for name in TIMES if name != "time_to_first_token")
_MARKERS = "osD^vP*Xph<>"
# the baseline is black, so that it is found at once
_COLORS = (
    "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan",
    "darkblue", "goldenrod", "darkgreen", "darkred", "indigo", "teal", "deeppink",
)  # fmt: skip
_WIDTH = 9.0
_LABEL = 8.5
_FINE = tuple(1 + 0.5 * step for step in range(18))  # labels of a short logarithmic axis, in each power of ten
_BENDS = 40  # pieces of a curve
_COLUMNS = 3  # of a legend below a plot


class Style:
    """Colour and marker of every variant, the same in all plots of a report.

    Args:
        variants: in the order of the legend.
        baseline: drawn in black and thicker; None without one.
    """

    def __init__(self, variants: Sequence[Variant], baseline: Variant | None) -> None:
        self.variants, self.baseline = list(variants), baseline
        rivals = [variant for variant in variants if variant != baseline]
        self._ranks = {variant: rank for rank, variant in enumerate(rivals)}

    def color(self, variant: Variant) -> str:
        return "black" if variant == self.baseline else _COLORS[self._ranks[variant] % len(_COLORS)]

    def line(self, variant: Variant) -> dict[str, Any]:
        """Arguments of a line with markers; one measured under load is hollow."""
        is_base = variant == self.baseline
        marker = "o" if is_base else _MARKERS[(1 + self._ranks[variant]) % len(_MARKERS)]
        found = {
            "color": self.color(variant),
            "marker": marker,
            "linewidth": 2.2 if is_base else 1.4,
            "markersize": 6.5 if is_base else 5.5,
            "zorder": 3 if is_base else 2,
        }
        return {**found, "markerfacecolor": "white"} if variant.under_load else found


def draw_stages(cases: Sequence[Case], title: str, path: Path) -> None:
    """Bars of the stages up to the first token; a whisker from the lowest to the highest sample of their sum.

    Args:
        cases: of one condition, each with a first token.
    """
    ordered = sorted(cases, key=lambda case: _first(case))
    figure = Figure(figsize=(_WIDTH, 1.5 + 0.42 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    widest = max(max(_samples(case)) for case in ordered)
    lefts = [0.0] * len(ordered)
    for stage, color in zip(STAGES, ("#4c78a8", "#e45756", "#9ecae9"), strict=True):
        seconds = [0.0 if (found := case.stage(stage)) is None else found.median for case in ordered]
        axes.barh(range(len(ordered)), seconds, left=lefts, color=color, label=TIMES[stage], height=0.65)
        lefts = [left + more for left, more in zip(lefts, seconds, strict=True)]
    for row, case in enumerate(ordered):
        samples = _samples(case)
        axes.plot([min(samples), max(samples)], [row, row], color="black", linewidth=1.2, marker="|", markersize=7)
        axes.text(max(samples) + 0.012 * widest, row, f"{_seconds(_first(case))}", va="center", fontsize=_LABEL)
    axes.set(xlim=(0, widest * 1.12), xlabel="seconds to the first token (preprocessing left out)")
    _label_bars(figure, axes, [case.variant.title for case in ordered], title, len(STAGES))
    _save(figure, path)


def draw_sizes(lines: Sequence[Sequence[Case]], style: Style, title: str, path: Path) -> None:
    """Time to the first token against the size of the image, one line a model.

    Args:
        lines: cases of one model each, at the sizes it was measured at.
    """
    figure = _figure(len(lines))
    axes = figure.subplots()
    ticks: dict[int, str] = {}
    for cases in lines:
        ordered = sorted(cases, key=lambda case: case.condition.width * case.condition.height)
        pixels = [case.condition.width * case.condition.height for case in ordered]
        for count, case in zip(pixels, ordered, strict=True):
            known = ticks.setdefault(count, case.condition.size)
            if case.condition.size not in known:
                ticks[count] = f"{known}\n{case.condition.size}"
        medians = [_first(case) for case in ordered]
        below = [max(0.0, m - min(_samples(case))) for m, case in zip(medians, ordered, strict=True)]
        above = [max(0.0, max(_samples(case)) - m) for m, case in zip(medians, ordered, strict=True)]
        variant = ordered[0].variant
        axes.errorbar(pixels, medians, yerr=[below, above], capsize=2, label=variant.title, **style.line(variant))
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=_LABEL)
    axes.minorticks_off()
    _log_y(axes)
    axes.set(xlabel="size of the image in pixels", ylabel="seconds to the first token")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    _legend(figure, axes)
    _save(figure, path)


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
    figure = _figure(len(cases))
    axes = figure.subplots()
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
    axes.set_xscale("log")
    _log_y(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.15)
    texts = []
    for case, crossing in crossings:
        color = style.color(case.variant)
        axes.plot(
            crossing.tokens, crossing.seconds, marker="o", markersize=12, markerfacecolor="none",
            markeredgecolor=color, markeredgewidth=1.8, linestyle="none", zorder=4,
        )  # fmt: skip
        texts.append((crossing.tokens, crossing.seconds, f"{math.ceil(crossing.tokens):,} tokens", color))
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    axes.set_xlim(0.9, longest * 1.1)
    axes.set(xlabel="output tokens, the first included", ylabel="seconds for the whole answer")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    _legend(
        figure,
        axes,
        "marks: measured; solid: between them; dashed: the last total + ms/token a token more; rings: crossovers",
    )
    _place(figure, axes, texts, far=True)
    _save(figure, path)


def draw_tokens(cases: Sequence[Case], style: Style, title: str, path: Path) -> None:
    """Visual tokens against time to the first token; one model at several sizes is joined by a line."""
    lines = [[case for case in cases if case.variant == variant] for variant in style.variants]
    figure = Figure(figsize=(_WIDTH, 5.2 + 0.16 * max(0, len(lines) - 6)), layout="constrained")
    axes = figure.subplots()
    texts = []
    for own in filter(None, lines):
        own.sort(key=lambda case: case.condition.width * case.condition.height)
        points = [(float(case.longest.visual_tokens or 0), _first(case)) for case in own]
        line = style.line(own[0].variant)
        axes.plot(*zip(*points, strict=True), **{**line, "linewidth": 0.9, "markersize": line["markersize"] + 1})
        texts.append((*points[-1], own[0].variant.title, line["color"]))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    axes.margins(x=0.14, y=0.12)
    _log_y(axes)
    axes.set(xlabel="visual tokens of a prompt", ylabel="seconds to the first token")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    _place(figure, axes, texts)
    _save(figure, path)


def draw_memory(rows: Sequence[tuple[str, Memory | None, int | None]], title: str, path: Path) -> None:
    """Counted weights, KV cache and activations as bars, the measured peak as a diamond.

    Args:
        rows: name, counted bytes, measured bytes; None where not known.
    """
    figure = Figure(figsize=(_WIDTH, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    lefts = [0.0] * len(rows)
    parts: list[tuple[str, Callable[[Memory], int], str]] = [
        ("weights", lambda memory: memory.weights, "#4c78a8"),
        ("KV cache", lambda memory: memory.cache, "#e45756"),
        ("activations (estimate)", lambda memory: memory.activations, "#f2b447"),
    ]
    for label, part, color in parts:
        widths = [0.0 if memory is None else part(memory) / GIGA for _, memory, _ in rows]
        axes.barh(range(len(rows)), widths, left=lefts, color=color, label=label, height=0.65)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    known = [(row, peak / GIGA) for row, (_, _, peak) in enumerate(rows) if peak is not None]
    if known:
        heights, peaks = zip(*known, strict=True)
        axes.plot(peaks, heights, "D", color="black", markerfacecolor="white", markersize=7, label="measured peak")
    widest = max([*lefts, *(peak for _, peak in known)])
    ends = dict(known)
    for row, (_, memory, peak) in enumerate(rows):
        counted = "not counted" if memory is None else f"{memory.total / GIGA:.2f}"
        text = f"{counted} / {'not measured' if peak is None else f'{peak / GIGA:.2f}'}"
        axes.text(max(lefts[row], ends.get(row, 0.0)) + 0.02 * widest, row, text, va="center", fontsize=_LABEL)
    axes.set(xlim=(0, widest * 1.2), xlabel="GB (behind the bars: counted / measured)")
    _label_bars(figure, axes, [name for name, _, _ in rows], title, len(parts) + 1)
    _save(figure, path)


def draw_scaling(series: Sequence[Series], style: Style, path: Path) -> None:
    """A panel for each axis and metric: what was measured, and dashed the expected shape through the first point."""
    panels: dict[str, list[str]] = {}
    for one in series:
        metrics = panels.setdefault(one.axis, [])
        if one.metric not in metrics:
            metrics.append(one.metric)
    columns = max(map(len, panels.values()))
    size = (4.4 * columns, 3.6 * len(panels) + 0.3 + 0.2 * len({one.variant for one in series}) / columns)
    figure = Figure(figsize=size, layout="constrained")
    handles: dict[str, Any] = {}
    grid: Any = figure.subplots(len(panels), columns, squeeze=False)
    places = [(axis, metric, grid[row][k]) for row, axis in enumerate(panels) for k, metric in enumerate(panels[axis])]
    for row, metrics in enumerate(panels.values()):
        for axes in grid[row][len(metrics) :]:
            axes.set_visible(False)
    for axis, metric, axes in places:
        members = [one for one in series if (one.axis, one.metric) == (axis, metric)]
        scale, unit = _UNITS[metric]
        for one in members:
            line = style.line(one.variant)
            measured = [value * scale for value in one.measured]
            (handles[one.variant.title],) = axes.plot(one.values, measured, **line)
            if one.expected is not None:
                shape = [measured[0] * value / one.expected[0] for value in one.expected]
                axes.plot(one.values, shape, linestyle=(0, (3, 2)), linewidth=1.2, color=line["color"], alpha=0.8)
        axes.set_xscale("log", base=2)
        values = sorted({value for one in members for value in one.values})
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        _log_y(axes)
        axes.set(xlabel=AXES[axis], ylabel=unit)
        axes.set_title(members[0].fixed, fontsize="small")
        axes.grid(alpha=0.3, which="both")
    (handles["expected from counted operations and bytes"],) = places[0][2].plot([], [], "--", color="gray")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small", frameon=False
    )
    _save(figure, path)


_UNITS = {
    "time_to_first_token": (1.0, "seconds to the first token"),
    "decode_per_token": (1e3, "ms for one more token of all prompts"),
    "total": (1.0, "seconds for the whole answer"),
    "peak_memory_bytes": (1 / GIGA, "peak memory in GB"),
}


def _first(case: Case) -> float:
    stage = case.stage("time_to_first_token")
    assert stage is not None, "only cases with a first token are drawn"
    return stage.median


def _samples(case: Case) -> list[float]:
    stage = case.stage("time_to_first_token")
    return [] if stage is None else stage.samples


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _label_bars(figure: Figure, axes: Any, names: list[str], title: str, columns: int) -> None:
    """Names beside horizontal bars, the first on top, and a legend of so many columns below them."""
    axes.set_yticks(range(len(names)), names)
    axes.margins(y=0.6 / (len(names) + 1))
    axes.invert_yaxis()
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def _figure(lines: int) -> Figure:
    """A figure with so many lines in the legend below it."""
    return Figure(figsize=(_WIDTH, 4.9 + 0.17 * math.ceil(lines / _COLUMNS)), layout="constrained")


def _log_y(axes: Any) -> None:
    """A logarithmic axis with plain numbers on it, also where it spans less than a power of ten."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    span = high / low
    subs = (1.0, 2.0, 5.0) if span > 12 else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if span > 3 else _FINE
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:,.6g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Any, note: str | None = None) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=_COLUMNS, fontsize="small",
        frameon=False, title=note, title_fontsize="small",
    )  # fmt: skip


# where a text may stand beside its point, nearest first: offset in points and alignment
_OFFSETS = [
    (distance * x, distance * y, {1: "left", 0: "center", -1: "right"}[x])
    for distance in (9, 17, 27, 40, 55, 75, 100)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]


def _place(figure: Figure, axes: Any, texts: Sequence[tuple[float, float, str, str]], far: bool = False) -> None:
    """Writes texts beside points, away from each other, from all points and from the edges.

    Args:
        texts: x, y, text, colour.
        far: leave out the nearest places, for marks that are large.
    """
    figure.draw_without_rendering()  # positions are known only after the layout
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    dots = [axes.transData.transform((x, y)) for line in axes.get_lines() for x, y in line.get_xydata()]
    taken: list[Any] = []
    for x, y, text, color in texts:

        def write(right: int, up: int, side: str, more: dict | None = None, at=(x, y), text=text, color=color) -> Any:
            return axes.annotate(
                text, at, (right, up), textcoords="offset points", ha=side, va="center", color=color, zorder=5,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.75, "edgecolor": "none"},
                fontsize=_LABEL, fontweight="bold" if far else "normal", arrowprops=more,
            )  # fmt: skip

        found = []
        for rank, offset in enumerate(_OFFSETS[8 if far else 0 :]):
            note = write(*offset)
            box = note.get_window_extent()
            note.remove()
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            clashes = 20 * outside + 10 * sum(box.overlaps(other) for other in taken)
            clashes += sum(box.contains(*dot) for dot in dots)
            found.append((clashes, rank, offset, box))
            if not clashes:
                break
        _, _, (right, up, side), box = min(found, key=lambda place: place[:2])
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 4}
        write(right, up, side, leader if max(abs(right), abs(up)) > _OFFSETS[8][0] else None)
        taken.append(box)


def _save(figure: Figure, path: Path) -> None:
    """The file appears whole; without date and version in it, so that the same numbers give the same bytes."""
    replace_file(path, lambda staging: figure.savefig(staging, format="png", dpi=130, metadata={"Software": None}))

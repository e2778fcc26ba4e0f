"""Figures drawn by gnuplot, with the questions of those by matplotlib: how a model reads a program it never saw."""

from __future__ import annotations

import io
import math
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from .figure_facts import Figure, caption_of, choose_figure, written
from .figure_questions import Look, ask_about
from .figure_styles import choose_colours, ink_on
from .fonts import font_path
from .sample import Sample

SECONDS = 30  # after which a process is given up
FONTS = {"DejaVu Sans": "dejavu-sans", "Roboto": "roboto", "Lato": "lato", "Source Serif Pro": "source-serif"}
RATIOS = (0.75, 0.75, 0.8, 0.65, 1.0)  # height to width
# sequences of gnuplot, with the words of their colours; "" where people would not agree
SEQUENCES: dict[str, tuple[tuple[str, str], ...]] = {
    "default": (
        ("purple", "#9400d3"), ("green", "#009e73"), ("", "#56b4e9"), ("orange", "#e69f00"), ("yellow", "#f0e442"),
        ("blue", "#0072b2"), ("red", "#e51e10"), ("black", "#000000"),
    ),
    "classic": (
        ("red", "#ff0000"), ("green", "#00ff00"), ("blue", "#0000ff"), ("", "#ff00ff"), ("cyan", "#00ffff"),
        ("", "#ffff00"), ("black", "#000000"), ("", "#ff4500"),
    ),
}  # fmt: skip
CASES = (str.lower, str.lower, str.title, str.upper)


@lru_cache(maxsize=1)
def _font_folder() -> tempfile.TemporaryDirectory[str]:
    """Tells fontconfig where the fonts of installed Python packages are, so that no others are taken."""
    folder = tempfile.TemporaryDirectory(prefix="flashsloth-fonts-")
    places = dict.fromkeys(str(Path(font_path(face)).parent) for face in FONTS.values())
    lines = [*(f"<dir>{place}</dir>" for place in places), f"<cachedir>{folder.name}</cachedir>"]
    text = f"<?xml version='1.0'?><!DOCTYPE fontconfig SYSTEM 'fonts.dtd'><fontconfig>{''.join(lines)}</fontconfig>"
    Path(folder.name, "fonts.conf").write_text(text, encoding="utf-8")
    return folder


def run_gnuplot(script: str) -> Image.Image:
    """The picture that a script writes to its standard output."""
    program = shutil.which("gnuplot")
    if program is None:
        raise ValueError("gnuplot is not installed; on Debian: apt-get install gnuplot-nox")
    environment = {**os.environ, "FONTCONFIG_FILE": str(Path(_font_folder().name, "fonts.conf")), "LC_ALL": "C.UTF-8"}
    done = subprocess.run([program], input=script.encode(), capture_output=True, env=environment, timeout=SECONDS)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"gnuplot failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return Image.open(io.BytesIO(done.stdout)).convert("RGB")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'


@dataclass
class _Script:
    """Lines of a script, and plots that follow them."""

    figure: Figure
    rng: random.Random
    shades: Sequence[str]
    case: Callable[[str], str]

    def __post_init__(self) -> None:
        self.lines: list[str] = []
        self.plots: list[str] = []
        self.ticks: frozenset[float] = frozenset()  # values written at their axis
        self.width = self.rng.choice((0.8, 0.7, 0.6, 0.5))

    def data(self, rows: Iterable[Sequence[object]]) -> str:
        """Keeps rows under a name, which is returned."""
        name = f"$data{sum(line.startswith('$') for line in self.lines)}"
        body = [" ".join(map(str, row)) for row in rows]
        self.lines.append("\n".join([f"{name} << END", *body, "END"]))
        return name

    def name(self, row: int) -> str:
        """The entry of a series in the legend."""
        return f"title {_quoted(self.case(self.figure.names[row]))}" if self.figure.names else "notitle"

    def shade(self, row: int, column: int = 0) -> str:
        index = row if self.figure.names else column
        return self.shades[index % len(self.shades)]

    def categories(self, axis: str, turned: bool) -> None:
        places = ", ".join(f"{_quoted(self.case(label))} {at}" for at, label in enumerate(self.figure.labels))
        self.lines.append(f"set {axis}tics ({places}){' rotate by 45 right' if turned else ''}")
        if axis == "y":  # gnuplot leaves too little room between long names and the label of the axis
            longest = max(map(len, self.figure.labels))
            self.lines += [f"set lmargin {1.2 * longest + 6:g}", f"set ylabel offset {-0.2 * longest - 0.6:g},0"]
        self.lines.append(f"set {axis}range [-0.6:{len(self.figure.labels) - 0.4}]")

    def values(self, axis: str) -> None:
        """Range and ticks of the axis of values."""
        figure = self.figure
        most = max(figure.totals) if figure.kind == "stacked" else max(map(max, figure.values))
        room = {0: 1.15, 2: 1.4}.get(len(figure.names), 1.55)
        self.lines.append(f"set {axis}range [0:{most * room:g}]")
        if figure.step and figure.kind != "stacked":
            step = self.tick_step(axis, most * room)
            self.lines.append(f"set {axis}tics {step:g}")
            self.ticks = frozenset(step * unit for unit in range(int(most * room / step) + 1))

    def tick_step(self, axis: str, most: float) -> float:
        """The distance of the ticks of the values: their own, or twice as much where numbers would touch."""
        step = self.figure.step
        crowded = 8 if axis == "y" else 24 / len(written(most))
        while step and most / step > crowded:
            step *= 2
        return step

    def label(self, x: float, y: float, text: str, options: str) -> None:
        """A text anywhere."""
        self.lines.append(f"set label {_quoted(text)} at {x:g},{y:g} {options}")

    def note(self, rows: Iterable[Sequence[object]], offset: str) -> None:
        """Numbers at (x, y)."""
        self.plots.append(f"{self.data(rows)} using 1:2:3 with labels {offset} notitle")


def _bars(script: _Script) -> None:
    figure = script.figure
    rows = len(figure.values)
    width = script.width / rows if figure.kind == "grouped" else script.width
    script.lines += [f"set boxwidth {width:g}", "set style fill solid" + script.rng.choice(("", " border -1"))]
    order = range(rows)
    for row in reversed(order) if figure.kind == "stacked" else order:  # a shorter one hides the lower part
        shift = (row - (rows - 1) / 2) * width if figure.kind == "grouped" else 0.0
        for column, value in enumerate(figure.values[row]):
            low = sum(figure.values[below][column] for below in range(row)) if figure.kind == "stacked" else 0.0
            data = script.data([(column + shift, low + value)])
            title = script.name(row) if column == 0 else "notitle"
            script.plots.append(f'{data} using 1:2 with boxes lc rgb "{script.shade(row, column)}" {title}')
    for row, values in enumerate(figure.values if figure.printed else ()):
        shift = (row - (rows - 1) / 2) * width if figure.kind == "grouped" else 0.0
        if figure.kind == "stacked":
            bases = [sum(figure.values[below][column] for below in range(row)) for column in range(len(values))]
            for at, (base, value) in enumerate(zip(bases, values, strict=True)):
                ink = ink_on(script.shade(row, at))
                script.label(at, base + value / 2, written(value), f'center front tc rgb "{ink}"')
        else:
            script.note([(at + shift, value, written(value)) for at, value in enumerate(values)], "offset 0,0.6")


def _horizontal(script: _Script) -> None:
    figure, half = script.figure, script.width / 2
    script.lines.append("set style fill solid")
    for at, value in enumerate(figure.values[0]):
        data = script.data([(value / 2, at, 0, value, at - half, at + half)])
        script.plots.append(f'{data} using 1:2:3:4:5:6 with boxxyerror lc rgb "{script.shade(0, at)}" notitle')
    if figure.printed:
        script.note([(value, at, written(value)) for at, value in enumerate(figure.values[0])], "left offset 0.4,0")


def _lines(script: _Script) -> None:
    figure = script.figure
    for row, values in enumerate(figure.values):
        data, point = script.data(enumerate(values)), script.rng.choice((5, 7, 9, 13))
        style = f'with linespoints lw 1.5 pt {point} ps 0.8 lc rgb "{script.shade(row)}"'
        script.plots.append(f"{data} using 1:2 {style} {script.name(row)}")
        if figure.printed:
            script.note([(at, value, written(value)) for at, value in enumerate(values)], "offset 0,0.8")


def _points(script: _Script) -> None:
    figure, step = script.figure, script.figure.step
    script.lines += ["set xrange [-0.7:9.7]", f"set yrange [{-0.7 * step:g}:{10 * step:g}]"]
    for row, points in enumerate(figure.points):
        data = script.data((x, y * step) for x, y in points)
        style = f'with points pt {script.rng.choice((5, 7, 9))} ps 1 lc rgb "{script.shade(row)}"'
        script.plots.append(f"{data} using 1:2 {style} {script.name(row)}")


def _histogram(script: _Script) -> None:
    figure = script.figure
    edges = [int(label.split()[0]) for label in figure.labels] + [int(figure.labels[-1].split()[-1])]
    width = edges[1] - edges[0]
    script.lines += [f"set boxwidth {width}", "set style fill solid border -1"]
    script.lines += [f"set xrange [{edges[0]}:{edges[-1]}]", f"set xtics {edges[0]},{width}"]
    rows = [(low + width / 2, value) for low, value in zip(edges, figure.values[0], strict=False)]
    script.plots.append(f'{script.data(rows)} using 1:2 with boxes lc rgb "{script.shade(0)}" notitle')
    if figure.printed:
        script.note([(at, value, written(value)) for at, value in rows], "offset 0,0.6")


def _pie(script: _Script) -> None:
    figure, start = script.figure, float(script.rng.randrange(360))
    script.lines += ["unset border", "unset tics", "set size ratio -1", "set style fill solid"]
    script.lines += ["set xrange [-1.6:1.6]", "set yrange [-1.25:1.25]"]
    for column, value in enumerate(figure.values[0]):
        end, shade = start + 3.6 * value, script.shade(0, column)
        first, last = start % 360, end % 360 or 360.0
        # an arc must not run over 360 degrees
        for low, high in [(first, last)] if first < last else [(first, 360.0), (0.0, last)]:
            data = script.data([(0, 0, 1, low, high)])
            script.plots.append(f'{data} using 1:2:3:4:5 with circles fs solid noborder lc rgb "{shade}" notitle')
        across, up = (turn(math.radians((start + end) / 2)) for turn in (math.cos, math.sin))
        side = "left" if across > 0.2 else "right" if across < -0.2 else "center"
        script.label(1.1 * across, 1.12 * up, script.case(figure.labels[column]), side)
        if figure.printed:
            script.label(0.68 * across, 0.68 * up, written(value), f'center front tc rgb "{ink_on(shade)}"')
        start = end


_DRAWERS: dict[str, Callable[[_Script], None]] = {
    "vertical": _bars, "horizontal": _horizontal, "grouped": _bars, "stacked": _bars, "line": _lines, "lines": _lines,
    "scatter": _points, "histogram": _histogram, "pie": _pie,
}  # fmt: skip


def _choose_shades(rng: random.Random, figure: Figure) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(words, shades), one for each series or category that has its own."""
    several = figure.kind == "pie" or (figure.kind in ("vertical", "horizontal") and rng.random() < 0.3)
    count = len(figure.labels) if several else max(1, len(figure.names))
    if rng.random() < 0.5:
        return choose_colours(rng, "default", count)
    cycle = SEQUENCES[rng.choice(("default", "default", "classic"))][:count]
    return tuple(word for word, _ in cycle), tuple(shade for _, shade in cycle)


def render_gnuplot_figure(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws one figure with gnuplot and asks about it; for the test split only, by ValueError."""
    if not test:
        raise ValueError("gnuplot_figures are kept for the split 'test'; train on the family 'figures'.")
    figure = choose_figure(rng, test)
    words, shades = _choose_shades(rng, figure)
    script = _Script(figure, rng, shades, rng.choice(CASES))
    ratio = rng.choice(RATIOS)
    width, height = image_size, round(image_size * ratio)
    font = f"{rng.choice(list(FONTS))},{rng.choice((8, 8, 9, 10)) * image_size / 288:g}"
    title = rng.choice(CASES)
    script.lines += [f'set terminal pngcairo size {width},{height} font "{font}" noenhanced', "set tics nomirror"]
    if figure.title:
        script.lines.append(f"set title {_quoted(title(figure.title))}")
    if figure.kind != "pie":
        script.lines += [
            f"set {axis}label {_quoted(title(text))}" for axis, text in figure.axis_labels.items() if text
        ]
        if rng.random() < 0.4:
            script.lines.append("set grid")
        axes = {"horizontal": ("y", "x"), "histogram": ("", "y"), "scatter": ("", "")}.get(figure.kind, ("x", "y"))
        if axes[0]:
            letters = sum(len(label) + 1.5 for label in figure.labels)
            script.categories(
                axes[0], axes[0] == "x" and letters * 6.5 * image_size / 288 > (0.45 if figure.names else 0.75) * width
            )
        if axes[1]:
            script.values(axes[1])
    if figure.names:
        inside = figure.kind == "lines" or (figure.kind == "stacked" and len(figure.names) == 2)
        outside: tuple[str, ...] = ("outside top center horizontal",)
        if figure.kind != "stacked":  # whose numbers need wide bars
            outside += ("outside right", "outside right")
        script.lines.append(f"set key {rng.choice(('top left', 'top right', *outside) if inside else outside)}")
    _DRAWERS[figure.kind](script)
    image = run_gnuplot("\n".join([*script.lines, f"plot {', '.join(script.plots)}", ""]))
    readable = figure.printed or (
        bool(script.ticks) and all(value in script.ticks for row in figure.values for value in row)
    )
    questions = ask_about(rng, figure, Look(words, script.ticks), test, turns)
    return Sample(image, "gnuplot_figures", caption_of(figure, words, readable), questions, figure.held_out)

"""Figures drawn by matplotlib: bars, lines, points, pies and histograms in its own styles."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

from .augment import add_noise, change_levels, compress
from .colours import luminance
from .figure_facts import Figure, caption_of, choose_figure, written
from .figure_questions import FIGURE_TASKS, Look, ask_about
from .figure_styles import choose_colours, choose_style, cycle_words, ground_of
from .fonts import font_path, text_width
from .sample import Glyph, Sample

__all__ = ["FIGURE_TASKS", "render_figure"]

POINTS_AN_INCH = 72
# longer sides in inches, with the font size that matplotlib takes by default
USUAL_SIDES = (4.0, 4.0, 4.4, 4.8, 4.8)
LARGER_FONTS = ((11, 4.8), (11, 5.0), (12, 4.8), (12, 5.5), (13, 5.5), (14, 6.0), (14, 6.4))
STYLE_POINTS = {"fivethirtyeight": 14, "classic": 12}  # font sizes of styles that set one
RATIOS = (0.75, 0.75, 0.75, 0.75, 0.8, 0.7, 0.65, 1.0, 1.2)  # height to width
FONTS = {"DejaVu Sans": 12, "DejaVu Serif": 1, "DejaVu Sans Mono": 1, "Roboto": 2, "Lato": 1, "Source Sans Pro": 1}
FONT_FACES = ("roboto", "roboto-bold", "lato", "lato-bold", "source-sans", "source-sans-bold")
CENTRE = 0.36  # of the font size: from the baseline to the middle of a capital
REDUCED_SHARE = 0.35  # drawn twice as large and made smaller, as figures in files are
MARKERS = "oooosD^vPX"
CASES = (str.lower, str.lower, str.title, str.title, str.upper)


@lru_cache(maxsize=1)
def _matplotlib() -> Any:
    """The module, with the fonts of FONT_FACES."""
    try:
        import matplotlib
        import matplotlib.style
        from matplotlib import font_manager
    except ImportError as error:
        raise ImportError("figures need matplotlib; install it with: pip install 'flashsloth[draw]'") from error
    for face in FONT_FACES:
        font_manager.fontManager.addfont(font_path(face))
    return matplotlib


def _wear(image: Image.Image, rng: random.Random) -> Image.Image:
    """What happens to a figure on its way: compression, other levels, a little noise."""
    if rng.random() < 0.25:
        image = compress(image, rng.randint(60, 95))
    if rng.random() < 0.1:
        image = change_levels(image, rng.uniform(0.8, 1.1), rng.uniform(-15, 15))
    if rng.random() < 0.1:
        image = add_noise(image, rng, rng.uniform(1, 5))
    return image


@dataclass(frozen=True)
class _Setting:
    """How a figure is drawn, but for what depends on its kind."""

    style: str
    size: tuple[float, float]  # inches
    points: float  # size of the font
    family: str
    label_case: Callable[[str], str]
    title_case: Callable[[str], str]


def _choose_setting(rng: random.Random, figure: Figure) -> _Setting:
    style = choose_style(rng)
    points = STYLE_POINTS.get(style, 10)
    if rng.random() < 0.65 or style in STYLE_POINTS:
        side = rng.choice(USUAL_SIDES) * points / 10
    else:
        points, side = rng.choice(LARGER_FONTS)
    ratio = rng.choice(RATIOS)
    if figure.kind == "pie":
        ratio = rng.choice((0.75, 0.75, 0.8, 1.0))
    size = (side, side * ratio) if ratio <= 1 else (side / ratio, side)
    family = rng.choices(list(FONTS), list(FONTS.values()))[0]
    return _Setting(style, size, points, family, rng.choice(CASES), rng.choice(CASES))


@dataclass
class _Plot:
    """Axes with what is needed to draw on them."""

    axes: Any
    figure: Figure
    setting: _Setting
    rng: random.Random
    shades: tuple[str | None, ...] = (None,)  # None: the style's own colours in turn
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        figure, rng, style = self.figure, self.rng, self.setting.style
        several = figure.kind == "pie" or (figure.kind in ("vertical", "horizontal") and rng.random() < 0.3)
        count = len(figure.labels) if several else max(1, len(figure.names))
        if rng.random() < 0.5:
            self.words, self.shades = choose_colours(rng, style, count)
        else:
            self.words, self.shades = cycle_words(style, count), tuple(f"C{index}" for index in range(count))

    @property
    def horizontal(self) -> bool:
        return self.figure.kind == "horizontal"

    @property
    def names(self) -> list[str]:
        return [self.setting.label_case(name) for name in self.figure.names]

    @property
    def labels(self) -> list[str]:
        return [self.setting.label_case(label) for label in self.figure.labels]

    def ink_on(self, artist: Any) -> str:
        """Black or white, whichever is legible on a face."""
        red, green, blue = (255 * channel for channel in artist.get_facecolor()[:3])
        return "white" if luminance((int(red), int(green), int(blue))) < 110 else "black"


def _draw_bars(plot: _Plot) -> None:
    """Vertical, horizontal, grouped or stacked bars."""
    axes, figure, rng = plot.axes, plot.figure, plot.rng
    places = range(len(figure.labels))
    rows = len(figure.values)
    width = rng.choice((0.8, 0.8, 0.7, 0.6, 0.5))
    if figure.kind == "grouped":
        width = rng.choice((0.8, 0.8, 0.7)) / rows
    edge = {"edgecolor": "black", "linewidth": 0.8} if rng.random() < 0.2 else {}
    base = [0.0] * len(figure.labels)
    for row, values in enumerate(figure.values):
        shades = plot.shades if rows == 1 else plot.shades[row : row + 1]
        shift = (row - (rows - 1) / 2) * width if figure.kind == "grouped" else 0.0
        at = [place + shift for place in places]
        options: dict[str, Any] = {"color": list(shades) if len(shades) > 1 else shades[0], **edge}
        if figure.names:
            options["label"] = plot.names[row]
        if plot.horizontal:
            bars = axes.barh(at, values, width, **options)
        else:
            bars = axes.bar(at, values, width, bottom=base, **options)
        if figure.kind == "stacked":
            base = [low + value for low, value in zip(base, values, strict=True)]
        if figure.printed:
            inside = figure.kind == "stacked"
            texts = [written(value) for value in values]
            notes = axes.bar_label(bars, texts, label_type="center" if inside else "edge", padding=0 if inside else 2)
            for note, bar in zip(notes, bars, strict=True):
                if inside:
                    note.set_color(plot.ink_on(bar))
    if plot.horizontal:
        axes.set_yticks(list(places), plot.labels)
        if rng.random() < 0.6:
            axes.invert_yaxis()
    else:
        axes.set_xticks(list(places), plot.labels)


def _draw_lines(plot: _Plot) -> None:
    axes, figure, rng = plot.axes, plot.figure, plot.rng
    marker = rng.choice(MARKERS) if figure.kind == "line" or rng.random() < 0.7 else ""
    dashes = rng.choice(("-", "-", "-", "--"))
    for row, values in enumerate(figure.values):
        name = {"label": plot.names[row]} if figure.names else {}
        sign = rng.choice(MARKERS) if marker and rng.random() < 0.3 else marker
        axes.plot(plot.labels, values, dashes, marker=sign, color=plot.shades[row], **name)
        if figure.printed:
            for place, value in enumerate(values):
                low = value == min(values[max(0, place - 1) : place + 2]) and value > min(values)
                axes.annotate(
                    written(value), (place, value), (0, -5 if low else 5), textcoords="offset points",
                    ha="center", va="top" if low else "bottom",
                )  # fmt: skip


def _draw_points(plot: _Plot) -> None:
    axes, figure, rng = plot.axes, plot.figure, plot.rng
    across = rng.choice((1, 2, 5, 10))
    for row, points in enumerate(figure.points):
        name = {"label": plot.names[row]} if figure.names else {}
        x, y = ([scale * point[axis] for point in points] for axis, scale in ((0, across), (1, figure.step)))
        axes.scatter(x, y, color=plot.shades[row], marker=rng.choice("oooos^D"), **name)


def _draw_histogram(plot: _Plot) -> None:
    axes, figure = plot.axes, plot.figure
    edges = [int(label.split()[0]) for label in figure.labels] + [int(figure.labels[-1].split()[-1])]
    middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    edge = plot.rng.choice(("white", "black", ground_of(plot.setting.style)))
    _, _, bars = axes.hist(middles, edges, weights=figure.values[0], color=plot.shades[0], edgecolor=edge, linewidth=1)
    axes.set_xticks(edges)
    if figure.printed:
        axes.bar_label(bars, [written(value) for value in figure.values[0]], padding=2)


def _draw_pie(plot: _Plot) -> None:
    axes, figure, rng = plot.axes, plot.figure, plot.rng
    legend = rng.random() < 0.3
    percent = rng.choice(("%1.0f%%", "%1.0f%%", "%d")) if figure.printed else None
    wedges, *texts = axes.pie(
        figure.values[0],
        labels=None if legend else plot.labels,
        autopct=percent and (lambda share: percent % round(share)),
        colors=list(plot.shades),
        startangle=rng.choice((0, 0, 90, rng.randrange(360))),
        counterclock=rng.random() < 0.7,
        wedgeprops={"width": 0.6, "edgecolor": ground_of(plot.setting.style)}
        if not figure.printed and rng.random() < 0.25
        else None,
    )
    for wedge, note in zip(wedges, texts[-1] if percent else (), strict=False):
        note.set_color(plot.ink_on(wedge))
    if legend:
        axes.legend(wedges, plot.labels, loc="center left", bbox_to_anchor=(1.0, 0.5))


_DRAWERS: dict[str, Callable[[_Plot], None]] = {
    "vertical": _draw_bars, "horizontal": _draw_bars, "grouped": _draw_bars, "stacked": _draw_bars,
    "line": _draw_lines, "lines": _draw_lines, "scatter": _draw_points, "histogram": _draw_histogram, "pie": _draw_pie,
}  # fmt: skip


def _decorate(plot: _Plot) -> None:
    """Title, labels of the axes, legend, ticks and grid."""
    axes, figure, rng, setting = plot.axes, plot.figure, plot.rng, plot.setting
    if figure.title:
        axes.set_title(setting.title_case(figure.title))
    if figure.kind == "pie":
        return
    axes.set_xlabel(setting.title_case(figure.axis_labels["x"]))
    axes.set_ylabel(setting.title_case(figure.axis_labels["y"]))
    axis, margin = ("x", 0.14) if plot.horizontal else ("y", 0.2 if figure.kind == "line" else 0.12)
    if figure.printed and figure.kind != "stacked":
        axes.margins(**{axis: margin})
    if figure.step and not figure.printed and figure.kind not in ("stacked", "scatter") and rng.random() < 0.6:
        most = max(value for row in figure.values for value in row)
        getattr(axes, f"set_{axis}ticks")([figure.step * unit for unit in range(round(most / figure.step) + 2)])
    if figure.kind in ("vertical", "grouped", "stacked", "line", "lines", "histogram"):
        letters = sum(len(label.split()[0]) + 1.2 for label in figure.labels)
        if 0.62 * letters * setting.points > 0.78 * POINTS_AN_INCH * setting.size[0]:
            axes.tick_params(axis="x", rotation=rng.choice((45, 45, 90)))
    if figure.names:
        _place_legend(plot)
    if rng.random() < 0.3:
        axes.grid(True, axis=rng.choice(("both", axis)), alpha=0.4)
        axes.set_axisbelow(True)
    if rng.random() < 0.2:
        axes.spines[["top", "right"]].set_visible(False)


def _place_legend(plot: _Plot) -> None:
    """Where it hides nothing."""
    axes, figure, rng = plot.axes, plot.figure, plot.rng
    place = rng.random()
    if place < 0.25:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif figure.kind == "grouped" or figure.printed or place < 0.6:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + (0.3 if len(figure.names) > 2 else 0.24) * (high - low))
        axes.legend(loc="upper center", ncol=len(figure.names), columnspacing=1.0, handlelength=1.2)
    else:
        axes.legend(loc="best")


def _record_texts(renderer: Any, dots: float) -> list[Glyph]:
    """Lets a renderer keep, from now on, the characters it draws in the list that is returned."""
    glyphs: list[Glyph] = []
    draw_text = renderer.draw_text

    def draw(gc: Any, x: float, y: float, text: str, font: Any, angle: float, *rest: Any, **options: Any) -> None:
        draw_text(gc, x, y, text, font, angle, *rest, **options)
        width = renderer.get_text_width_height_descent(text, font, False)[0]
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        up = CENTRE * font.get_size_in_points() * dots / POINTS_AN_INCH
        advances = [text_width("dejavu-sans", 20, character) for character in text]
        done = 0.0
        for character, advance in zip(text, advances, strict=True):
            along = width * (done + advance / 2) / sum(advances)
            done += advance
            if character != " ":
                glyphs.append(Glyph(character, x + cosine * along - sine * up, y - sine * along - cosine * up))

    renderer.draw_text = draw
    return glyphs


def _ticks(axis: Any) -> frozenset[float]:
    """The values that are written at an axis."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-6 * (high - low)
    return frozenset(round(float(tick), 6) for tick in axis.get_majorticklocs() if low - slack <= tick <= high + slack)


def _draw(figure: Figure, setting: _Setting, rng: random.Random, pixels: int) -> tuple[Image.Image, Look, list[Glyph]]:
    """The figure with its longer side in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet

    dots = pixels / max(setting.size)
    # a little more than whole pixels, which are rounded down
    width, height = ((round(side * dots) + 0.01) / dots for side in setting.size)
    sheet = Sheet(figsize=(width, height), dpi=dots)
    canvas = FigureCanvasAgg(sheet)
    plot = _Plot(sheet.add_subplot(), figure, setting, rng)
    _DRAWERS[figure.kind](plot)
    _decorate(plot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of axes that the labels leave little room
        sheet.tight_layout()
    glyphs = _record_texts(canvas.get_renderer(), dots)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    axis = plot.axes.xaxis if plot.horizontal else plot.axes.yaxis
    ticks = frozenset() if figure.kind == "pie" else _ticks(axis)
    markers = any(line.get_marker() not in ("", "None", None) for line in plot.axes.lines)
    return image, Look(plot.words, ticks, markers), glyphs


def render_figure(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws one figure with matplotlib and asks about it; the longer side has `image_size` pixels."""
    matplotlib = _matplotlib()
    figure = choose_figure(rng, test)
    setting = _choose_setting(rng, figure)
    reduced = rng.random() < REDUCED_SHARE
    sheets = ["default", setting.style][: 1 if setting.style == "default" else 2]
    own = {"font.family": [setting.family], "font.size": setting.points}
    with matplotlib.style.context([*sheets, own]):
        image, look, glyphs = _draw(figure, setting, rng, 2 * image_size if reduced else image_size)
    if reduced:
        size = tuple(max(1, round(side / 2)) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        glyphs = [Glyph(glyph.character, glyph.x / 2, glyph.y / 2) for glyph in glyphs]
    questions = ask_about(rng, figure, look, test, turns)
    readable = figure.printed or (
        figure.kind not in ("pie", "stacked", "scatter")
        and all(value in look.ticks for row in figure.values for value in row)
    )
    return Sample(
        _wear(image, rng), "figures", caption_of(figure, look.colours, readable), questions, figure.held_out, glyphs
    )

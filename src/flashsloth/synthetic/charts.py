"""Bar, line and pie charts: read a value, maximum, minimum, comparison, trend, title, count and kind."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .augment import augment
from .colours import COLOURS, MIN_DISTANCE, RGB, choose_ink, distance, jitter
from .fonts import FACE_NAMES, Style, TextDraw, draw_text, fit_height, text_width
from .sample import REFERENCE_SIZE, Box, Sample, Turn, around, choose_absent, choose_turns, phrase, yes_no
from .words import HELD_OUT_TITLES, LABEL_SETS, choose_title

KINDS = {"vertical": "bar chart", "horizontal": "bar chart", "line": "line chart", "pie": "pie chart"}
KIND_WEIGHTS = {"vertical": 3, "horizontal": 2, "line": 3, "pie": 3}
HELD_OUT_SHARE = 1 / 3
LETTERS = "abcdefghjkmnprstuvwxyz"  # without i, l and o, which look like digits
ARC_STEPS = 16  # points on the edge of a slice that its box is found from
MIN_UNITS = 2  # least difference of two values that are compared by eye
# heights of capitals, in pixels of the reference canvas
TITLE_HEIGHT, LETTER_HEIGHT, LABEL_HEIGHT, VALUE_HEIGHT, TICK_HEIGHT = 14, 14, 12, 12, 10


@dataclass(frozen=True)
class Chart:
    """The facts of a chart; values in units, shown as `units * scale`."""

    kind: str
    labels: tuple[str, ...]
    units: tuple[int, ...]
    scale: int
    title: str
    printed: bool  # values written beside the marks

    def shown(self, index: int) -> str:
        """The value as written."""
        return str(self.units[index] * self.scale)


@dataclass(frozen=True)
class ChartStyle(Style):
    """How a chart is drawn."""

    fills: tuple[RGB, ...]
    grid: RGB


def _choose_labels(rng: random.Random, kind: str, count: int) -> tuple[str, ...]:
    if kind == "pie":
        if rng.random() < 0.5:
            return tuple(rng.sample([name for name in COLOURS if name not in ("black", "white")], count))
        return tuple(rng.sample(LETTERS, count))
    if rng.random() < (0.65 if kind == "horizontal" else 0.4 if count == 3 else 0.0):
        names = rng.choice(LABEL_SETS)
        if kind != "horizontal":  # longer ones would have to be small
            names = tuple(name for name in names if len(name) <= 3)
        start = rng.randrange(len(names) - count + 1)
        return names[start : start + count] if rng.random() < 0.3 else tuple(rng.sample(names, count))
    if rng.random() < 0.5:
        start = rng.randrange(len(LETTERS) - count)
        return tuple(LETTERS[start : start + count])
    return tuple(rng.sample(LETTERS, count))


def _choose_units(rng: random.Random, kind: str, count: int) -> tuple[int, ...]:
    if kind == "pie":  # tenths that add up to ten, with one largest and one smallest
        while True:
            cuts = sorted(rng.sample(range(1, 10), count - 1))
            slices = tuple(high - low for low, high in zip([0, *cuts], [*cuts, 10], strict=True))
            if slices.count(max(slices)) == slices.count(min(slices)) == 1:
                return slices
    units = rng.sample(range(1, 10), count)
    if kind == "line" and rng.random() < 0.6:
        units.sort(reverse=rng.random() < 0.5)
    return tuple(units)


def _choose_chart(rng: random.Random, test: bool) -> Chart:
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    count = rng.choice((3, 4)) if kind == "pie" else rng.choice((3, 4, 5))
    held_out = test and rng.random() < HELD_OUT_SHARE
    title = choose_title(rng, held_out) if held_out or rng.random() < 0.5 else ""
    labels = _choose_labels(rng, kind, count)
    units = _choose_units(rng, kind, count)
    printed = (labels[0] in COLOURS) if kind == "pie" else rng.random() < 0.65
    return Chart(kind, labels, units, 10 if kind == "pie" or rng.random() < 0.5 else 1, title, printed)


def _choose_style(rng: random.Random, chart: Chart) -> ChartStyle:
    ink, paper = choose_ink(rng)
    palette = [colour for name, colour in COLOURS.items() if name not in ("black", "white")]
    if chart.labels[0] in COLOURS:
        fills = [COLOURS[label] for label in chart.labels]
        while min(distance(fill, paper) for fill in fills) < MIN_DISTANCE:
            ink, paper = choose_ink(rng)
    else:
        palette = [colour for colour in palette if distance(colour, paper) > MIN_DISTANCE]
        fills = rng.sample(palette, min(len(palette), len(chart.labels)))
        if chart.kind != "pie" and rng.random() < 0.5:
            fills = fills[:1]
    fills = [jitter(rng, fill, 10) for fill in fills]
    red, green, blue = ((3 * low + high) // 4 for low, high in zip(paper, ink, strict=True))
    case = rng.choice(("lower", "upper", "title"))
    return ChartStyle(rng.choice(FACE_NAMES), case, ink, paper, tuple(fills), (red, green, blue))


class _Canvas:
    """Drawing in reference pixels on a canvas of another size.

    `boxes`, in pixels of the canvas, holds what belongs to each label, and the title behind them.
    """

    def __init__(self, image_size: int, style: ChartStyle) -> None:
        self.scale = image_size / REFERENCE_SIZE
        self.style = style
        self.image = Image.new("RGB", (image_size, image_size), style.paper)
        self.draw = TextDraw(self.image)
        self.boxes: list[Box] = []

    def keep(self, *parts: Box) -> None:
        """Note what belongs to the next label, in reference pixels."""
        self.boxes.append(Box(*(edge * self.scale for edge in around(parts))))

    def text(self, x: float, y: float, text: str, height: int, anchor: str = "mm", fill: RGB | None = None) -> Box:
        scale, width = self.scale, self.width(text, height)
        left = x - {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]] * width
        written = Box(left, y - height / 2, left + width, y + height / 2)
        height = round(height * scale)
        draw_text(self.draw, (x * scale, y * scale), text, self.style.face, height, fill or self.style.ink, anchor)
        return written

    def line(self, points: Sequence[tuple[float, float]], fill: RGB, width: float) -> None:
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, fill, max(1, round(width * self.scale)), joint="curve" if len(points) > 2 else None)

    def box(self, left: float, top: float, right: float, bottom: float, fill: RGB) -> Box:
        scale = self.scale
        self.draw.rectangle((left * scale, top * scale, right * scale - 1, bottom * scale - 1), fill)
        return Box(left, top, right, bottom)

    def dot(self, x: float, y: float, radius: float, fill: RGB) -> Box:
        drawn = Box(x - radius, y - radius, x + radius, y + radius)
        self.draw.ellipse([self.scale * edge for edge in drawn], fill)
        return drawn

    def label_height(self, texts: Sequence[str], width: float) -> int:
        """Of category names: single letters may be larger."""
        wanted = LETTER_HEIGHT if max(map(len, texts)) == 1 else LABEL_HEIGHT
        return self.fit(texts, wanted, width)

    def width(self, text: str, height: int) -> float:
        return text_width(self.style.face, round(height * self.scale), text) / self.scale

    def fit(self, texts: Sequence[str], height: int, width: float) -> int:
        fitted = fit_height(self.style.face, tuple(texts), round(height * self.scale), width * self.scale)
        return max(7, int(fitted / self.scale))


def _draw_title(canvas: _Canvas, chart: Chart) -> tuple[float, list[Box]]:
    """Draws the title and returns where the plot may begin, and where the title is, if there is one."""
    if not chart.title:
        return 6.0, []
    text = canvas.style.cased(chart.title)
    return 24.0, [canvas.text(REFERENCE_SIZE / 2, 12, text, canvas.fit([text], TITLE_HEIGHT, 126))]


def _draw_upright(canvas: _Canvas, chart: Chart, rng: random.Random) -> None:
    """Vertical bars or a line over named positions."""
    style, count = canvas.style, len(chart.labels)
    (top, title), bottom = _draw_title(canvas, chart), REFERENCE_SIZE - 22.0
    left, right = (8.0, REFERENCE_SIZE - 6.0) if chart.printed else (33.0, REFERENCE_SIZE - 6.0)
    if chart.printed:
        top += 18
        floor = bottom - 17 if chart.kind == "line" else bottom  # room for numbers below the points
        unit = (floor - top) / max(7, *chart.units)
    else:
        floor, unit = bottom, (bottom - top - 3) / 10
        for tick in range(0, 11):
            y = bottom - tick * unit
            if tick % 5 == 0:
                canvas.text(left - 4, y, str(tick * chart.scale), TICK_HEIGHT, "rm")
            canvas.line([(left, y), (right, y)], style.grid, 1)
    canvas.line([(left, bottom), (right, bottom)], style.ink, 1)
    slot = (right - left) / count
    shown = [style.cased(label) for label in chart.labels]
    height = canvas.label_height(shown, slot - 3)
    centers = [left + slot * (index + 0.5) for index in range(count)]
    tops = [floor - units * unit for units in chart.units]
    half = slot * rng.uniform(0.27, 0.4)
    if chart.kind == "line":
        canvas.line(list(zip(centers, tops, strict=True)), style.fills[0], rng.uniform(2, 3.4))
    for index, (x, y) in enumerate(zip(centers, tops, strict=True)):
        fill = style.fills[index % len(style.fills)]
        if chart.kind == "line":
            parts = [canvas.dot(x, y, 3.6, style.fills[0])]
        else:
            parts = [canvas.box(x - half, y, x + half, bottom, fill)]
        parts.append(canvas.text(x, bottom + 11, shown[index], height))
        if chart.printed:
            around = chart.units[max(0, index - 1) : index + 2]
            offset = 10 if chart.kind != "line" else -12 if chart.units[index] == min(around) else 12
            parts.append(canvas.text(x, y - offset, chart.shown(index), VALUE_HEIGHT))
        canvas.keep(*parts)
    for box in title:
        canvas.keep(box)


def _draw_horizontal(canvas: _Canvas, chart: Chart, rng: random.Random) -> None:
    """Bars to the right, the first one on top."""
    style, count = canvas.style, len(chart.labels)
    (top, title), bottom = _draw_title(canvas, chart), REFERENCE_SIZE - (6.0 if chart.printed else 21.0)
    shown = [style.cased(label) for label in chart.labels]
    height = canvas.label_height(shown, 42)
    left = 12 + max(canvas.width(text, height) for text in shown)
    right = REFERENCE_SIZE - (28.0 if chart.printed else 16.0)
    unit = (right - left) / (max(7, *chart.units) if chart.printed else 10)
    if not chart.printed:
        for tick in range(0, 11):
            x = left + tick * unit
            canvas.line([(x, top), (x, bottom)], style.grid, 1)
            if tick % 5 == 0:
                canvas.text(x, bottom + 10, str(tick * chart.scale), TICK_HEIGHT)
    canvas.line([(left, top), (left, bottom)], style.ink, 1)
    slot = (bottom - top) / count
    half = slot * rng.uniform(0.28, 0.4)
    for index, units in enumerate(chart.units):
        y = top + slot * (index + 0.5)
        end = left + units * unit
        parts = [canvas.box(left, y - half, end, y + half, style.fills[index % len(style.fills)])]
        parts.append(canvas.text(left - 5, y, shown[index], height, "rm"))
        if chart.printed:
            parts.append(canvas.text(end + 3, y, chart.shown(index), VALUE_HEIGHT, "lm"))
        canvas.keep(*parts)
    for box in title:
        canvas.keep(box)


def _draw_pie(canvas: _Canvas, chart: Chart, rng: random.Random) -> None:
    """Slices with their value, when the colours are the names, or with their name."""
    style = canvas.style
    top, title = _draw_title(canvas, chart)
    radius = (REFERENCE_SIZE - top - 6) / 2
    x, y = REFERENCE_SIZE / 2, top + radius
    scale = canvas.scale
    box = [scale * edge for edge in (x - radius, y - radius, x + radius, y + radius)]
    start = rng.uniform(0, 360)
    for index, units in enumerate(chart.units):
        end = start + 36 * units
        fill = style.fills[index % len(style.fills)]
        canvas.draw.pieslice(box, start, end, fill, style.paper, max(1, round(1.5 * scale)))
        middle = math.radians((start + end) / 2)
        reach = radius * (0.62 if units > 1 else 0.74)
        text = chart.shown(index) if chart.printed else style.cased(chart.labels[index])
        ink = (255, 255, 255) if 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 140 else (0, 0, 0)
        canvas.text(x + reach * math.cos(middle), y + reach * math.sin(middle), text, LETTER_HEIGHT, fill=ink)
        edge = [math.radians(start + (end - start) * step / ARC_STEPS) for step in range(ARC_STEPS + 1)]
        corners = [(x, y), *((x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in edge)]
        canvas.keep(*(Box(*corner, *corner) for corner in corners))
        start = end
    for heading in title:
        canvas.keep(heading)


DRAWERS = {
    "vertical": _draw_upright,
    "line": _draw_upright,
    "horizontal": _draw_horizontal,
    "pie": _draw_pie,
}


class _Questions:
    """Question makers over one chart."""

    def __init__(self, chart: Chart, boxes: Sequence[Box]) -> None:
        self.chart, self.boxes = chart, boxes
        self.order = sorted(range(len(chart.units)), key=chart.units.__getitem__)

    def absent(self) -> list[tuple[str, ...]]:
        """Questions, in all their wordings, about a title that is missing and about labels that are not there."""
        others = [label for labels in LABEL_SETS for label in labels if label not in self.chart.labels]
        questions: list[tuple[str, ...]] = [
            (f"what is the value of {label}?", f"how much is {label}?") for label in others
        ]
        titles: list[tuple[str, ...]] = [("what is the title?", "what is the chart about?")] * (len(others) // 4)
        return questions if self.chart.title else [*titles, *questions]

    def value(self, rng: random.Random) -> Turn | None:
        if self.chart.kind == "pie" and not self.chart.printed:
            return None
        index = rng.randrange(len(self.chart.labels))
        label = self.chart.labels[index]
        questions = (f"what is the value of {label}?", f"how much is {label}?")
        return phrase(rng, "chart_value", questions, self.chart.shown(index), boxes=[self.boxes[index]])

    def find_value(self, rng: random.Random) -> Turn | None:
        if not self.chart.printed:
            return None
        index = rng.randrange(len(self.chart.labels))
        if self.chart.units.count(self.chart.units[index]) > 1:
            return None
        shown = self.chart.shown(index)
        boxes = (self.boxes[index],)
        return Turn("chart_find_value", f"which one has the value {shown}?", self.chart.labels[index], boxes=boxes)

    def maximum(self, rng: random.Random) -> Turn:
        questions = ("which one is the highest?", "which one is the largest?", "what has the highest value?")
        index = self.order[-1]
        return phrase(rng, "chart_maximum", questions, self.chart.labels[index], boxes=[self.boxes[index]])

    def minimum(self, rng: random.Random) -> Turn:
        questions = ("which one is the lowest?", "which one is the smallest?", "what has the lowest value?")
        index = self.order[0]
        return phrase(rng, "chart_minimum", questions, self.chart.labels[index], boxes=[self.boxes[index]])

    def compare(self, rng: random.Random) -> Turn | None:
        low, high = sorted(rng.sample(self.order, 2), key=self.chart.units.__getitem__)
        if self.chart.units[high] - self.chart.units[low] < MIN_UNITS:
            return None
        more, less = self.chart.labels[high], self.chart.labels[low]
        truth = rng.random() < 0.5
        first, second = (more, less) if truth else (less, more)
        boxes = (self.boxes[low], self.boxes[high])
        if rng.random() < 0.4:
            return Turn("chart_compare", f"which is larger, {first} or {second}?", more, boxes=boxes)
        return Turn("chart_compare", f"is {first} larger than {second}?", yes_no(truth), boxes=boxes)

    def trend(self, rng: random.Random) -> Turn | None:
        rising = self.order == list(range(len(self.order)))
        if self.chart.kind != "line" or not (rising or self.order[::-1] == list(range(len(self.order)))):
            return None
        questions = ("does the line go up or down?", "what is the trend, up or down?")
        return phrase(rng, "chart_trend", questions, "up" if rising else "down")

    def title(self, rng: random.Random) -> Turn | None:
        if not self.chart.title:
            return None
        questions = ("what is the title?", "what is the chart about?")
        return phrase(rng, "chart_title", questions, self.chart.title, boxes=self.boxes[-1:])

    def count(self, rng: random.Random) -> Turn:
        noun = {"line": "points", "pie": "slices"}.get(self.chart.kind, "bars")
        return Turn("chart_count", f"how many {noun} are there?", str(len(self.chart.labels)))

    def kind(self, rng: random.Random) -> Turn:
        questions = ("what kind of chart is this?", "what type of chart is shown?")
        return phrase(rng, "chart_kind", questions, KINDS[self.chart.kind])


def render_chart(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws one chart of three to five values and asks about it."""
    chart = _choose_chart(rng, test)
    style = _choose_style(rng, chart)
    canvas = _Canvas(image_size, style)
    DRAWERS[chart.kind](canvas, chart, rng)
    image = augment(canvas.image, rng, style.paper, canvas.draw.glyphs, canvas.boxes)

    readable = chart.printed or chart.kind != "pie"
    parts = [f"{label} {chart.shown(index)}" if readable else label for index, label in enumerate(chart.labels)]
    if not readable:  # slices without numbers: largest first
        parts = [chart.labels[index] for index in sorted(range(len(parts)), key=lambda i: -chart.units[i])]
    name = KINDS[chart.kind] + (f" titled {chart.title}" if chart.title else "")
    ask = _Questions(chart, canvas.boxes)
    makers = [
        (2.0, ask.value), (0.8, ask.find_value), (1.0, ask.maximum), (1.0, ask.minimum), (1.3, ask.compare),
        (2.5, ask.trend), (1.0, ask.title), (0.4, ask.count), (0.25, ask.kind),
    ]  # fmt: skip
    chosen = choose_turns(rng, makers, turns)
    held_out = chart.title in HELD_OUT_TITLES
    absent = choose_absent(rng, "chart_absent", ask.absent())
    return Sample(image, "charts", f"{name}. {', '.join(parts)}.", chosen, held_out, canvas.draw.glyphs, absent)


CHART_TASKS = (
    "chart_value", "chart_find_value", "chart_maximum", "chart_minimum", "chart_compare", "chart_trend", "chart_title",
    "chart_count", "chart_kind", "chart_absent",
)  # fmt: skip

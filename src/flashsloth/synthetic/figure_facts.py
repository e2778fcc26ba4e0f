"""What a figure shows, chosen without regard to the program that draws it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from .words import (
    HELD_OUT,
    HELD_OUT_ITEMS,
    HELD_OUT_WORDS,
    LABEL_SETS,
    TRAIN_ITEMS,
    TRAIN_WORDS,
    choose_title,
    random_string,
)

KIND_NAMES = {
    "vertical": "bar chart", "horizontal": "bar chart", "grouped": "bar chart", "stacked": "bar chart",
    "line": "line chart", "lines": "line chart", "pie": "pie chart", "scatter": "scatter plot",
    "histogram": "histogram",
}  # fmt: skip
KIND_WEIGHTS = {
    "vertical": 5, "horizontal": 4, "grouped": 3, "stacked": 2, "line": 4, "lines": 4, "pie": 4, "scatter": 3,
    "histogram": 2,
}  # fmt: skip
BARS = ("vertical", "horizontal", "grouped", "stacked", "histogram")
SEVERAL = ("grouped", "stacked", "lines")  # kinds with a legend
LABEL_COUNTS = {
    "vertical": (3, 7), "horizontal": (3, 7), "grouped": (2, 4), "stacked": (3, 5), "line": (4, 7), "lines": (3, 6),
    "pie": (3, 5), "histogram": (4, 7), "scatter": (0, 0),
}  # fmt: skip
HELD_OUT_SHARE = 0.5
FIT_SHARE = 0.08  # of the highest bar
GRID_COLUMNS, GRID_ROWS = 10, 8  # places of the points of a scatter plot

# (label of the axis, names on it)
ORDERED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("day", LABEL_SETS[0]),
    ("month", LABEL_SETS[1]),
    ("quarter", LABEL_SETS[5]),
    ("year", tuple(str(year) for year in range(1995, 2027))),
    ("week", tuple(str(week) for week in range(1, 13))),
    ("hour", tuple(str(hour) for hour in range(6, 23))),
)
NAMES = (
    "anna", "ben", "carl", "dora", "emma", "finn", "gina", "hugo", "ida", "jack", "kate", "leo", "mia", "nora", "otto",
    "paul", "rosa", "sam", "tim", "vera", *LABEL_SETS[4],
)  # fmt: skip
CITIES = (
    "rome", "paris", "oslo", "lima", "cairo", "delhi", "tokyo", "miami", "berlin", "madrid", "london", "vienna",
    "boston", "dublin", "seoul",
)  # fmt: skip
UNORDERED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("animal", LABEL_SETS[2]),
    ("vehicle", LABEL_SETS[3]),
    ("name", NAMES),
    ("city", CITIES),
    ("item", TRAIN_ITEMS),
    ("word", TRAIN_WORDS),
    ("group", tuple("abcdefghjkmnprstuvwxyz")),
    ("model", ()),  # made-up words
)
HELD_OUT_SETS = (("item", HELD_OUT_ITEMS), ("word", HELD_OUT_WORDS))
# labels of the axis of values
QUANTITIES = (
    "count", "amount", "score", "price", "number", "total", "level", "value", "euros", "dollars", "people", "votes",
    "visits", "minutes", "meters", "percent", "sales", "speed", "rain", "points", "cost", "time", "distance", "users",
    "time in minutes", "price in euros", "number of cars", "speed in miles",
)  # fmt: skip
HELD_OUT_QUANTITIES = ("profit", "output", "height", "weight", "hours", "demand", "clicks", "growth")
TITLE_FORMS = ("{} by {}", "{} per {}", "{} and {}", "total {}", "{} in {}")
COLUMNS = ("age", "size", "length", "width", "depth", "speed", "price", "time", "distance", "rain", "score", "level")


@dataclass(frozen=True)
class Figure:
    """The facts of a figure.

    `values` has one row a series; a scatter plot has `points` instead. `others` and `other_names` are labels and
    names of series that could be there and are not.
    """

    kind: str
    labels: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    step: float  # distance of the ticks on which all values lie, unless they are printed
    printed: bool
    title: str
    label_axis: str  # label of the axis of the categories, x unless bars are horizontal
    value_axis: str
    others: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()
    points: tuple[tuple[tuple[int, int], ...], ...] = field(default=(), repr=False)

    @property
    def axis_labels(self) -> dict[str, str]:
        """What is written at the axes x and y."""
        if self.kind == "horizontal":
            return {"x": self.value_axis, "y": self.label_axis}
        return {"x": self.label_axis, "y": self.value_axis}

    @property
    def totals(self) -> tuple[float, ...]:
        """Sums over the series, a label each."""
        return tuple(sum(column) for column in zip(*self.values, strict=True))

    @property
    def held_out(self) -> bool:
        """Whether it shows a word that does not occur in training."""
        written = (self.title, self.label_axis, self.value_axis, *self.labels, *self.names)
        return any(word in HELD_OUT for text in written for word in text.split())


def written(value: float) -> str:
    """A value in digits."""
    return f"{value:g}"


def _choose_names(rng: random.Random, count: int, held_out: bool, ordered: bool) -> tuple[str, list[str], list[str]]:
    """(label of the axis, names, further names of the kind)"""
    if ordered:
        axis, names = rng.choice(ORDERED)
        count = min(count, len(names))
        start = rng.randrange(len(names) - count + 1)
        # further ones are next to those shown, so that a name alone does not tell whether it is there
        others = [*names[max(0, start - 2) : start], *names[start + count : start + count + 2]]
        return axis, list(names[start : start + count]), others
    axis, names = rng.choice(HELD_OUT_SETS if held_out else UNORDERED)
    pool = list(names) or sorted({random_string(rng) for _ in range(count + 4)})
    pool = [name for name in pool if len(name) <= 6]
    chosen = rng.sample(pool, min(len(pool), count + 3))
    if count <= len(chosen) and rng.random() < 0.1 and axis == "group":
        chosen.sort()
    return axis, chosen[:count], chosen[count:]


def _choose_title(rng: random.Random, held_out: bool, axis: str) -> str:
    title = choose_title(rng, held_out)
    if rng.random() < 0.5:
        return title
    form = rng.choice(TITLE_FORMS)
    second = axis if form.endswith(("by {}", "per {}")) else rng.choice(TRAIN_WORDS if "and" in form else CITIES)
    return form.format(title, second) if second and second != title else title


def _choose_shares(rng: random.Random, count: int) -> tuple[float, ...]:
    """Percentages in steps of five, with one largest and one smallest."""
    while True:
        cuts = sorted(rng.sample(range(1, 20), count - 1))
        shares = [5 * (high - low) for low, high in zip([0, *cuts], [*cuts, 20], strict=True)]
        ordered = sorted(shares)
        if ordered[0] < ordered[1] and ordered[-2] < ordered[-1]:
            if rng.random() < 0.5:  # any percentage, not only multiples of five
                moved = rng.randint(1, 4)
                shares[shares.index(ordered[-1])] -= moved
                shares[shares.index(ordered[-2])] += moved
                ordered = sorted(shares)
                if ordered[0] == ordered[1] or ordered[-2] >= ordered[-1]:
                    continue
            return tuple(shares)


def _choose_row(rng: random.Random, kind: str, count: int, most: int) -> list[int]:
    """Values in steps."""
    low = 0 if kind in ("line", "lines") else 1
    if kind not in ("line", "lines"):
        return rng.sample(range(low, most + 1), count) if count <= most else rng.choices(range(low, most + 1), k=count)
    if rng.random() < 0.6:  # up or down all the way
        return sorted(rng.sample(range(low, most + 1), count), reverse=rng.random() < 0.5)
    return [rng.randint(low, most) for _ in range(count)]


def _choose_values(
    rng: random.Random, kind: str, rows: int, count: int, printed: bool
) -> tuple[list[list[float]], float]:
    """(values, step)"""
    if printed and rng.random() < 0.6:
        most = 10 ** rng.choice((1, 2, 2, 3)) - 1
        values = rng.sample(range(1, most + 1), rows * count) if rows * count <= most else []
        if values and max(values) > 12 * min(values) and kind != "line":  # no bar too short to be seen
            values = [value + max(values) // 12 for value in values]
        if values and len(set(values)) == rows * count:
            divisor = 10 if most == 99 and rng.random() < 0.25 else 1
            return [[value / divisor for value in values[row * count :][:count]] for row in range(rows)], 0.0
    step = rng.choice((1, 1, 2, 5, 10, 10, 20, 50, 100, 0.5) if kind != "histogram" else (1, 1, 2, 5, 10))
    most = rng.choice((5, 6, 8)) if kind == "stacked" else rng.choice((7, 8, 9, 10))
    return [[step * unit for unit in _choose_row(rng, kind, count, most)] for _ in range(rows)], step


def _choose_points(rng: random.Random, groups: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Points on a grid, apart from one another, rising, falling or anywhere."""
    tilt = rng.choice((-1, 0, 1))
    cells = [
        (column, row)
        for column in range(GRID_COLUMNS)
        for row in range(GRID_ROWS)
        if not tilt or abs(row - (column if tilt > 0 else GRID_COLUMNS - 1 - column) * 0.75) <= 1.2
    ]
    counts = [rng.randint(3, 8 if groups == 1 else 6) for _ in range(groups)]
    chosen = rng.sample(cells, sum(counts))
    return tuple(tuple(sorted(chosen.pop() for _ in range(count))) for count in counts)


def choose_figure(rng: random.Random, test: bool) -> Figure:
    """Draws the facts of a figure; with `test` half of them show held-out words."""
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    held_out = test and rng.random() < HELD_OUT_SHARE
    held_names = held_out and rng.random() < 0.6
    rows = rng.choice((2, 2, 3)) if kind in SEVERAL else 1
    count = rng.randint(*LABEL_COUNTS[kind])
    ordered = kind in ("line", "lines") or (kind in ("vertical", "grouped", "stacked") and rng.random() < 0.35)
    axis, labels, others = _choose_names(rng, count, held_names and kind not in SEVERAL, ordered)
    names: list[str] = []
    other_names: list[str] = []
    if kind in SEVERAL or (kind == "scatter" and rng.random() < 0.7):
        rows = rows if kind in SEVERAL else rng.choice((2, 2, 3))
        while not names or set(names) & {*labels, *others}:
            _, names, other_names = _choose_names(rng, rows, held_names, False)
    count = len(labels)
    points: tuple[tuple[tuple[int, int], ...], ...] = ()
    values: Sequence[Sequence[float]] = ()
    printed, step = False, 0.0
    if kind == "pie":
        printed, values = rng.random() < 0.6, [_choose_shares(rng, count)]
    elif kind == "scatter":
        axis, points = rng.choice(COLUMNS), _choose_points(rng, len(names) or 1)
        labels, others, step = [], [], rng.choice((1, 2, 5, 10))
    else:
        printed = rng.random() < {"lines": 0.0, "stacked": 0.5, "histogram": 0.3}.get(kind, 0.5)
        values, step = _choose_values(rng, kind, rows, count, printed)
        if kind == "stacked":  # a number must fit into its part
            printed = printed and min(map(min, values)) > FIT_SHARE * max(map(sum, zip(*values, strict=True)))
    if kind == "histogram":
        width = rng.choice((1, 2, 5, 10, 10, 20))
        start = width * rng.randint(0, 5)
        labels = [f"{start + width * place} to {start + width * (place + 1)}" for place in range(count)]
        axis = rng.choice(COLUMNS)
        others = [
            f"{start + width * place} to {start + width * (place + 1)}" for place in (-1, count) if start + place >= 0
        ]
    quantity = rng.choice(HELD_OUT_QUANTITIES if held_out and rng.random() < 0.4 else QUANTITIES)
    if kind == "histogram":
        quantity = rng.choice(("count", "number", "frequency", "people"))
    elif quantity == axis:
        quantity = "value"
    title = _choose_title(rng, held_out, axis) if held_out and not held_names or rng.random() < 0.6 else ""
    if len(title.split()) > 3:
        title = ""
    shows_axes = kind != "pie" and rng.random() < 0.75
    return Figure(
        kind,
        tuple(labels),
        tuple(names),
        tuple(tuple(row) for row in values),
        step,
        printed,
        title,
        axis if shows_axes and rng.random() < 0.85 else "",
        quantity if shows_axes and rng.random() < 0.85 else "",
        tuple(others),
        tuple(other_names),
        points,
    )


def caption_of(figure: Figure, colours: Sequence[str], readable: bool) -> str:
    """A dense description.

    Args:
        colours: colour words of the series, empty where there is none to tell.
        readable: whether every value can be read off.
    """
    parts = [KIND_NAMES[figure.kind] + (f" titled {figure.title}" if figure.title else "")]
    parts += [f"{axis} axis {label}" for axis, label in figure.axis_labels.items() if label]
    titles = [
        " ".join(filter(None, (colour, name)))
        for colour, name in zip(colours, figure.names or ("",) * len(colours), strict=False)
    ]
    if figure.kind == "scatter":
        parts += [f"{title} {len(points)} points".strip() for title, points in zip(titles, figure.points, strict=True)]
    elif figure.names:
        numbers = readable and len(figure.labels) * len(figure.names) <= 9
        parts.append(f"{figure.labels[0]} to {figure.labels[-1]}" if not numbers else ", ".join(figure.labels))
        for title, row in zip(titles, figure.values, strict=True):
            parts.append(f"{title}: {', '.join(written(value) for value in row)}" if numbers else title)
    elif readable:
        parts.append(
            ", ".join(f"{label} {written(v)}" for label, v in zip(figure.labels, figure.values[0], strict=True))
        )
    else:  # largest first
        order = sorted(range(len(figure.labels)), key=lambda index: -figure.values[0][index])
        parts.append(", ".join(figure.labels[index] for index in order))
    return f"{'. '.join(parts)}."

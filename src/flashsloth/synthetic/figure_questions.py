"""Questions about figures, whatever program has drawn them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .figure_facts import BARS, KIND_NAMES, Figure, written
from .sample import Turn, TurnMaker, choose_turns, phrase, yes_no

COLOUR_WORDS = (
    "red", "orange", "yellow", "green", "blue", "purple", "black", "brown", "pink", "gray", "cyan",
)  # fmt: skip
CLEAR_SHARE = 0.07  # of the largest value: a difference seen by eye
CLEAR_SLICE = 4.0  # percent: a difference of slices seen by eye
NONE = "none"

# key -> (wordings, wordings kept for the test split)
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "value": (
        ("what is the value of {0}?", "how much is {0}?", "what value does {0} have?", "which value has {0}?"),
        ("read the value of {0}.", "tell me the value of {0}."),
    ),
    "value_at": (
        ("what is the value of {1} in {0}?", "how much is {1} in {0}?", "what value does {1} have in {0}?"),
        ("read the value of {1} in {0}.",),
    ),
    "value_bin": (
        ("how many are there from {0}?", "how high is the bar from {0}?", "what is the count from {0}?"),
        ("tell me the count from {0}.",),
    ),
    "find_value": (
        ("which one has the value {0}?", "what has a value of {0}?", "for which one is the value {0}?"),
        ("where is the value {0}?",),
    ),
    "find_value_of": (
        ("where does {1} have the value {0}?", "where is the value of {1} {0}?", "in which one is {1} at {0}?"),
        ("which one has the value {0} for {1}?",),
    ),
    "maximum": (
        ("which one is the highest?", "which one is the largest?", "what has the highest value?"),
        ("which one has the most?", "name the largest one."),
    ),
    "minimum": (
        ("which one is the lowest?", "which one is the smallest?", "what has the lowest value?"),
        ("which one has the least?", "name the smallest one."),
    ),
    "maximum_in": (
        ("which one is the highest in {0}?", "which one is the largest in {0}?", "what has the highest value in {0}?"),
        ("which one has the most in {0}?",),
    ),
    "minimum_in": (
        ("which one is the lowest in {0}?", "which one is the smallest in {0}?", "what has the lowest value in {0}?"),
        ("which one has the least in {0}?",),
    ),
    "maximum_of": (
        ("where is {0} the highest?", "where is {0} the largest?", "where does {0} have its highest value?"),
        ("where does {0} have the most?",),
    ),
    "minimum_of": (
        ("where is {0} the lowest?", "where is {0} the smallest?", "where does {0} have its lowest value?"),
        ("where does {0} have the least?",),
    ),
    "maximum_value": (
        ("what is the highest value?", "what is the largest value?", "how much is the maximum?"),
        ("what is the maximum value?",),
    ),
    "minimum_value": (
        ("what is the lowest value?", "what is the smallest value?", "how much is the minimum?"),
        ("what is the minimum value?",),
    ),
    "is_larger": (
        ("is {0} larger than {1}?", "is {0} higher than {1}?", "is {0} more than {1}?"),
        ("does {0} have more than {1}?",),
    ),
    "is_larger_in": (
        ("is {0} larger than {1} in {2}?", "is {0} higher than {1} in {2}?", "in {2}, is {0} more than {1}?"),
        ("does {0} have more than {1} in {2}?",),
    ),
    "which_larger": (
        ("which is larger, {0} or {1}?", "which is higher, {0} or {1}?", "which one is more, {0} or {1}?"),
        ("which has a higher value, {0} or {1}?",),
    ),
    "which_larger_in": (
        (
            "which is larger in {2}, {0} or {1}?",
            "in {2}, which is higher, {0} or {1}?",
            "in {2}, what is more, {0} or {1}?",
        ),
        ("which has a higher value in {2}, {0} or {1}?",),
    ),
    "more_points": (
        (
            "are there more points of {0} than {1}?",
            "does {0} have more points than {1}?",
            "more points of {0} than {1}?",
        ),
        ("do you see more points of {0} than of {1}?",),
    ),
    "count": (
        ("how many {0} are there?", "how many {0} do you see?", "count the {0}.", "how many {0} are shown?"),
        ("what is the number of {0}?",),
    ),
    "trend": (
        ("does {0} go up or down?", "what is the trend of {0}, up or down?", "which way does {0} go, up or down?"),
        ("from left to right, does {0} go up or down?",),
    ),
    "trend_are": (
        ("do {0} go up or down?", "what is the trend of {0}, up or down?", "which way do {0} go, up or down?"),
        ("from left to right, do {0} go up or down?",),
    ),
    "kind": (
        ("what kind of chart is this?", "what type of chart is shown?", "which kind of chart do you see?"),
        ("name the type of chart.",),
    ),
    "direction": (
        ("are the bars vertical or horizontal?", "is this a vertical or horizontal chart?", "vertical or horizontal?"),
        ("do the bars look vertical or horizontal?",),
    ),
    "stacking": (
        ("are the bars grouped or stacked?", "is it a grouped or a stacked bar chart?", "grouped or stacked bars?"),
        ("do the bars look grouped or stacked?",),
    ),
    "title": (
        ("what is the title?", "what is the title of the chart?", "read the title.", "what is the chart about?"),
        ("which title does it have?",),
    ),
    "axis": (
        ("what is the label of the {0} axis?", "what is the name of the {0} axis?", "how is the {0} axis labeled?"),
        ("read the label of the {0} axis.",),
    ),
    "colour": (
        ("what colour is {0}?", "what color is {0}?", "what is the colour of {0}?", "which colour has {0}?"),
        ("tell me the colour of {0}.",),
    ),
    "colour_are": (
        ("what colour are {0}?", "what color are {0}?", "which colour do {0} have?"),
        ("tell me the colour of {0}.",),
    ),
    "find_colour": (
        ("which one is {0}?", "what is shown in {0}?", "what has the colour {0}?"),
        ("name the one in {0}.",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a figure has been drawn, as far as questions depend on it.

    `colours` are the colour words of the series or, where each category has one, of the categories; empty where they
    have no plain name. `ticks` are the values written at the axis of values.
    """

    colours: tuple[str, ...] = ()
    ticks: frozenset[float] = frozenset()
    markers: bool = True


class FigureQuestions:
    """Question makers over one figure; `test` allows the wordings kept for it."""

    def __init__(self, figure: Figure, look: Look, test: bool) -> None:
        self.figure, self.look, self.test = figure, look, test
        self.coloured: tuple[str, ...] = ()  # what the colours belong to
        if len(set(look.colours)) == len(look.colours) > 1:
            self.coloured = figure.names or figure.labels
        rows = figure.totals if figure.kind == "stacked" else tuple(value for row in figure.values for value in row)
        self.clear = 0.0 if figure.printed and figure.kind != "stacked" else CLEAR_SHARE * max(rows, default=0)
        if figure.kind == "pie" and not figure.printed:
            self.clear = CLEAR_SLICE

    def ask(self, rng: random.Random, key: str, task: str, answer: str, *fields: str) -> Turn:
        """A turn in one of the wordings."""
        wordings, kept = WORDINGS[key]
        kept = kept if self.test else ()
        return phrase(
            rng,
            f"figure_{task}",
            [wording.format(*fields) for wording in wordings],
            answer,
            [wording.format(*fields) for wording in kept],
        )

    def readable(self, value: float) -> bool:
        """Whether a value can be read off exactly."""
        return self.figure.printed or (self.figure.kind not in ("pie", "stacked") and value in self.look.ticks)

    def extreme(self, values: Sequence[float], highest: bool) -> int | None:
        """The index of the largest or smallest value, if it is clearly so."""
        order = sorted(range(len(values)), key=values.__getitem__, reverse=highest)
        gap = abs(values[order[0]] - values[order[1]]) if len(order) > 1 else 0.0
        return order[0] if gap > 0 and gap >= self.clear else None

    def value(self, rng: random.Random) -> Turn | None:
        figure = self.figure
        if figure.kind == "scatter":
            return None
        row, column = rng.randrange(len(figure.values)), rng.randrange(len(figure.labels))
        value, label = figure.values[row][column], figure.labels[column]
        if not self.readable(value):
            return None
        if figure.names:
            return self.ask(rng, "value_at", "value", written(value), label, figure.names[row])
        return self.ask(rng, "value_bin" if figure.kind == "histogram" else "value", "value", written(value), label)

    def find_value(self, rng: random.Random) -> Turn | None:
        figure = self.figure
        if figure.kind in ("scatter", "histogram"):
            return None
        row, column = rng.randrange(len(figure.values)), rng.randrange(len(figure.labels))
        value, label = figure.values[row][column], figure.labels[column]
        if not self.readable(value) or figure.values[row].count(value) > 1:
            return None
        if figure.names:
            return self.ask(rng, "find_value_of", "find_value", label, written(value), figure.names[row])
        return self.ask(rng, "find_value", "find_value", label, written(value))

    def _extreme(self, rng: random.Random, highest: bool) -> Turn | None:
        figure, key = self.figure, "maximum" if highest else "minimum"
        if figure.kind == "scatter":
            return None
        place: int | None
        if figure.names and rng.random() < 0.75:
            if rng.random() < 0.5:
                row = rng.randrange(len(figure.names))
                place = self.extreme(figure.values[row], highest)
                answer = "" if place is None else figure.labels[place]
                return self.ask(rng, f"{key}_of", key, answer, figure.names[row]) if answer else None
            column = rng.randrange(len(figure.labels))
            place = self.extreme([row[column] for row in figure.values], highest)
            return (
                None if place is None else self.ask(rng, f"{key}_in", key, figure.names[place], figure.labels[column])
            )
        every = [value for row in figure.values for value in row]
        if figure.kind != "stacked" and rng.random() < 0.25:
            value = max(every) if highest else min(every)
            return self.ask(rng, f"{key}_value", key, written(value)) if self.readable(value) else None
        if figure.names and figure.kind != "stacked":
            return None
        place = self.extreme(figure.totals, highest)
        return None if place is None else self.ask(rng, key, key, figure.labels[place])

    def maximum(self, rng: random.Random) -> Turn | None:
        return self._extreme(rng, True)

    def minimum(self, rng: random.Random) -> Turn | None:
        return self._extreme(rng, False)

    def compare(self, rng: random.Random) -> Turn | None:
        figure = self.figure
        nouns: tuple[str, ...]
        values: tuple[float, ...]
        if figure.kind == "scatter":
            if not figure.names:
                return None
            nouns, values, where = figure.names, tuple(map(len, figure.points)), ""
        elif figure.names and (figure.kind != "stacked" or rng.random() < 0.5):
            column = rng.randrange(len(figure.labels))
            nouns, values = figure.names, tuple(row[column] for row in figure.values)
            where = figure.labels[column]
        else:
            nouns, values, where = figure.labels, figure.totals, ""
        low, high = sorted(rng.sample(range(len(nouns)), 2), key=values.__getitem__)
        if values[high] - values[low] <= self.clear:
            return None
        truth = rng.random() < 0.5
        first, second = (nouns[high], nouns[low]) if truth else (nouns[low], nouns[high])
        if figure.kind == "scatter":
            return self.ask(rng, "more_points", "compare", yes_no(truth), first, second)
        kind = "_in" if where else ""
        if rng.random() < 0.4:
            return self.ask(rng, f"which_larger{kind}", "compare", nouns[high], first, second, where)
        return self.ask(rng, f"is_larger{kind}", "compare", yes_no(truth), first, second, where)

    def count(self, rng: random.Random) -> Turn | None:
        figure = self.figure
        if figure.kind == "scatter":
            if figure.names and rng.random() < 0.6:
                row = rng.randrange(len(figure.names))
                return self.ask(rng, "count", "count", str(len(figure.points[row])), f"points of {figure.names[row]}")
            return self.ask(rng, "count", "count", str(sum(map(len, figure.points))), "points")
        if figure.names and figure.kind != "lines" and rng.random() < 0.5:
            return self.ask(rng, "count", "count", str(len(figure.names)), "names in the legend")
        if figure.kind == "line" and not self.look.markers:
            return None
        noun = {"line": "points", "lines": "lines", "pie": "slices"}.get(figure.kind, "bars")
        number = {"lines": len(figure.names), "grouped": len(figure.names) * len(figure.labels)}
        return self.ask(rng, "count", "count", str(number.get(figure.kind, len(figure.labels))), noun)

    def trend(self, rng: random.Random) -> Turn | None:
        figure = self.figure
        if figure.kind == "scatter":
            row = rng.randrange(len(figure.points))
            points = figure.points[row] if len(figure.points) == 1 else sum(figure.points, ())
            up = _correlation(points)
            if abs(up) < 0.75:
                return None
            return self.ask(rng, "trend_are", "trend", "up" if up > 0 else "down", "the points")
        if figure.kind not in ("line", "lines"):
            return None
        row = rng.randrange(len(figure.values))
        steps = [after - before for before, after in zip(figure.values[row], figure.values[row][1:], strict=False)]
        if not (min(steps) > 0 or max(steps) < 0):
            return None
        noun = f"the line of {figure.names[row]}" if figure.names else "the line"
        return self.ask(rng, "trend", "trend", "up" if steps[0] > 0 else "down", noun)

    def kind(self, rng: random.Random) -> Turn:
        if self.figure.kind in ("vertical", "horizontal") and rng.random() < 0.4:
            return self.ask(rng, "direction", "kind", self.figure.kind)
        if self.figure.kind in ("grouped", "stacked") and rng.random() < 0.5:
            return self.ask(rng, "stacking", "kind", self.figure.kind)
        return self.ask(rng, "kind", "kind", KIND_NAMES[self.figure.kind])

    def title(self, rng: random.Random) -> Turn | None:
        return self.ask(rng, "title", "title", self.figure.title) if self.figure.title else None

    def axis(self, rng: random.Random) -> Turn | None:
        axis, label = rng.choice(list(self.figure.axis_labels.items()))
        return self.ask(rng, "axis", "axis", label, axis) if label else None

    def colour(self, rng: random.Random) -> Turn | None:
        kind, colours = self.figure.kind, self.look.colours
        if len(colours) == 1 and kind != "pie":
            if not colours[0]:
                return None
            if kind == "line":
                return self.ask(rng, "colour", "colour", colours[0], "the line")
            return self.ask(rng, "colour_are", "colour", colours[0], "the bars" if kind in BARS else "the points")
        if not self.coloured:
            return None
        index = rng.randrange(len(self.coloured))
        colour, name = colours[index], self.coloured[index]
        if not colour:
            return None
        if rng.random() < 0.5:
            return self.ask(rng, "find_colour", "colour", name, colour)
        noun = f"the line of {name}" if kind == "lines" and rng.random() < 0.5 else name
        return self.ask(rng, "colour", "colour", colour, noun)

    def absent(self, rng: random.Random) -> Turn | None:
        """A question of the others' wording about what is not there."""
        makers = [self._absent_title, self._absent_axis, self._absent_noun, self._absent_value, self._absent_colour]
        rng.shuffle(makers)
        for make in makers:
            turn = make(rng)
            if turn is not None:
                return turn
        return None

    def _absent_title(self, rng: random.Random) -> Turn | None:
        return None if self.figure.title else self.ask(rng, "title", "absent", NONE)

    def _absent_axis(self, rng: random.Random) -> Turn | None:
        bare = [axis for axis, label in self.figure.axis_labels.items() if not label]
        if not bare or self.figure.kind == "pie":
            return None
        return self.ask(rng, "axis", "absent", NONE, rng.choice(bare))

    def _any_readable(self) -> bool:
        return any(self.readable(value) for row in self.figure.values for value in row)

    def _absent_noun(self, rng: random.Random) -> Turn | None:
        """The value of a category or series that is not there."""
        figure = self.figure
        if not self._any_readable():
            return None
        if figure.names:
            label, name = rng.choice(figure.labels), rng.choice(figure.names)
            if figure.others and rng.random() < 0.5:
                label = rng.choice(figure.others)
            elif figure.other_names:
                name = rng.choice(figure.other_names)
            else:
                return None
            return self.ask(rng, "value_at", "absent", NONE, label, name)
        if not figure.others:
            return None
        key = "value_bin" if figure.kind == "histogram" else "value"
        return self.ask(rng, key, "absent", NONE, rng.choice(figure.others))

    def _absent_colour(self, rng: random.Random) -> Turn | None:
        if not self.coloured or not all(self.look.colours):
            return None
        if rng.random() < 0.5:
            free = [word for word in COLOUR_WORDS if word not in self.look.colours]
            return self.ask(rng, "find_colour", "absent", NONE, rng.choice(free))
        others = self.figure.other_names if self.figure.names else self.figure.others
        if not others:
            return None
        name = rng.choice(others)
        noun = f"the line of {name}" if self.figure.kind == "lines" and rng.random() < 0.5 else name
        return self.ask(rng, "colour", "absent", NONE, noun)

    def _absent_value(self, rng: random.Random) -> Turn | None:
        """Which one has a value that none has."""
        figure = self.figure
        if figure.kind in ("scatter", "histogram") or not self._any_readable():
            return None
        row = rng.randrange(len(figure.values))
        free = [tick for tick in sorted(self.look.ticks) if 0 < tick <= max(figure.values[row])]
        if figure.printed:
            free = [value + change for value in figure.values[row] for change in (-10, -5, -2, -1, 1, 2, 5, 10)]
        free = [value for value in free if value > 0 and value not in figure.values[row]]
        if not free:
            return None
        value = written(round(rng.choice(free), 1))
        if figure.names:
            return self.ask(rng, "find_value_of", "absent", NONE, value, figure.names[row])
        return self.ask(rng, "find_value", "absent", NONE, value)


def _correlation(points: Sequence[tuple[int, int]]) -> float:
    middle_x, middle_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    both = sum((x - middle_x) * (y - middle_y) for x, y in points)
    scale = sum((x - middle_x) ** 2 for x, _ in points) * sum((y - middle_y) ** 2 for _, y in points)
    return both / scale**0.5 if scale else 0.0


def ask_about(rng: random.Random, figure: Figure, look: Look, test: bool, turns: int) -> list[Turn]:
    """Up to `turns` questions."""
    ask = FigureQuestions(figure, look, test)
    makers: list[tuple[float, TurnMaker]] = [
        (2.5, ask.value), (1.0, ask.find_value), (1.0, ask.maximum), (1.0, ask.minimum), (1.5, ask.compare),
        (2.2, ask.trend), (1.0, ask.title), (0.9, ask.axis), (0.6, ask.count), (0.35, ask.kind), (1.2, ask.colour),
        (0.75, ask.absent),
    ]  # fmt: skip
    return choose_turns(rng, makers, turns)


FIGURE_TASKS = (
    "figure_value", "figure_find_value", "figure_maximum", "figure_minimum", "figure_compare", "figure_trend",
    "figure_title", "figure_axis", "figure_count", "figure_kind", "figure_colour", "figure_absent",
)  # fmt: skip

_CAPTION_WORDS = "titled x y axis points to"
_ANSWER_WORDS = "yes no up down none vertical horizontal grouped stacked"
_NOUNS = "the bars bar line lines of points slices names in legend"


def _question_words() -> dict[str, None]:
    wordings = [wording for pair in WORDINGS.values() for wordings in pair for wording in wordings]
    texts = [*wordings, _CAPTION_WORDS, _ANSWER_WORDS, _NOUNS, *KIND_NAMES.values()]
    words = "".join(letter if letter.isalpha() else " " for letter in " ".join(texts)).split()
    return dict.fromkeys([*words, *COLOUR_WORDS])


# of questions, closed answers and captions, but for what is read off a figure
FIGURE_WORDS: tuple[str, ...] = tuple(_question_words())

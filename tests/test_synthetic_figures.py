"""Figures of other programs: the same for a seed, true in their answers, with nothing of the test in training."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from flashsloth.synthetic import figures, gnuplot_figures
from flashsloth.synthetic.figure_facts import KIND_NAMES, KIND_WEIGHTS, Figure, choose_figure, written
from flashsloth.synthetic.figure_questions import COLOUR_WORDS, FIGURE_TASKS, FIGURE_WORDS, WORDINGS, Look, ask_about
from flashsloth.synthetic.figures import render_figure
from flashsloth.synthetic.gnuplot_figures import render_gnuplot_figure
from flashsloth.synthetic.sample import Sample, Turn
from flashsloth.synthetic.words import HELD_OUT

pytest.importorskip("matplotlib")
needs_gnuplot = pytest.mark.skipif(shutil.which("gnuplot") is None, reason="gnuplot is not installed")
ROUNDS = 600


def _asked(seed: int, test: bool) -> tuple[Figure, Look, list[Turn]]:
    """Facts and questions without a drawing; some values lie between the ticks."""
    rng = random.Random(f"{seed}/{test}")
    figure = choose_figure(rng, test)
    count = len(figure.labels) if figure.kind == "pie" else max(1, len(figure.names))
    ticks = frozenset(figure.step * unit * rng.choice((1, 2)) for unit in range(14))
    look = Look(tuple(rng.sample(COLOUR_WORDS, count)), ticks if figure.step else frozenset())
    return figure, look, ask_about(rng, figure, look, test, 6)


@pytest.fixture(scope="module")
def asked() -> dict[bool, list[tuple[Figure, Look, list[Turn]]]]:
    return {test: [_asked(seed, test) for seed in range(ROUNDS)] for test in (False, True)}


@pytest.fixture(scope="module")
def drawn() -> list[Sample]:
    return [render_figure(random.Random(seed), seed % 2 == 1, 288, 6) for seed in range(12)]


def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """(pattern, key of WORDINGS), those with the most words of their own first."""
    wordings = [(wording, key) for key, pair in WORDINGS.items() for wordings in pair for wording in wordings]
    wordings.sort(key=lambda item: -len(re.sub(r"\{\d\}", "", item[0])))
    return [(re.compile(re.sub(r"\\{(\d)\\}", r"(?P<f\1>.+)", re.escape(text))), key) for text, key in wordings]


PATTERNS = _patterns()


def _template(question: str) -> tuple[str, tuple[str, ...]]:
    """(key of WORDINGS, what is filled in, in the order of the numbers)"""
    for pattern, key in PATTERNS:
        match = pattern.fullmatch(question)
        if match:
            return key, tuple(text for _, text in sorted(match.groupdict().items()))
    raise AssertionError(question)


def _expected(figure: Figure, look: Look, key: str, fields: tuple[str, ...]) -> str:
    """The answer by a way of its own: from a table (series, category) -> value."""
    rows = figure.names or ("",)
    table = {
        (row, label): value
        for row, values in zip(rows, figure.values, strict=False)
        for label, value in zip(figure.labels, values, strict=True)
    }
    sums: dict[str, float] = defaultdict(float)
    for (_, label), value in table.items():
        sums[label] += value
    pick: Callable[..., str] = max if key.startswith("maximum") else min
    nouns = dict(zip(figure.names or figure.labels, look.colours, strict=False))
    if key in ("value", "value_bin"):
        return written(table["", fields[0]]) if ("", fields[0]) in table else "none"
    if key == "value_at":
        return written(table[fields[1], fields[0]]) if (fields[1], fields[0]) in table else "none"
    if key in ("find_value", "find_value_of"):
        row = fields[1] if key == "find_value_of" else ""
        found = [label for (name, label), value in table.items() if name == row and written(value) == fields[0]]
        return found[0] if found else "none"
    if key in ("maximum", "minimum"):
        return pick(sums, key=sums.__getitem__)
    if key in ("maximum_in", "minimum_in"):
        return pick(figure.names, key=lambda name: table[name, fields[0]])
    if key in ("maximum_of", "minimum_of"):
        return pick(figure.labels, key=lambda label: table[fields[0], label])
    if key in ("maximum_value", "minimum_value"):
        return written(float(pick(table.values())))  # type: ignore[arg-type]
    if key.startswith(("is_larger", "which_larger")):
        values = [table[noun, fields[2]] if key.endswith("_in") else sums[noun] for noun in fields[:2]]
        if key.startswith("is"):
            return "yes" if values[0] > values[1] else "no"
        return fields[0] if values[0] > values[1] else fields[1]
    if key == "more_points":
        numbers = [len(figure.points[figure.names.index(name)]) for name in fields]
        return "yes" if numbers[0] > numbers[1] else "no"
    if key == "title":
        return figure.title or "none"
    if key == "axis":
        return figure.axis_labels[fields[0]] or "none"
    if key in ("colour", "colour_are"):
        single = fields[0] in ("the line", "the bars", "the points")
        return look.colours[0] if single else nouns.get(fields[0].removeprefix("the line of "), "none")
    if key == "find_colour":
        return {colour: noun for noun, colour in nouns.items()}.get(fields[0], "none")
    if key == "kind":
        return KIND_NAMES[figure.kind]
    if key in ("direction", "stacking"):
        return figure.kind
    if key.startswith("trend") and figure.points:
        x, y = np.array([point for group in figure.points for point in group]).T
        return "up" if np.corrcoef(x, y)[0, 1] > 0 else "down"
    if key.startswith("trend"):
        values = figure.values[figure.names.index(fields[0].removeprefix("the line of ")) if figure.names else 0]
        return "up" if values[-1] > values[0] else "down"
    assert key == "count"
    if fields[0].startswith("points of "):
        return str(len(figure.points[figure.names.index(fields[0].removeprefix("points of "))]))
    counts = {
        "names in the legend": len(figure.names),
        "lines": len(figure.names),
        "points": sum(map(len, figure.points)) or len(figure.labels),
        "bars": len(sums) if figure.kind == "stacked" else len(table),
        "slices": len(table),
    }
    return str(counts[fields[0]])


@pytest.mark.parametrize("test", [False, True])
def test_answers_are_those_of_the_facts(test: bool, asked: dict[bool, list[tuple[Figure, Look, list[Turn]]]]) -> None:
    for figure, look, turns in asked[test]:
        for turn in turns:
            key, fields = _template(turn.question)
            assert turn.answer == _expected(figure, look, key, fields), (figure, turn)
            assert (turn.answer == "none") == (turn.task == "figure_absent")
            assert turn.answer == turn.answer.lower() and 1 <= len(turn.answer.split()) <= 3


def test_tasks_are_all_asked_and_answers_are_balanced(
    asked: dict[bool, list[tuple[Figure, Look, list[Turn]]]],
) -> None:
    turns = [turn for _, _, some in asked[False] for turn in some]
    tasks, answers = Counter(turn.task for turn in turns), Counter(turn.answer for turn in turns)
    assert set(tasks) == set(FIGURE_TASKS)
    assert min(tasks.values()) > 0.02 * len(turns)
    assert abs(answers["yes"] - answers["no"]) < 4 * (answers["yes"] + answers["no"]) ** 0.5
    assert 0.06 < tasks["figure_absent"] / len(turns) < 0.11
    # the words of a question do not tell that something is not there
    keys: dict[str, Counter[bool]] = defaultdict(Counter)
    for turn in turns:
        keys[_template(turn.question)[0]][turn.answer == "none"] += 1
    assert all(counts[False] > counts[True] for counts in keys.values())
    assert {figure.kind for figure, _, _ in asked[False]} == set(KIND_WEIGHTS)


def test_training_shows_nothing_that_is_held_out(asked: dict[bool, list[tuple[Figure, Look, list[Turn]]]]) -> None:
    kept = {key: pair[1] for key, pair in WORDINGS.items()}
    assert all(kept.values()) and not any(set(pair[0]) & set(pair[1]) for pair in WORDINGS.values())
    for figure, _, turns in asked[False]:
        assert not figure.held_out and not any(turn.kept_wording for turn in turns)
        texts = [*figure.others, *figure.other_names, *(turn.question for turn in turns)]
        assert not HELD_OUT & {word.strip("?.,") for text in texts for word in text.split()}
    held_out = sum(figure.held_out for figure, _, _ in asked[True])
    assert 0.25 < held_out / ROUNDS < 0.6
    assert 0.3 < np.mean([turn.kept_wording for _, _, turns in asked[True] for turn in turns]) < 0.7


def test_words_of_questions_are_listed(asked: dict[bool, list[tuple[Figure, Look, list[Turn]]]]) -> None:
    assert {"none", "vertical", "legend", "histogram"} <= set(FIGURE_WORDS)
    for key, pair in WORDINGS.items():
        for wording in (*pair[0], *pair[1]):
            assert set(re.findall("[a-z]+", wording)) <= set(FIGURE_WORDS), key


def test_a_seed_gives_the_same_figure(drawn: list[Sample]) -> None:
    again = render_figure(random.Random(3), True, 288, 6)
    assert again.image.tobytes() == drawn[3].image.tobytes()
    assert (again.caption, again.turns, again.glyphs) == (drawn[3].caption, drawn[3].turns, drawn[3].glyphs)
    assert len({sample.image.tobytes() for sample in drawn}) == len(drawn)
    assert all(max(sample.image.size) == 288 and min(sample.image.size) >= 144 for sample in drawn)
    assert all(len(sample.turns) >= 3 and len(sample.caption.split()) <= 40 for sample in drawn)


def test_characters_stand_where_they_are_said_to_be(drawn: list[Sample]) -> None:
    for sample in drawn:
        grey = np.asarray(sample.image.convert("L")).astype(int)
        text = "".join(glyph.character for glyph in sample.glyphs).lower()
        titles = re.search(r"titled (.*?)\.", sample.caption)
        assert not titles or titles[1].replace(" ", "") in text
        inked = 0
        for glyph in sample.glyphs:
            assert 0 < glyph.x < sample.image.width and 0 < glyph.y < sample.image.height
            x, y = round(glyph.x), round(glyph.y)
            place = grey[max(0, y - 4) : y + 5, max(0, x - 3) : x + 4]
            inked += place.max() - place.min() > 50
        assert inked > 0.95 * len(sample.glyphs)


BARS = Figure("vertical", ("a", "b", "c"), (), ((1, 4, 2),), 1, False, "", "", "")


def _heights(image: np.ndarray, colour: tuple[int, int, int]) -> list[int]:
    """Largest heights in pixels of the bars of a colour, from left to right."""
    near = np.abs(image.astype(int) - colour).sum(axis=2) < 60
    heights = near.sum(axis=0)
    edges = np.flatnonzero(np.diff((heights > 5).astype(int)))
    return [int(heights[start + 1 : end + 1].max()) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _assert_in_proportion(heights: list[int]) -> None:
    assert len(heights) == 3
    assert np.allclose(np.array(heights) / max(heights), [0.25, 1, 0.5], atol=0.04)


def test_bars_of_matplotlib_are_as_high_as_their_values() -> None:
    setting = figures._Setting("default", (4.0, 3.0), 10, "DejaVu Sans", str.lower, str.lower)
    for seed in range(30):
        image, look, _ = figures._draw(BARS, setting, random.Random(seed), 288)
        if look.colours == ("blue",) and (31, 119, 180) in {colour for _, colour in image.getcolors(99999)}:
            _assert_in_proportion(_heights(np.asarray(image), (31, 119, 180)))
            return
    raise AssertionError("no seed draws blue bars")


def test_training_with_gnuplot_is_refused() -> None:
    with pytest.raises(ValueError, match="kept for the split 'test'"):
        render_gnuplot_figure(random.Random(0), False, 288, 6)


def test_a_missing_gnuplot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gnuplot_figures.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="apt-get install gnuplot"):
        render_gnuplot_figure(random.Random(0), True, 288, 6)


@needs_gnuplot
def test_gnuplot_draws_the_same_for_a_seed() -> None:
    kinds = set()
    for seed in range(14):
        sample = render_gnuplot_figure(random.Random(seed), True, 288, 6)
        kinds.add(sample.caption.split(".")[0].split(" titled")[0])
        assert max(sample.image.size) == 288 and len(sample.turns) >= 3
        assert sample.family == "gnuplot_figures" and {turn.task for turn in sample.turns} <= set(FIGURE_TASKS)
    again = render_gnuplot_figure(random.Random(13), True, 288, 6)
    assert again.image.tobytes() == sample.image.tobytes() and again.turns == sample.turns
    assert len(kinds) >= 3


@needs_gnuplot
def test_bars_of_gnuplot_are_as_high_as_their_values() -> None:
    script = gnuplot_figures._Script(BARS, random.Random(0), ("#0000ff",), str.lower)
    script.lines.append('set terminal pngcairo size 288,216 font "DejaVu Sans,8"')
    script.categories("x", False)
    script.values("y")
    gnuplot_figures._bars(script)
    image = gnuplot_figures.run_gnuplot("\n".join([*script.lines, f"plot {', '.join(script.plots)}", ""]))
    _assert_in_proportion(_heights(np.asarray(image), (0, 0, 255)))

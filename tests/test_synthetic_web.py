"""Drawn web pages and printed tables: the same for a seed, true in what they ask, apart between the splits."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest

from flashsloth.synthetic import office, web_browser
from flashsloth.synthetic.office import OFFICE_TASKS, render_office
from flashsloth.synthetic.sample import Sample, Turn, choose_turns, make_generator
from flashsloth.synthetic.web import KINDS, WEB_TASKS, WEB_WORDS, render_web
from flashsloth.synthetic.web_facts import EMPTY, KEPT, Form, Menu, Priced, Table, kept_for_test
from flashsloth.synthetic.web_questions import NONE, WORDINGS, question_makers
from flashsloth.synthetic.web_themes import FONTS, HELD_OUT_FONTS, HELD_OUT_THEMES, THEMES, choose_look

DRAWS = 15
PAGES = 1500


@pytest.fixture
def chromium() -> None:
    pytest.importorskip("playwright")
    if web_browser.find_program() is None:
        pytest.skip("no Chromium is installed")


@pytest.fixture
def printer() -> None:
    pytest.importorskip("reportlab")
    pytest.importorskip("pypdfium2")


@lru_cache(maxsize=2)
def _asked(test: bool) -> list[tuple[object, list[Turn]]]:
    """Pages that are not drawn, with their questions."""
    asked = []
    kinds = list(KINDS.values())
    for seed in range(PAGES):
        rng = random.Random(f"{test}/{seed}")
        facts = rng.choices(kinds, [weight for weight, _ in kinds])[0][1](rng, test)
        asked.append((facts, choose_turns(rng, question_makers(rng, facts, "web", test), 6)))
    return asked


def _glyph_text(sample: Sample) -> str:
    return "".join(glyph.character for glyph in sample.glyphs).lower()


def _check_drawn(samples: list[Sample]) -> None:
    for sample in samples:
        width, height = sample.image.size
        assert max(width, height) == 288 and min(width, height) >= 144
        inside = [-10 <= glyph.x <= width + 10 and -10 <= glyph.y <= height + 10 for glyph in sample.glyphs]
        assert sample.glyphs and all(inside)
        assert len(sample.image.convert("L").getcolors(256) or range(257)) > 2
        written = _glyph_text(sample)
        for turn in sample.turns:
            if turn.task.split("_")[1] in ("price", "cell", "item", "title", "entry", "field", "line", "highlighted"):
                answer = turn.answer.replace(" ", "")
                assert answer in written or answer == EMPTY, turn


@pytest.mark.usefixtures("chromium")
def test_a_seed_gives_the_same_page() -> None:
    first, again, other = (render_web(make_generator("train", 1, seed), False, 288, 6) for seed in (5, 5, 6))
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.caption, first.turns, first.glyphs) == (again.caption, again.turns, again.glyphs)
    assert (first.image.size, first.caption) != (other.image.size, other.caption)


@pytest.mark.usefixtures("chromium")
@pytest.mark.parametrize("test", [False, True])
def test_pages_show_what_is_answered(test: bool) -> None:
    samples = [render_web(make_generator("train", 2, seed), test, 288, 8) for seed in range(DRAWS)]
    _check_drawn(samples)
    assert any(sample.held_out for sample in samples) == test


@pytest.mark.usefixtures("chromium")
def test_characters_stand_on_their_places() -> None:
    browser = web_browser.open_browser()
    html = "<head><style>*{margin:0}</style></head><body><div id=page style='font:20px monospace'>ab c</div></body>"
    shot = browser.show(html, 288, 0, 2.0, 0, 0)
    assert [glyph.character for glyph in shot.glyphs] == ["a", "b", "c"]
    dark = browser.photograph(shot).convert("L").point(lambda level: 255 * (level < 128))
    for glyph in shot.glyphs:
        box = tuple(round(edge) for edge in (glyph.x - 10, glyph.y - 20, glyph.x + 10, glyph.y + 20))
        left, _, right, _ = dark.crop(box).getbbox()
        assert abs((left + right) / 2 - 10) < 4


@pytest.mark.usefixtures("printer")
def test_printed_tables_show_what_is_answered() -> None:
    samples = [render_office(make_generator("test", 3, seed), True, 288, 8) for seed in range(DRAWS)]
    _check_drawn(samples)
    assert {turn.task for sample in samples for turn in sample.turns} <= set(OFFICE_TASKS)
    again = render_office(make_generator("test", 3, 0), True, 288, 8)
    assert again.image.tobytes() == samples[0].image.tobytes() and again.turns == samples[0].turns


def test_printed_tables_are_not_for_training() -> None:
    with pytest.raises(ValueError, match="use split 'test'"):
        render_office(random.Random(0), False, 288, 6)


def _recomputed(facts: object, meaning: str) -> dict[str, Callable[[], str]]:
    """The answers to questions that start like this, from the facts and the words of the question alone."""
    words = meaning.rstrip("?.").split()
    if isinstance(facts, Priced):
        prices = dict(zip(facts.items, map(facts.written, facts.prices), strict=True))
        prices["total"] = facts.written(sum(facts.prices))
        items = {price: item for item, price in prices.items() if item != "total"}
        return {
            "how much is the": lambda: prices.get(words[-1], NONE),
            "what is the total": lambda: prices["total"],
            "how much are the": lambda: str(int(prices[words[4]]) + int(prices[words[7]])),
            "what costs": lambda: items.get(words[-1], NONE),
            "what is the cheapest": lambda: items[min(items, key=float)],
            "what is the most": lambda: items[max(items, key=float)],
        }
    if isinstance(facts, Table):
        rows = {
            row: dict(zip(facts.columns, line, strict=True)) for row, line in zip(facts.rows, facts.cells, strict=True)
        }
        return {
            "which row has the largest": lambda: max(rows, key=lambda row: int(rows[row][words[-1]])),
            "which row has the smallest": lambda: min(rows, key=lambda row: int(rows[row][words[-1]])),
            "what is the title": lambda: facts.title or NONE,
            "what is the": lambda: rows.get(words[-1], {}).get(words[3], NONE),
        }
    if isinstance(facts, Form):
        return {
            "what is in the field": lambda: dict(facts.fields).get(words[-1], NONE) or EMPTY,
            "is the box": lambda: "yes" if dict(facts.boxes)[" ".join(words[3:-1])] else "no",
            "how many boxes": lambda: str(sum(ticked for _, ticked in facts.boxes)),
        }
    if isinstance(facts, Menu):
        return {
            "which item is highlighted": lambda: facts.entries[facts.on],
            "how many entries": lambda: str(len(facts.entries)),
        }
    return {}


@pytest.mark.parametrize("test", [False, True])
def test_answers_follow_from_the_page(test: bool) -> None:
    checked: Counter[str] = Counter()
    for facts, turns in _asked(test):
        for turn in turns:
            meaning = turn.meaning or turn.question
            for start, answer in _recomputed(facts, meaning).items():
                if f"{meaning.rstrip('?.')} ".startswith(f"{start} "):
                    assert turn.answer == answer(), (turn, facts)
                    checked[start] += 1
                    break
    assert len(checked) == 15 and min(checked.values()) > 10


@pytest.mark.parametrize("test", [False, True])
def test_answers_are_short_and_fair(test: bool) -> None:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, turns in _asked(test):
        for turn in turns:
            counts[turn.task][turn.answer] += 1
            assert turn.answer == turn.answer.lower() and 1 <= len(turn.answer.split()) <= 3
            assert (turn.answer == NONE) == (turn.task == "web_absent")
            assert test or not turn.kept_wording
    assert set(counts) == set(WEB_TASKS)
    for task in ("web_button_is", "web_find", "web_ticked"):
        yes, no = counts[task]["yes"], counts[task]["no"]
        assert abs(yes - no) < 4 * (yes + no) ** 0.5
    total = sum(map(Counter.total, counts.values()))
    assert 0.06 < counts["web_absent"].total() / total < 0.12


def test_the_wording_does_not_tell_what_is_absent() -> None:
    """Every wording that is answered by none is answered by something at least as often."""
    answered: defaultdict[str, Counter[bool]] = defaultdict(Counter)
    for facts, turns in _asked(False):
        for turn in turns:
            shape = " ".join(turn.meaning.split()[:4])
            answered[f"{type(facts).__name__} {shape if 'costs' not in shape else 'what costs'}"][
                turn.answer == NONE
            ] += 1
    for shape, counts in answered.items():
        if counts.total() > 60:
            assert counts[True] < counts[False], shape


def test_held_out_words_fonts_and_themes_stay_out_of_training() -> None:
    for facts, turns in _asked(False):
        assert not kept_for_test(facts.caption())
        names = {word for turn in turns for word in re.findall("[a-z]+", f"{turn.question} {turn.answer}")}
        assert not (names - set(WEB_WORDS)) & KEPT
    assert 0.3 < sum(kept_for_test(facts.caption()) for facts, _ in _asked(True)) / PAGES < 0.8
    kept = [family for family, _ in HELD_OUT_FONTS]
    assert not {family for family, _ in FONTS} & set(kept) and not set(THEMES) & set(HELD_OUT_THEMES)
    looks = {test: [choose_look(random.Random(seed), test).css for seed in range(200)] for test in (False, True)}
    signs = [f"'{family}'" for family in kept] + list(HELD_OUT_THEMES.values())
    assert not any(sign in css for css in looks[False] for sign in signs)
    assert all(any(sign in css for css in looks[True]) for sign in signs)


def test_every_question_has_wordings_of_its_own() -> None:
    for key, (wordings, kept) in WORDINGS.items():
        assert len(set(wordings)) >= 3 and kept, key
        assert not set(wordings) & set(kept), key
        slots = {tuple(sorted(re.findall(r"{\d}", text))) for text in (*wordings, *kept)}
        assert len(slots) == 1, key


def test_a_missing_browser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright")
    monkeypatch.delenv(web_browser.PROGRAM_VARIABLE, raising=False)
    monkeypatch.setattr(web_browser.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="apt-get install chromium"):
        web_browser.Browser()


@pytest.mark.parametrize("module", [web_browser, office])
def test_drawing_programs_are_imported_when_they_draw(module: ModuleType) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    names = [node.names[0].name for node in tree.body if isinstance(node, ast.Import)]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] in ("playwright", "reportlab", "pypdfium2")]

"""The check of maps: what it masks, what it counts, and that a map which tells the truth is found to."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashsloth.evaluate import faithfulness
from flashsloth.evaluate.faithfulness import (
    FAMILIES,
    FRACTIONS,
    QUESTION,
    SAME,
    Asked,
    Checked,
    FaithfulnessCheck,
    closeness_to_centre,
    covered,
    is_on,
    masked,
    questions,
    share_of_places,
    total_variation,
)
from flashsloth.evaluate.faithfulness_report import area, mean_with_interval, plot, read_rows, summarize, write_rows
from flashsloth.inference import load
from flashsloth.synthetic.sample import Box, Turn
from flashsloth_cli.main import main
from tiny_session import noise_image, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def session(folder):
    return load(folder, device="cpu")


def test_masked_cells_have_the_mean_colour():
    picture = noise_image(0, (30, 20))
    mask = np.zeros((4, 6), dtype=bool)
    mask[1, 2] = True
    before, after = np.asarray(picture).astype(int), np.asarray(masked(picture, mask)).astype(int)
    changed = (before != after).any(axis=-1)
    inside = np.zeros_like(changed)
    inside[5:10, 10:15] = True
    assert not changed[~inside].any()
    assert np.abs(after[inside] - before.mean(axis=(0, 1))).max() <= 0.5
    assert np.asarray(masked(picture, ~np.zeros((4, 6), dtype=bool))).std(axis=(0, 1)).max() == 0


def test_probability_is_that_of_confidence(session):
    """Of the whole image it is what the session says of its own answer; of others it is not."""
    picture = noise_image(3)
    answer = session.ask(picture, "what is it?", max_new_tokens=4)
    explanation = session.explain(picture, "what is it?", max_new_tokens=4)
    assert explanation.answer == answer.text
    check = FaithfulnessCheck(session, batch_size=2)
    pictures = [picture, noise_image(4), noise_image(5)]
    found = check.probabilities(pictures, "what is it?", answer.text)
    assert found[0] == pytest.approx(explanation.probability, rel=1e-3)
    for other, probability in zip(pictures, found, strict=True):
        again = session.explain(other, "what is it?", answer=answer.text)
        assert probability == pytest.approx(again.probability, rel=1e-3)
    assert len(set(found)) == 3


def test_curves_begin_and_end_with_the_same_images(session):
    (asked,) = [Asked(0, noise_image(6, (24, 24)), "scenes", Turn("task", "what?", "x", boxes=(Box(4, 4, 12, 12),)))]
    check = FaithfulnessCheck(session)
    (row,) = check.run([asked], max_new_tokens=3)
    assert set(row.deletion) == set(row.insertion) == {"embq", "sap", "decoder", "centre", "random"}
    for name in row.deletion:
        assert len(row.deletion[name]) == len(row.insertion[name]) == len(FRACTIONS)
        assert row.deletion[name][0] == row.insertion[name][-1] == pytest.approx(row.probability, rel=1e-3)
        assert row.deletion[name][-1] == row.insertion[name][0]
    # by hand: the most attended twentieth of 36 cells masked
    explanation = session.explain(asked.picture, "what?", max_new_tokens=3)
    order = np.argsort(-explanation.over_image("embq"), axis=None, kind="stable")
    mask = np.zeros((6, 6), dtype=bool)
    mask.flat[order[: round(FRACTIONS[1] * 36)]] = True
    for picture_mask, found in ((mask, row.deletion), (~mask, row.insertion)):
        (expected,) = check.probabilities([masked(asked.picture, picture_mask)], "what?", explanation.answer)
        assert found["embq"][1] == pytest.approx(expected, rel=1e-4)
    assert row.moves["embq"] == {SAME: 0.0}
    assert check.run([asked], max_new_tokens=3) == [row]  # the random order, too, is the same again


def test_a_map_of_what_matters_beats_its_baselines(session, monkeypatch):
    """Where one cell decides the answer, the order that has it first falls at once, and that which has it last not."""
    check = FaithfulnessCheck(session)
    decisive = (2, 3)

    def probabilities(pictures, question, answer):
        return [float(np.asarray(picture)[20:22, 31:33].max() == 255) for picture in pictures]

    monkeypatch.setattr(check, "probabilities", probabilities)
    picture = Image.new("RGB", (60, 60))
    picture.paste((255, 255, 255), (30, 20, 40, 30))
    explanation = session.explain(picture, "what?", max_new_tokens=1)
    right = np.zeros((6, 6))
    right[decisive] = 1
    wrong = 1 - right
    orders = {name: np.argsort(-values, axis=None) for name, values in (("right", right), ("wrong", wrong))}
    deletion, insertion = check._curves(picture, explanation, orders)
    assert deletion["right"] == [1.0, *[0.0] * (len(FRACTIONS) - 1)]
    assert insertion["right"] == [0.0, *[1.0] * (len(FRACTIONS) - 1)]
    assert area(deletion["right"]) < 0.05 < 0.75 < area(deletion["wrong"])
    assert area(insertion["right"]) > 0.95 > 0.25 > area(insertion["wrong"])


def test_places_on_boxes():
    boxes, size = [Box(10, 10, 20, 30), Box(15, 10, 30, 20)], (60, 60)
    assert is_on((0.25, 0.4), boxes, size, (0, 0)) and not is_on((0.4, 0.4), boxes, size, (0, 0))
    assert is_on((0.4, 0.4), boxes, size, (12, 12))  # within half a cell of one
    assert covered(boxes, size, (6, 6)).sum() * 100 == pytest.approx(300, abs=15)  # the overlap counts once
    assert share_of_places((6, 6), boxes, size, (0, 0)) == 3 / 36
    closeness = closeness_to_centre((6, 4), (40, 60))
    assert np.unravel_index(closeness.argmax(), (6, 4)) in [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert closeness[2, 0] < closeness[2, 1] and closeness[0, 1] < closeness[1, 1]


def test_distance_of_maps():
    first = np.array([[3.0, 1.0]])
    assert total_variation(first, 2 * first) == 0
    assert total_variation(np.array([[1.0, 0.0]]), np.array([[0.0, 5.0]])) == 1
    assert total_variation(first, np.array([[1.0, 3.0]])) == 0.5


def test_questions_have_boxes_and_take_turns():
    images = questions(FAMILIES, 12, 0, 96)
    assert [asked[0].family for asked in images[:6]] == [*FAMILIES, *FAMILIES]
    assert sum(map(len, images)) >= 12
    for number, asked in enumerate(images):
        assert all(each.image == number and each.turn.boxes for each in asked)
        assert len({each.turn.question for each in asked}) == len(asked) <= 2
    longer = questions(FAMILIES, 14, 0, 96)
    assert [each.turn for asked in longer[: len(images)] for each in asked] == [
        each.turn for asked in images for each in asked
    ]
    with pytest.raises(ValueError, match="do not tell where things are"):
        questions(["pages"], 1, 0, 96)


def row_of(image, value, family="scenes"):
    curve = [value] * len(FRACTIONS)
    return Checked(
        image, family, "task", value > 0.5, value,
        deletion={"embq": curve, "random": [0.5] * len(FRACTIONS)},
        insertion={"embq": curve, "random": [0.5] * len(FRACTIONS)},
        hits={"embq": value, "random": 0.1},
        shares={"embq": value, "random": 0.1},
        moves={"embq": {SAME: 0.0} | ({QUESTION: value} if image else {})},
    )  # fmt: skip


def test_summary():
    rows = [row_of(0, 0.2), row_of(0, 0.4), row_of(1, 0.9, "charts")]
    summary = summarize(rows, {"model": "m"})
    assert (
        summary["questions"] == 3 and summary["images"] == 2 and summary["accuracy"] == pytest.approx(1 / 3, abs=1e-4)
    )
    whole = summary["groups"]["all"]
    assert whole["deletion_area"]["embq"]["mean"] == whole["pointing"]["embq"]["mean"] == 0.5
    assert whole["deletion_against_random"]["embq"]["mean"] == 0
    assert whole["moves"]["embq"][QUESTION] == {"mean": 0.9, "low": 0.9, "high": 0.9, "n": 1}
    assert summary["groups"]["charts"]["pointing"]["embq"]["mean"] == 0.9
    assert summary["groups"]["answered rightly"]["questions"] == 1
    assert area([1, 1, 1, 1, 1, 1, 0]) == pytest.approx(0.8)


def test_interval_counts_images_not_questions():
    """Ten questions about one image are no ten independent ones."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=40)
    alone = mean_with_interval(values.tolist(), list(range(40)))
    together = mean_with_interval(np.repeat(values, 10).tolist(), np.repeat(np.arange(40), 10).tolist())
    assert alone["mean"] == together["mean"]
    assert together["high"] - together["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.15)
    expected = 2 * 1.96 * values.std() / 40**0.5
    assert alone["high"] - alone["low"] == pytest.approx(expected, rel=0.15)


def test_rows_are_read_again(tmp_path):
    path, settings = tmp_path / "rows.jsonl", {"model": "m", "seed": 0}
    assert read_rows(path, settings) == []
    rows = [row_of(0, 0.2), row_of(1, 0.9)]
    write_rows(path, settings, rows)
    assert read_rows(path, settings) == rows
    path.write_text(path.read_text()[:-30])  # interrupted while it wrote
    assert read_rows(path, settings) == rows[:1]
    with pytest.raises(ValueError, match="other settings"):
        read_rows(path, {"model": "other"})
    path.write_text("no json")
    with pytest.raises(ValueError, match="no file of rows"):
        read_rows(path, settings)


def test_command_goes_on_where_it_was(folder, tmp_path, monkeypatch, capsys):
    names = [tmp_path / name for name in ("rows.jsonl", "out.json", "out.png")]
    command = ["explain-check", str(folder), "--family", "scenes", "--rows", str(names[0])]
    report = ["--json", str(names[1]), "--plot", str(names[2])]
    assert main([*command, "--count", "2"]) == 0
    calls = []
    run = FaithfulnessCheck.run
    monkeypatch.setattr(FaithfulnessCheck, "run", lambda *args: calls.append(1) or run(*args))
    assert main([*command, "--count", "4", *report]) == 0
    assert len(calls) == len(questions(["scenes"], 4, 0, 144)) - len(questions(["scenes"], 2, 0, 144))
    found = json.loads(names[1].read_text())
    assert found["questions"] >= 4 and found["groups"]["all"]["moves"]["embq"][SAME]["mean"] == 0
    assert Image.open(names[2]).width > 500
    assert "How far maps move" in capsys.readouterr().out

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(faithfulness.FaithfulnessCheck, "run", interrupt)
    assert main([*command, "--count", "8"]) == 130
    assert "goes on after" in capsys.readouterr().err
    plot(found, names[2])


def test_the_page_shows_what_the_report_holds():
    path = Path(__file__).parents[1] / "scripts" / "explain_tables.py"
    spec = importlib.util.spec_from_file_location("explain_tables", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.BETWEEN.search(script.PAGE.read_text())
    assert found and found[0] == script.tables(json.loads(script.REPORT.read_text())), (
        "run python scripts/explain_tables.py"
    )

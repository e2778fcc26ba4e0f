"""What a report says about its rows, and how two runs are compared; without lmms-eval."""

from __future__ import annotations

import pytest

from flashsloth.evaluate.benchmarks import PAPER, PUBLISHED_MODELS, SUITES, chosen
from flashsloth.evaluate.bootstrap import compare
from flashsloth.evaluate.response_cache import Response, ResponseCache
from flashsloth.evaluate.verdicts import ABOVE, BELOW, DONE, NOT_JUDGED, REPRODUCED, published_model, verdict
from flashsloth.inference.batches import Record
from tiny_session import noise_image

ROW = {
    "status": DONE, "published": 70.0, "tolerance": 1.0, "score": 70.0, "limit": None, "variant": "", "control": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"score": 69.0}, REPRODUCED),
        ({"score": 71.1}, ABOVE),
        ({"score": 68.9}, BELOW),
        ({"limit": 100}, "part of the set"),
        ({"variant": "dtype=float16"}, "a variant"),
        ({"published": None}, "nothing published"),
        ({"status": NOT_JUDGED, "score": None}, NOT_JUDGED),
    ],
)
def test_a_verdict_is_given_for_whole_sets_of_the_model_only(changed, said):
    assert verdict(ROW | changed) == said


def test_the_published_row_is_that_of_as_many_visual_tokens():
    assert [published_model(tokens, PUBLISHED_MODELS) for tokens in (81, 405, 16)] == [*PUBLISHED_MODELS, None]
    assert len(PAPER) == 14 and PAPER[0].published == {"FlashSloth": 86.3, "FlashSloth-HD": 87.2}


def test_tasks_are_found_by_name_and_title_and_asked_once():
    assert [row.task for row in chosen(None, ["POPE", "pope", "mm-vet"])] == ["pope", "mmvet"]
    assert chosen("nano", ["flashsloth_scenes"]) == list(SUITES["nano"])
    with pytest.raises(ValueError, match="unknown suite 'all'; there are paper, quick, nano"):
        chosen("all", [])


def samples(scores):
    return [
        {"id": number, "question": f"{number}?", "gold": "a", "score": score} for number, score in enumerate(scores)
    ]


def test_two_runs_are_compared_sample_by_sample():
    before = samples([1.0, 0.0] * 50)
    after = samples([1.0, 1.0] * 45 + [1.0, 0.0] * 4 + [0.0, 0.0])
    found = compare(before, after)
    assert (found.samples, found.mean) == (100, pytest.approx(44.0))
    assert len(found.gained) == 45 and found.lost == (98,)
    assert found.low < 44 < found.high and found.is_clear
    # a standard error of about five points, twice to either side
    assert 30 < found.low < 36 and 52 < found.high < 58
    same = compare(before, before)
    assert (same.mean, same.low, same.high, same.is_clear) == (0, 0, 0, False)


def test_runs_over_other_data_are_not_compared():
    with pytest.raises(ValueError, match="sample 0 is another question"):
        compare(samples([1.0]), [samples([1.0])[0] | {"gold": "b"}])
    with pytest.raises(ValueError, match="no scored sample in common"):
        compare(samples([1.0]), samples([None]))


def test_responses_are_found_by_what_was_asked(tmp_path):
    cache = ResponseCache(tmp_path, {"weights": "a"})
    record = Record("", (noise_image(0),), "what?")
    key = cache.key(record, {"max_new_tokens": 4})
    cache.add([(key, Response("a circle", 16, 0.5))])
    others = [
        cache.key(record, {"max_new_tokens": 5}),
        cache.key(Record("", (noise_image(1),), "what?"), {"max_new_tokens": 4}),
        cache.key(Record("", (), "what?"), {"max_new_tokens": 4}),
        cache.key(Record("", record.images, "who?"), {"max_new_tokens": 4}),
        ResponseCache(None, {"weights": "b"}).key(record, {"max_new_tokens": 4}),
    ]
    assert len({key, *others}) == 6
    again = ResponseCache(tmp_path, {"weights": "a"})
    assert again.get(again.key(Record("", (noise_image(0),), "what?"), {"max_new_tokens": 4})).text == "a circle"


def test_a_line_that_a_kill_cut_short_is_asked_again(tmp_path):
    cache = ResponseCache(tmp_path, {})
    cache.add([("one", Response("1", 0, 0.0)), ("two", Response("2", 0, 0.0))])
    path = tmp_path / "responses-0.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    again = ResponseCache(tmp_path, {})
    assert set(again.responses) == {"one"}
    again.add([("two", Response("2", 0, 0.0))])
    assert set(ResponseCache(tmp_path, {}).responses) == {"one", "two"}
    path.write_text("not json\n")
    with pytest.raises(ValueError, match="line 1 is no response; remove the file"):
        ResponseCache(tmp_path, {})

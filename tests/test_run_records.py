"""Inputs of a run: text as it is written, every file counted, one damaged record an error of that record."""

from __future__ import annotations

import csv
import datetime
import json
import logging
import os
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flashsloth.offline import Record, RunSettings, read_records, run_records
from flashsloth.offline.runner import _with_bytes
from flashsloth_cli.main import main


def write_csv(path: Path, ids: list[str], ends: str = "\n", encoding: str = "utf-8") -> Path:
    text = "".join(f"{row}{ends}" for row in ["id,image,question", *(f"{id_},a.png,what?" for id_ in ids)])
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "ids",
    [
        ["0012", "0013"],
        ["1e5", "2e5"],
        ["01", "1"],
        ["NA", "null", "true", "nan"],
        ["20240101000000000001", "1.0", "-0"],
    ],
)
def test_ids_of_csv_stay_as_they_are_written(tmp_path: Path, ids: list[str], ends: str, encoding: str) -> None:
    records = read_records(str(write_csv(tmp_path / "q.csv", ids, ends, encoding)))
    assert [record.id for record in records] == ids
    assert all(record.question == "what?" and record.images == (str(tmp_path / "a.png"),) for record in records)


def test_fields_of_csv_stay_as_they_are_written(tmp_path: Path) -> None:
    question = 'two\nlines, "quoted"\u2028and 12'
    with (tmp_path / "q.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "image", "question"], ["a", "data:image/png;base64," + "A" * 200_000, question]])
        writer.writerow(["b", "a.png", "12"])
    first, second = read_records(str(tmp_path / "q.csv"))
    assert first.question == question and len(first.images[0]) > 200_000
    assert second.question == "12"


def test_numbers_of_json_stay_as_they_are_written_and_null_is_no_id(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    ids = ["null", "7", "1e5", "1.0", "9" * 5000, '"0012"', '"3"', "null"]
    path.write_text("".join(f'{{"id": {id_}, "image": "a.png", "question": "what?"}}\n' for id_ in ids))
    found = [record.id for record in read_records(str(path))]
    assert found == ["0", "7", "1e5", "1.0", "9" * 5000, "0012", "3", "record 7"]
    path.write_text('{"id": true, "image": "a.png", "question": "what?"}\n')
    with pytest.raises(ValueError, match="record 0: an id is text or a number, not bool"):
        read_records(str(path))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\r"])
def test_lines_end_with_a_newline_only(tmp_path: Path, suffix: str, separator: str) -> None:
    row = {"image": "a.png", "question": f"what{separator}is it?"}
    text = json.dumps([row] if suffix == ".json" else row, ensure_ascii=False)
    path = tmp_path / f"q{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert [record.question for record in read_records(str(path))] == [row["question"]]


def test_what_was_written_with_odd_texts_is_read_again(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    texts = ["what\u2028is it?", "what \ud83d is it?", "nul \0 in it", "line\nbreak\x85"]
    path = tmp_path / "q.json"
    rows = [{"id": text, "image": "a.png", "question": text} for text in texts]
    path.write_text(json.dumps([*rows, {"id": "gone", "image": "gone\0\ud83d.png", "question": "x?"}]))
    settings = RunSettings(device="cpu", batch_size=4, workers=0, streams=1, max_new_tokens=2)
    for skipped, again in ((0, False), (5, False), (4, True)):
        options = RunSettings(**{**vars(settings), "retry_errors": again})
        summary = run_records(read_records(str(path)), tmp_path / "o.jsonl", options)
        assert (summary.skipped, summary.failed) == (skipped, 0 if skipped == 5 else 1)
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_bytes().decode("utf-8").split("\n")[:-1]]
    assert sorted(row["id"] for row in written) == sorted([*texts, "gone"])
    assert all(row["question"] == row["id"] for row in written if "answer" in row)


def test_names_that_are_no_utf_8_are_asked_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    try:
        Image.new("RGB", (40, 40)).save(os.fsencode(folder) + b"/caf\xe9.png", "PNG")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    settings = RunSettings(device="cpu", workers=0, streams=1, max_new_tokens=2)
    for skipped in (0, 1):
        summary = run_records(read_records(str(folder), "what?"), tmp_path / "o.jsonl", settings)
        assert (summary.skipped, summary.failed) == (skipped, 0)
    assert json.loads((tmp_path / "o.jsonl").read_bytes())["id"] == "caf\udce9.png"


def test_a_folder_is_searched_through_links_and_tells_what_it_passes_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "photos"
    for name in ("disk/sub", "photos/own"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "disk/sub/a.png")
    Image.new("RGB", (8, 8)).save(folder / "own/b.PNG")
    (folder / "more").symlink_to(tmp_path / "disk", target_is_directory=True)
    (folder / "own/back").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("IMG_1.HEIC", "IMG_2.heic", "notes"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic")
    os.mkfifo(folder / "pipe.png")
    with caplog.at_level(logging.WARNING):
        assert [record.id for record in read_records(str(folder), "what?")] == ["more/sub/a.png", "own/b.PNG"]
    (message,) = [record.getMessage() for record in caplog.records]
    for part in ("2 files ending in .heic", "1 files without", "2 links to nothing, pipes", "1 links to a folder"):
        assert part in message


def test_a_link_renames_nothing_that_is_found_without_it(tmp_path: Path) -> None:
    (tmp_path / "z/deep").mkdir(parents=True)
    for name in ("z/a.png", "z/deep/b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = [record.id for record in read_records(str(tmp_path), "what?")]
    (tmp_path / "a link before z").symlink_to(tmp_path / "z", target_is_directory=True)
    (tmp_path / "a link up").symlink_to(tmp_path, target_is_directory=True)
    assert [record.id for record in read_records(str(tmp_path), "what?")] == before == ["z/a.png", "z/deep/b.png"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Q.JSONL", '{"id": "ä", "image": "a.png", "question": "what?", "score": NaN}\r\n'),
        ("Q.Json", '[{"id": "ä", "image": "a.png", "question": "what?"}]'),
        ("Q.CSV", "\r\nid,image,question\r\nä,a.png,what?\r\n"),
    ],
)
def test_byte_order_marks_and_capital_endings_change_nothing(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_records(str(tmp_path / name)) == [Record("ä", (str(tmp_path / "a.png"),), "what?")]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([1.0, None], ["1.0", "1"]), ([2**62, 7], [str(2**62), "7"]), ([datetime.date(2020, 1, 2)], ["2020-01-02"])],
)
def test_ids_of_a_dataset_are_text_whatever_their_type(tmp_path: Path, ids: list, expected: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"id": ids, "image": ["a.png"] * len(ids), "question": ["what?"] * len(ids)}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "q.PARQUET")
    assert [record.id for record in read_records(str(tmp_path / "q.PARQUET"))] == expected


def test_columns_that_are_not_asked_about_are_not_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "image": datasets.Image(), "question": datasets.Value("string"), "mask": datasets.Image()
    })  # fmt: skip
    damaged = {"bytes": b"no picture", "path": None}
    rows = {"image": [damaged], "question": ["what?"], "mask": [damaged]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "q.parquet")
    assert read_records(str(tmp_path / "q.parquet")) == [Record("0", (b"no picture",), "what?")]


def test_damaged_pictures_of_a_dataset_are_errors_of_their_records(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    good, bad = (tmp_path / "a.png").read_bytes(), (tmp_path / "a.png").read_bytes()[:60]
    images = [[{"bytes": content, "path": None}] for content in (good, bad, good)]
    features = datasets.Features({
        "id": datasets.Value("string"), "images": datasets.List(datasets.Image()), "question": datasets.Value("string")
    })  # fmt: skip
    rows = {"id": ["001", "NA", "3"], "images": images, "question": ["what?"] * 3}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "q.parquet")
    records = read_records(str(tmp_path / "q.parquet"))
    assert [record.images for record in records] == [(good,), (bad,), (good,)]
    settings = RunSettings(device="cpu", workers=0, streams=1, max_new_tokens=2)
    assert run_records(records, tmp_path / "o.jsonl", settings).failed == 1
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["id"] for row in lines if "error" in row] == ["NA"]


@pytest.mark.parametrize(
    "image", ["data:image/png;base64," + "A" * 9000, "DATA:,x", "https://a/b.png", "a\0b", "x" * 9000]
)
def test_what_is_no_file_goes_to_a_cluster_as_it_is(image: str) -> None:
    assert _with_bytes(Record("1", (image,), "what?")).images == (image,)


def test_files_go_to_a_cluster_by_content_however_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a file.png"
    path.write_bytes(b"content")
    assert _with_bytes(Record("1", (str(path), path, path.as_uri()), "what?")).images == (b"content",) * 3


BROKEN = {
    "no object.jsonl": b"[1]",
    "deep.json": b"[" * 100_000,
    "deep.jsonl": b'{"a":' * 100_000,
    "not utf-8.jsonl": b'{"question": "\xff"}',
    "no text.csv": b"\xff\xfe\0\0",
    "quote.csv": b'id,image,question\n"1,a.png,x?\n',
    "wide.csv": b"id,image,question\n1,a.png,x?,more\n",
    "narrow.csv": b"id,image,question\n1\n",
    "twice.csv": b"id,image,image,question\n1,a.png,b.png,x\n",
    "nul.csv": b"id,image\0,question\n1,a.png,x\n",
    "empty.csv": b"",
    "empty.json": b"",
    "number.json": b"3",
    "id.json": b'[{"id": [1], "image": "a", "question": "x"}]',
    "image.json": b'[{"image": {"path": 3}, "question": "x"}]',
    "list.json": b'[{"image": [[["a"]]], "question": "x"}]',
    "broken.parquet": b"PAR1 but no more",
    "broken.arrow": b"ARROW1",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_inputs_are_refused_in_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    assert main(["run", str(tmp_path / name), "-o", str(tmp_path / "o.jsonl")]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and name in error and len(error) < 3000
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ""])
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"q{suffix}")
    with pytest.raises(ValueError, match="regular file|no file"):
        read_records(str(tmp_path / f"q{suffix}"))


VALID = {
    ".json": b'[{"id": "1", "image": "a.png", "question": "what?"}, {"id": 2, "images": ["a", "b"], "question": "x"}]',
    ".jsonl": b'{"id": "1", "image": "a.png", "question": "what?"}\n{"id": 2, "images": ["a"], "question": "x"}\n',
    ".csv": b'id,image,question\n1,a.png,"what, then?"\n0012,b.png,x\n',
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(sorted(VALID)),
    cuts=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 4), st.binary(max_size=3)), max_size=4),
)
def test_mutated_inputs_give_records_or_one_error(tmp_path: Path, suffix: str, cuts: list) -> None:
    content = VALID[suffix]
    for place, length, new in cuts:
        content = content[:place] + new + content[place + length :]
    path = tmp_path / f"q{suffix}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            records = read_records(str(path), "asked of all?")
        except ValueError as error:
            assert path.name in str(error)
        else:
            assert len({record.id for record in records}) == len(records) > 0
            assert all(isinstance(record.id, str) and record.images for record in records)

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from flashsloth import inference
from flashsloth.inference.batches import answer, plan_batches, prepare
from flashsloth.offline import Record, RunSettings, read_records, run_records, runner
from flashsloth.offline.output import AnswerFile
from flashsloth.offline.records import input_of
from flashsloth_cli.main import main

QUESTIONS = (
    "what is it?",
    "how many circles are there?",
    "is there a red square in the picture?",
    "what colour is it?",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(6):
        Image.new("RGB", (40 + 9 * index, 50), (40 * index, 90, 200 - 30 * index)).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def asked(pictures) -> Path:
    """Eighteen records, several questions an image; two of them are broken."""
    rows = [{"id": f"q{index}", "image": f"{index % 6}.png", "question": QUESTIONS[index % 4]} for index in range(16)]
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    rows += [{"id": "broken", "image": "broken.png", "question": "what is it?"}]
    rows += [{"id": "missing", "images": ["0.png", "nowhere.png"], "question": "what is it?"}]
    path = pictures / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows), "a record is doubled"
    return {row["id"]: row for row in rows}


def test_batches_give_the_answers_of_single_questions_and_name_what_fails(asked, tmp_path):
    records = read_records(str(asked))
    seen = []
    settings = RunSettings(device="cpu", batch_size=5, workers=0, max_new_tokens=6)
    summary = run_records(records, tmp_path / "out.jsonl", settings, lambda done, total: seen.append((done, total)))
    rows = lines(tmp_path / "out.jsonl")
    assert (summary.answered, summary.failed, summary.skipped) == (16, 2, 0)
    assert seen[-1] == (18, 18) and len(seen) == 4
    session = inference.load("nano", device="cpu")
    for record in records[:16]:
        single = session.ask(list(record.images), record.question, max_new_tokens=6).text
        expected = {"id": record.id, "question": record.question, "answer": single, "input": input_of(record)}
        assert rows[record.id] == expected
    assert "broken.png" in rows["broken"]["error"] and "nowhere.png" in rows["missing"]["error"]


def test_options_of_a_session_reach_the_run(asked, tmp_path, capsys):
    records = [record for record in read_records(str(asked)) if record.id.startswith("q")][:6]
    plain = RunSettings(device="cpu", batch_size=3, workers=0, max_new_tokens=3)
    run_records(records, tmp_path / "plain.jsonl", plain)
    run_records(records, tmp_path / "shared.jsonl", dataclasses.replace(plain, share_equal_views=True))
    assert lines(tmp_path / "shared.jsonl") == lines(tmp_path / "plain.jsonl")
    quantized = dataclasses.replace(plain, quantization="int8-dynamic-cpu")
    run_records(records, tmp_path / "int8.jsonl", quantized)
    session = inference.load("nano", device="cpu", quantization="int8-dynamic-cpu")
    batch = answer(session, prepare(records[:3], session.processor, 500), 3)
    found = lines(tmp_path / "int8.jsonl")
    assert [{**found[row["id"]], "input": None} for row in batch] == [{**row, "input": None} for row in batch]
    with pytest.raises(ValueError, match="begun with quantization=None, now it is 'int8-dynamic-cpu'"):
        run_records(records, tmp_path / "plain.jsonl", quantized)


def test_worker_processes_change_nothing(asked, tmp_path):
    records = read_records(str(asked))
    for workers in (0, 2):
        settings = RunSettings(device="cpu", batch_size=4, workers=workers, max_new_tokens=4)
        run_records(records, tmp_path / f"{workers}.jsonl", settings)
    assert lines(tmp_path / "0.jsonl") == lines(tmp_path / "2.jsonl")


@pytest.mark.parametrize(("threads", "streams", "expected"), [(2, None, 0), (2, 1, 1), (1, None, 0), (8, None, 1)])
def test_a_worker_is_started_where_a_thread_is_left(asked, tmp_path, monkeypatch, threads, streams, expected):
    class Enough(Exception):
        pass

    def loader(*args, num_workers, **kwargs):
        raise Enough(num_workers)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(runner, "DataLoader", loader)
    with pytest.raises(Enough) as found:
        run_records(read_records(str(asked)), tmp_path / "a.jsonl", RunSettings(device="cpu", streams=streams))
    assert found.value.args == (expected,)


def test_a_run_on_a_cpu_keeps_freed_memory_once_the_model_is_packed(asked, tmp_path, monkeypatch):
    calls = []
    load = runner.load
    monkeypatch.setattr(runner, "load", lambda *args, **options: (load(*args, **options), calls.append("loaded"))[0])
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: calls.append("kept"))
    settings = RunSettings(device="cpu", batch_size=8, workers=0, max_new_tokens=2)
    run_records(read_records(str(asked)), tmp_path / "a.jsonl", settings)
    assert calls == ["loaded", "kept"]


def test_batches_side_by_side_change_nothing_but_their_order(asked, tmp_path):
    records, threads = read_records(str(asked)), torch.get_num_threads()
    found, together = [], set()
    others = set(threading.enumerate())  # what earlier tests have left

    def seen(done: int, total: int) -> None:
        started = set(threading.enumerate()) - others
        together.add(sum(thread.name.startswith("ThreadPoolExecutor") for thread in started))

    for streams in (1, 3):
        settings = RunSettings(device="cpu", batch_size=2, workers=0, streams=streams, max_new_tokens=6)
        run_records(records, tmp_path / f"{streams}.jsonl", settings, seen)
        found.append(lines(tmp_path / f"{streams}.jsonl"))
    assert found[0] == found[1] and together == {0, 3}
    assert torch.get_num_threads() == threads


def test_an_error_in_one_of_several_batches_stops_the_run(asked, tmp_path, monkeypatch):
    def fail(session, batch, new_tokens, form):
        if any(record.id == "q3" for record in batch.records):
            raise RuntimeError("no memory left")
        return answer(session, batch, new_tokens, form)

    monkeypatch.setattr(runner, "answer", fail)
    threads, settings = torch.get_num_threads(), RunSettings(device="cpu", batch_size=2, workers=0, streams=2)
    with pytest.raises(RuntimeError, match="no memory left"):
        run_records(read_records(str(asked)), tmp_path / "out.jsonl", settings)
    output = tmp_path / "out.jsonl"  # not there where the batch that fails was the first to end
    assert not output.exists() or "q3" not in lines(output)
    assert torch.get_num_threads() == threads
    monkeypatch.undo()
    run_records(read_records(str(asked)), tmp_path / "out.jsonl", settings)
    assert len(lines(tmp_path / "out.jsonl")) == 18


def test_a_picture_is_encoded_once_a_batch(pictures):
    session = inference.load("nano", device="cpu")
    shared = [Record(str(i), (str(pictures / "1.png"),), question) for i, question in enumerate(QUESTIONS)]
    batch = prepare([*shared, Record("other", (str(pictures / "2.png"),), "what is it?")], session.processor, 500)
    assert batch.pixel_values is not None and batch.pixel_values.shape[0] == 2
    assert batch.image_index == [0, 0, 0, 0, 1]
    assert len(answer(session, batch, 3)) == 5


def test_a_failing_record_takes_no_picture_of_its_neighbours(pictures):
    processor = inference.load("nano", device="cpu").processor
    good, bad = str(pictures / "3.png"), str(pictures / "absent.png")
    batch = prepare([Record("a", (good, bad), "what?"), Record("b", (good,), "what?")], processor, 500)
    assert [record.id for record in batch.records] == ["b"] and batch.image_index == [0]
    assert batch.pixel_values is not None and batch.pixel_values.shape[0] == 1
    batch = prepare([Record("a", (good,), "what? " * 400), Record("b", (good,), "what?")], processor, 100)
    assert "100" in batch.errors[0][1] and [record.id for record in batch.records] == ["b"]


def test_too_large_a_batch_is_asked_row_by_row(pictures, monkeypatch, caplog):
    import torch

    session = inference.load("nano", device="cpu")
    records = [Record(str(i), (str(pictures / f"{i}.png"),), QUESTIONS[i]) for i in range(3)]
    batch = prepare(records, session.processor, 500)
    expected = answer(session, batch, 4)
    generate = type(session.model).generate

    def limited(self, **inputs):
        if inputs["input_ids"].shape[0] > 1:
            raise torch.OutOfMemoryError("no room")
        return generate(self, **inputs)

    monkeypatch.setattr(type(session.model), "generate", limited)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    assert answer(session, batch, 4) == expected
    assert "row by row" in caplog.text


def test_batches_hold_prompts_of_like_length():
    records = [Record(str(i), ("x",) * (1 + i % 2), "w" * (1 + i * 7 % 40)) for i in range(64)]
    batches = plan_batches(records, 8)
    assert sorted(index for batch in batches for index in batch) == list(range(64))
    for batch in batches:
        assert len({len(records[index].images) for index in batch}) == 1
        lengths = [len(records[index].question) for index in batch]
        assert max(lengths) - min(lengths) <= 12


def test_a_killed_run_goes_on_without_losing_or_doubling(asked, tmp_path):
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "flashsloth_cli", "run", str(asked), "-o", str(output), "--batch-size", "1"]
    command += ["--workers", "0", "--device", "cpu", "--max-new-tokens", "4"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (output.exists() and output.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes()
    assert 3 <= before.count(b"\n") < 18
    with output.open("ab") as file:
        file.write(b'{"id": "q1')  # a kill in the middle of a line
    settings = RunSettings(device="cpu", batch_size=1, workers=0, max_new_tokens=4)
    summary = run_records(read_records(str(asked)), output, settings)
    assert summary.skipped == before.count(b"\n") and len(lines(output)) == 18
    whole = tmp_path / "whole.jsonl"
    run_records(read_records(str(asked)), whole, settings)
    assert lines(whole) == lines(output)


def test_errors_can_be_asked_again(asked, pictures, tmp_path):
    settings = RunSettings(device="cpu", batch_size=8, workers=0, max_new_tokens=3)
    run_records(read_records(str(asked)), tmp_path / "out.jsonl", settings)
    try:
        Image.new("RGB", (30, 30)).save(pictures / "nowhere.png")
        again = RunSettings(device="cpu", batch_size=8, workers=0, max_new_tokens=3, retry_errors=True)
        summary = run_records(read_records(str(asked)), tmp_path / "out.jsonl", again)
    finally:
        (pictures / "nowhere.png").unlink()
    assert (summary.answered, summary.failed, summary.skipped) == (1, 1, 16)
    assert "answer" in lines(tmp_path / "out.jsonl")["missing"]


def test_one_file_never_mixes_two_settings(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, {"model": "nano"}) as answers:
        answers.add([{"id": "1", "answer": "a"}])
    with pytest.raises(ValueError, match="begun with model='nano'"):
        AnswerFile(path, {"model": "other"})
    (tmp_path / "other.jsonl").write_text("text\n")
    with pytest.raises(ValueError, match="choose another output file"):
        AnswerFile(tmp_path / "other.jsonl", {"model": "nano"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a.png"}', "record 0 has no question"),
        ('{"question": "what?"}', "record 0 has no image"),
        (
            '{"id": 1, "image": "a.png", "question": "q"}\n{"id": 1, "image": "b.png", "question": "q"}',
            "'1' comes twice",
        ),
        ("{oops", "line 1 is not valid JSON"),
        ("[1]", "record 0 is not a mapping"),
        ('{"image": 3, "question": "q"}', "not a number"),
        ("", "nothing to ask"),
    ],
)
def test_bad_inputs_name_file_and_record(tmp_path, text, message):
    path = tmp_path / "asked.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_records(str(path))
    assert "asked.jsonl" in str(error.value)


def test_folders_parquet_and_the_command_line(pictures, tmp_path, capsys):
    records = read_records(str(pictures), "what is it?")
    assert [record.id for record in records if record.id != "broken.png"] == [f"{i}.png" for i in range(6)]
    with pytest.raises(ValueError, match="--question"):
        read_records(str(pictures))

    datasets = pytest.importorskip("datasets")
    columns = {"image": [str(pictures / f"{i}.png") for i in range(3)], "question": list(QUESTIONS[:3])}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "asked.parquet")
    output = tmp_path / "out.jsonl"
    command = ["run", str(tmp_path / "asked.parquet"), "-o", str(output), "--workers", "0", "--device", "cpu"]
    assert main([*command, "--max-new-tokens", "3"]) == 0
    assert "3 answered, 0 failed" in capsys.readouterr().err
    assert set(lines(output)) == {"0", "1", "2"}
    assert main(["run", str(tmp_path / "nothing.jsonl"), "-o", str(output)]) == 2
    assert "nothing.jsonl" in capsys.readouterr().err


def test_streams_on_ray_are_refused():
    with pytest.raises(ValueError, match="streams 2 contradicts ray_workers 3.*leave streams out"):
        RunSettings(streams=2, ray_workers=3)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_answers(asked, tmp_path):
    ray = pytest.importorskip("ray")
    records = read_records(str(asked))
    local = RunSettings(device="cpu", batch_size=4, workers=0, max_new_tokens=4)
    run_records(records, tmp_path / "local.jsonl", local)
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        cluster = RunSettings(device="cpu", batch_size=4, max_new_tokens=4, ray_workers=2)
        summary = run_records(records, tmp_path / "ray.jsonl", cluster)
    finally:
        ray.shutdown()
    assert (summary.answered, summary.failed) == (16, 2)
    alone, together = lines(tmp_path / "local.jsonl"), lines(tmp_path / "ray.jsonl")
    assert {key: row.get("answer") for key, row in alone.items()} == {
        key: row.get("answer") for key, row in together.items()
    }

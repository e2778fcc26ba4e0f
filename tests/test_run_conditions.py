"""A run goes on only where question, pictures and model are the same, alone, and whatever the disk does."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flashsloth.checkpoints.fingerprint import fingerprint
from flashsloth.hub import PACKAGED_MODELS
from flashsloth.offline import Record, RunSettings, read_records, run_records, runner
from flashsloth.offline.output import LOCK_SUFFIX, SETTINGS_SUFFIX, AnswerFile
from flashsloth.offline.records import input_of
from flashsloth_cli.main import main

SETTINGS = RunSettings(device="cpu", batch_size=4, workers=0, streams=1, max_new_tokens=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "one" / "a.png"
    path.parent.mkdir()
    Image.new("RGB", (40, 40), (200, 0, 0)).save(path)
    return path


def answered(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def ask(source: Path, output: Path, *options: str) -> int:
    command = ["run", str(source), "-o", str(output), "--device", "cpu", "--workers", "0", "--max-new-tokens", "2"]
    return main([*command, *options])


@pytest.mark.parametrize(
    "change",
    ["the question", "another folder", "the content", "what a link points to"],
)
def test_an_answer_to_another_question_or_picture_is_never_taken_for_this_one(
    picture: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output, folder, question = tmp_path / "out.jsonl", picture.parent, "what is it?"
    if change == "what a link points to":
        folder = tmp_path / "linked"
        folder.symlink_to(picture.parent, target_is_directory=True)
    assert ask(folder, output, "-q", question) == 0
    before = answered(output)
    if change == "the question":
        question = "how many circles are there?"
    elif change == "another folder":
        folder = tmp_path / "two"
        shutil.copytree(picture.parent, folder)
    elif change == "the content":
        Image.new("RGB", (40, 40), (0, 0, 200)).save(picture)
        os.utime(picture, ns=(1, 1))
    else:
        folder.unlink()
        shutil.copytree(picture.parent, tmp_path / "three")
        Image.new("RGB", (50, 40), (0, 0, 200)).save(tmp_path / "three" / "a.png")
        folder.symlink_to(tmp_path / "three", target_is_directory=True)
    assert ask(folder, output, "-q", question) == 2
    message = capsys.readouterr().err
    assert "another question or image under the id 'a.png'" in message and "--retry-changed" in message
    assert answered(output) == before
    assert ask(folder, output, "-q", question, "--retry-changed") == 0
    (row,) = answered(output)
    assert row["question"] == question and row["input"] != before[0]["input"]


def test_rows_may_be_added_and_put_in_another_order_but_not_moved_without_ids(picture: Path, tmp_path: Path) -> None:
    other = picture.with_name("b.png")
    Image.new("RGB", (44, 40)).save(other)
    rows = [{"id": name, "image": f"one/{name}", "question": "what is it?"} for name in ("a.png", "b.png")]
    asked, output = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"

    def write(rows: list[dict]) -> None:
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(rows[:1])
    run_records(read_records(str(asked)), output, SETTINGS)
    write([*reversed(rows)])
    assert run_records(read_records(str(asked)), output, SETTINGS).skipped == 1
    bare = [{key: value for key, value in row.items() if key != "id"} for row in rows]
    output = tmp_path / "bare.jsonl"
    write(bare[:1])
    run_records(read_records(str(asked)), output, SETTINGS)
    write(bare)
    assert run_records(read_records(str(asked)), output, SETTINGS).skipped == 1
    write([*reversed(bare)])
    with pytest.raises(ValueError, match="under the id '0' and 1 more"):
        run_records(read_records(str(asked)), output, SETTINGS)


def test_a_record_that_failed_is_asked_again_when_its_picture_has_come(picture: Path, tmp_path: Path) -> None:
    records = [Record("x", (str(tmp_path / "late.png"),), "what is it?")]
    assert run_records(records, tmp_path / "out.jsonl", SETTINGS).failed == 1
    assert run_records(records, tmp_path / "out.jsonl", SETTINGS).skipped == 1
    shutil.copy(picture, tmp_path / "late.png")
    assert run_records(records, tmp_path / "out.jsonl", SETTINGS).answered == 1


def test_pictures_in_memory_are_told_apart_by_their_content(picture: Path) -> None:
    image = Image.open(picture)
    kinds = [picture.read_bytes(), image, str(picture), "https://example.com/a.png", "HTTPS://example.com/a.png"]
    assert len({input_of(Record("x", (kind,), "what?")) for kind in kinds}) == len(kinds)
    assert input_of(Record("x", (image,), "what?")) == input_of(Record("y", (image.copy(),), "what?"))
    assert input_of(Record("x", (image,), "what?")) != input_of(Record("x", (image,) * 2, "what?"))
    assert input_of(Record("x", ("a\0b",), "half \ud83d"))


def test_a_damaged_picture_in_memory_is_an_error_of_its_record(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:-30])
    images = {"cut": Image.open(tmp_path / "cut.png"), "array": np.zeros((8, 8, 3), np.uint8), "path": picture}
    records = [Record(name, (image,), "what is it?") for name, image in images.items()]
    summary = run_records(records, tmp_path / "out.jsonl", SETTINGS)
    assert (summary.answered, summary.failed) == (2, 1)
    assert {row["id"] for row in answered(tmp_path / "out.jsonl") if "error" in row} == {"cut"}
    assert run_records(records, tmp_path / "out.jsonl", SETTINGS).skipped == 3


def test_a_file_is_the_same_by_its_address_and_another_once_it_has_changed(picture: Path) -> None:
    records = [Record("x", (name,), "what?") for name in (str(picture), picture, picture.as_uri())]
    before = {input_of(record) for record in records}
    assert len(before) == 1
    os.utime(picture, ns=(1, 1))
    assert before.isdisjoint(input_of(record) for record in records)


def test_a_picture_that_comes_during_a_run_is_the_one_that_was_answered(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = runner.load

    def late(*args, **options):
        shutil.copy(picture, tmp_path / "late.png")
        return load(*args, **options)

    monkeypatch.setattr(runner, "load", late)
    records = [Record("x", (str(tmp_path / "late.png"),), "what is it?")]
    assert run_records(records, tmp_path / "out.jsonl", SETTINGS).answered == 1
    assert run_records(records, tmp_path / "out.jsonl", SETTINGS).skipped == 1


def test_the_same_format_of_numbers_is_the_same_run_and_another_is_not(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, records = tmp_path / "out.jsonl", [Record("x", (str(picture),), "what is it?")]
    run_records(records, output, SETTINGS)
    assert run_records(records, output, dataclasses.replace(SETTINGS, dtype="float32")).skipped == 1
    monkeypatch.setattr(runner, "select_device", lambda _name: torch.device("cuda"))
    with pytest.raises(ValueError, match="begun with dtype='float32', now it is 'auto'"):
        run_records(records, output, SETTINGS)


def test_records_that_the_input_has_not_are_told_and_kept(
    picture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("x", "y"):
        run_records([Record(name, (str(picture),), "what is it?")], tmp_path / "out.jsonl", SETTINGS)
    assert "1 of the records in" in caplog.text
    assert [row["id"] for row in answered(tmp_path / "out.jsonl")] == ["x", "y"]


def test_a_linked_output_is_one_file(tmp_path: Path) -> None:
    link, output = tmp_path / "link.jsonl", tmp_path / "out.jsonl"
    link.symlink_to(output)
    with AnswerFile(link, {}) as answers:
        answers.add([{"id": "1", "error": "gone"}, {"id": "2", "answer": "a"}])
        with pytest.raises(ValueError, match="another run is writing"):
            AnswerFile(output, {})
        answers.forget(["1"])
    assert link.is_symlink() and [row["id"] for row in answered(output)] == ["2"]


def test_other_weights_or_another_vocabulary_are_another_model(picture: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(PACKAGED_MODELS["nano"], folder)
    assert fingerprint(folder) == fingerprint("nano")
    assert ask(picture.parent, output, "-q", "what is it?", "--model", str(folder)) == 0
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("projector.2.weight"))
    save_file({**weights, name: weights[name] * 0.5}, folder / "model.safetensors", {"format": "pt"})
    assert ask(picture.parent, output, "-q", "what is it?", "--model", str(folder)) == 2
    changed = fingerprint(folder)
    (folder / "chat_template.jinja").write_text("other")
    assert len({fingerprint("nano"), changed, fingerprint(folder)}) == 3


def test_a_file_of_an_earlier_version_is_refused_in_words(picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"id": "a.png", "question": "what is it?", "answer": "x"}\n')
    with pytest.raises(ValueError, match="out.jsonl.settings.json beside it does not"):
        run_records(read_records(str(picture.parent), "what is it?"), output, SETTINGS)
    (tmp_path / ("out.jsonl" + SETTINGS_SUFFIX)).write_text('{"model": "nano"}')
    with pytest.raises(ValueError, match="earlier version, which did not note .*weights"):
        run_records(read_records(str(picture.parent), "what is it?"), output, SETTINGS)


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with AnswerFile(output, {}) as answers:
        answers.add([{"id": "1", "answer": "a"}])
        with pytest.raises(ValueError, match="another run is writing"):
            AnswerFile(output, {})
        code = "import sys; from pathlib import Path; from flashsloth.offline.output import AnswerFile\n"
        code += "try: AnswerFile(Path(sys.argv[1]), {})\nexcept ValueError as error: print(error)"
        other = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True)
        assert "another run is writing" in other.stdout
        answers.add([{"id": "2", "answer": "b"}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl" + SETTINGS_SUFFIX]
    (tmp_path / ("out.jsonl" + LOCK_SUFFIX)).write_text("")  # left by a run that was killed
    with AnswerFile(output, {}) as answers:
        assert list(answers.done) == ["1", "2"]


@pytest.mark.parametrize("options", [["--model", "nona"], ["--device", "tpu7"], ["--dtype", "int3"]])
def test_a_refused_run_leaves_nothing_behind(picture: Path, tmp_path: Path, options: list[str]) -> None:
    output = tmp_path / "new" / "out.jsonl"
    assert ask(picture.parent, output, "-q", "what is it?", *options) == 2
    assert not output.parent.exists()
    assert ask(picture.parent, output, "-q", "what is it?") == 0


def test_a_run_killed_while_it_loads_binds_nobody(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.touch()
    (tmp_path / ("out.jsonl" + SETTINGS_SUFFIX)).write_text('{"model": "nona"}')
    with AnswerFile(output, {"model": "nano"}) as answers:
        answers.add([{"id": "1", "answer": "a"}])
    with pytest.raises(ValueError, match="begun with model='nano'"):
        AnswerFile(output, {"model": "nona"})


BATCHES = [
    [{"id": "1", "question": "what?", "answer": "a"}, {"id": "2", "error": "gone"}],
    [{"id": "3", "question": "what\u2028is?", "answer": "ä " * 9}, {"id": "\udce9.png", "answer": "half \ud83d"}],
    [{"id": "5", "answer": "last"}],
]


def write_until_the_disk_is_full(
    output: Path, resumed: Callable[[], contextlib.AbstractContextManager[object]]
) -> None:
    """Batches are added until one does not fit; then there is room again, and the file goes on with that one."""
    added: list[dict] = []
    with contextlib.suppress(OSError), AnswerFile(output, {}) as answers:
        for batch in BATCHES:
            answers.add(batch)
            added += batch
    with resumed():
        rows = answered(output) if output.exists() else []
        assert rows == added
        with AnswerFile(output, {}) as answers:
            for batch in BATCHES:
                if batch[0]["id"] not in answers.done:
                    answers.add(batch)
        assert answered(output) == [row for batch in BATCHES for row in batch]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes here")
def test_a_file_that_may_not_grow_stays_whole_at_every_byte(tmp_path: Path) -> None:
    import resource

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    @contextlib.contextmanager
    def no_limit() -> Iterator[None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        yield

    try:
        for size in range(3, 320):  # the settings take three bytes
            output = tmp_path / f"{size}.jsonl"
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            write_until_the_disk_is_full(output, no_limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_file_whole_at_every_byte(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        for left in range(1, 320, 3):
            output, ballast = disk / "out.jsonl", disk / "ballast"
            # the file has almost a page of an answer already, so that a page more is what the disk has not
            with AnswerFile(output, {}) as answers:
                line = {"id": "0", "answer": ""}
                filler = page - left - len(json.dumps(line)) - 1
                answers.add([{**line, "answer": "x" * filler}])
            assert output.stat().st_size == page - left
            with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * page)
            added = [json.loads(output.read_bytes())]
            with contextlib.suppress(OSError), AnswerFile(output, {}) as answers:
                for batch in BATCHES:
                    answers.add(batch)
                    added += batch
            assert answered(output) == added
            ballast.unlink()
            with AnswerFile(output, {}) as answers:
                answers.add([{"id": "more", "answer": ""}])
            output.unlink()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_errors_are_asked_again_on_a_full_disk_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with AnswerFile(tmp_path / "out.jsonl", {}) as answers:
        answers.add(BATCHES[0])
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            with pytest.raises(OSError, match="No space"):
                answers.forget(["2"])
        answers.add(BATCHES[1])
        answers.forget(["2", "3"])
        answers.add(BATCHES[2])
    assert [row["id"] for row in answered(tmp_path / "out.jsonl")] == ["1", "\udce9.png", "5"]


@pytest.mark.parametrize("streams", [1, 2])
def test_an_interrupted_run_says_how_to_go_on(
    picture: Path, tmp_path: Path, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [Record(str(index), (str(picture),), "what is it?") for index in range(6)]
    settings = RunSettings(device="cpu", batch_size=2, workers=0, streams=streams, max_new_tokens=2)
    calls = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="4 of 6 records are done; the same command goes on"):
        run_records(records, tmp_path / "out.jsonl", settings, interrupt)
    assert run_records(records, tmp_path / "out.jsonl", settings).skipped == 4

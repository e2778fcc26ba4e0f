"""A run that is killed, or runs out of disk, goes on as if nothing had happened."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.checkpoints.folder import size_of
from flashsloth.train.recipe import Recipe, load_recipe
from flashsloth.train.run import run
from flashsloth.train.trainer import StageTrainer
from mixed_recipe import write_mixed_recipe
from test_distributed import launch, launcher, needs_deepspeed

# Six steps an epoch, so that runs end and are killed in later epochs than the first. Dropout and shuffling are on, and
# samples are read by worker processes: every random number has to be where it was.
STEPS, EVERY = 14, 3
OVERRIDES = [
    "stages.mixed.gradient_accumulation=1",
    "model.config.compressor_dropout=0.3",
    f"checkpoints.every_steps={EVERY}",
    "checkpoints.keep=2",
    "loader.workers=1",
]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    return write_mixed_recipe(tmp_path_factory.mktemp("mixed"), STEPS)


def to(folder: Path, recipe_file: Path) -> list[str]:
    return [str(recipe_file), f"output_dir={folder}", *OVERRIDES]


def loaded(folder: Path, recipe_file: Path) -> Recipe:
    path, *overrides = to(folder, recipe_file)
    return load_recipe(path, overrides)


def curve(folder: Path) -> list[tuple]:
    """Step, loss, gradient norm and learning rate of every line of the log."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows]


def assert_same_run(folder: Path, other: Path) -> None:
    assert curve(folder) == curve(other)
    weights = (folder / "mixed" / "model" / "model.safetensors").read_bytes()
    assert weights == (other / "mixed" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(recipe_file) -> Path:
    folder = recipe_file.parent / "uninterrupted"
    run(loaded(folder, recipe_file))
    assert [step for step, *_ in curve(folder)] == list(range(1, STEPS + 1))
    # older checkpoints are gone, and the last step has one
    assert sorted(path.name for path in folder.glob("mixed/checkpoint-*")) == ["checkpoint-12", "checkpoint-14"]
    return folder


def kill_at(step: int, folder: Path, command: list[str]) -> None:
    """Start a command, and send SIGKILL to it and all processes below it when the log reaches a step."""
    log = folder / "log.jsonl"
    with tempfile.TemporaryFile() as output:  # not a pipe: nobody empties it
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < step):
                time.sleep(0.002)
            if process.poll() is not None:
                output.seek(0)
                pytest.fail(output.read().decode()[-2000:])
        finally:
            if process.poll() is None:
                # a launcher puts its workers in sessions of their own, where the signal of a group does not reach
                workers = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                for worker in workers:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()
                psutil.wait_procs(workers, timeout=30)
            process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_again_and_again(uninterrupted, recipe_file, tmp_path):
    """Before the first checkpoint, in the second epoch, and in the third."""
    command = [sys.executable, "-m", "flashsloth_cli", "train", *to(tmp_path / "run", recipe_file)]
    for step in (2, 8, 13):
        kill_at(step, tmp_path / "run", command)
        command = [*command[:4], "--resume", *to(tmp_path / "run", recipe_file)]
    assert not (tmp_path / "run" / "mixed" / "model").exists()
    run(loaded(tmp_path / "run", recipe_file), resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


# The process writes half of a file and kills itself, at the given call of torch.save.
DYING = """
import io, os, signal, sys
import torch
calls, save = iter(range({call})), torch.save
def dying_save(value, path, *args, **kwargs):
    if next(calls, None) is not None:
        return save(value, path, *args, **kwargs)
    buffer = io.BytesIO()
    save(value, buffer, *args, **kwargs)
    with open(path, "wb") as file:
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying_save
from flashsloth_cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", [5, 7])
def test_killed_while_writing_a_checkpoint(uninterrupted, recipe_file, tmp_path, call):
    """Arguments, optimiser, schedule and random state are four calls a checkpoint: the second is half written."""
    command = [sys.executable, "-c", DYING.format(call=call), "train", *to(tmp_path / "run", recipe_file)]
    killed = subprocess.run(command, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    stage = tmp_path / "run" / "mixed"
    assert [path.name for path in stage.glob("checkpoint-*")] == [f"checkpoint-{EVERY}"]
    assert (stage / "incomplete" / f"checkpoint-{2 * EVERY}").is_dir()
    run(loaded(tmp_path / "run", recipe_file), resume=True)
    assert not (stage / "incomplete").exists()
    assert_same_run(tmp_path / "run", uninterrupted)


def test_killed_between_the_last_step_and_the_model(uninterrupted, recipe_file, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageTrainer, "save_result", interrupted)
        run(loaded(tmp_path / "run", recipe_file))
    run(loaded(tmp_path / "run", recipe_file), resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_log_line_that_was_cut_is_written_again(uninterrupted, recipe_file, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "mixed" / "model")
    shutil.rmtree(tmp_path / "run" / "mixed" / f"checkpoint-{STEPS}")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text()[:-30])
    run(loaded(tmp_path / "run", recipe_file), resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.fixture
def small_disk(tmp_path, uninterrupted) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = int(1.5 * size_of(uninterrupted / "mixed" / f"checkpoint-{STEPS}"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system (needs root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk(small_disk, uninterrupted, recipe_file):
    folder = small_disk / "run"
    command = [sys.executable, "-m", "flashsloth_cli", "train", *to(folder, recipe_file)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and "the disk is full" in error and "--resume" in error
    assert [path.name for path in (folder / "mixed").iterdir()] == [f"checkpoint-{EVERY}"]
    last = folder / "mixed" / f"checkpoint-{EVERY}"
    assert {name for name, _ in FlashSlothForConditionalGeneration.from_pretrained(last).named_parameters()}
    subprocess.run(["mount", "-o", "remount,size=1g", str(small_disk)], check=True)
    run(loaded(folder, recipe_file), resume=True)
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchrun", "fsdp2", needs_deepspeed("zero2")])
def test_two_processes_killed(recipe_file, tmp_path, kind):
    """Weights and optimiser come back from shards, and each process finds its own random numbers."""
    steps = "stages.mixed.max_steps=80"  # many, since finding the processes to kill takes a while
    whole, cut = (["train", *to(tmp_path / name, recipe_file), steps] for name in ("whole", "cut"))
    launch(launcher(kind), *whole)
    kill_at(8, tmp_path / "cut", [sys.executable, "-m", *launcher(kind), *cut])
    launch(launcher(kind), "train", "--resume", *cut[1:])
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


FILES = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "replaced"])
def test_a_damaged_checkpoint_is_named(stopped, recipe_file, tmp_path, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (file,) = folder.glob(f"mixed/checkpoint-*/{name}")
    file.write_bytes(file.read_bytes()[:50] if damage == "cut" else b"\x00\xff")
    with pytest.raises(ValueError, match=rf"cannot go on from {file.parent}: "):
        run(stopped_recipe(folder, recipe_file), resume=True)


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"stage": "mixed"}', "\ud83d"])
def test_a_damaged_log_is_named(stopped, recipe_file, tmp_path, line):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    log = folder / "log.jsonl"
    log.write_bytes(log.read_bytes() + line.encode("utf-8", "surrogatepass") + b"\n")
    with pytest.raises(ValueError, match=r"log\.jsonl: line 3 is "):
        run(stopped_recipe(folder, recipe_file), resume=True)


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def stopped_recipe(folder: Path, recipe_file: Path) -> Recipe:
    overrides = [f"output_dir={folder}", "checkpoints.every_steps=2", "stages.mixed.max_steps=3"]
    return load_recipe(recipe_file, [*overrides, "stages.mixed.gradient_accumulation=1"])


@pytest.fixture(scope="module")
def stopped(recipe_file) -> Path:
    """A run that was interrupted after its second step."""
    folder = recipe_file.parent / "stopped"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flashsloth.train.callbacks.Clock.on_save", interrupted)
        run(stopped_recipe(folder, recipe_file))
    return folder

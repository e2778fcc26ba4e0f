"""The model card, the picture of the loss, the log and the progress bar of a run."""

import io
import json
import subprocess
from pathlib import Path

import pytest
import rich
import yaml
from PIL import Image
from rich.console import Console
from transformers import TrainerState

from flashsloth.data.recipe import LlavaData, MessagesData, MixtureData, WebdatasetData
from flashsloth.train import callbacks, card
from flashsloth.train.callbacks import ProgressBar, clock_time, reporters, seconds_left
from flashsloth.train.recipe import LoggingRecipe, load_recipe
from flashsloth.train.run import run

DEBUG = Path(__file__).parents[1] / "configs" / "debug" / "two_stages.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "debug"
    return run(load_recipe(DEBUG, [f"output_dir={folder}", "license=apache-2.0"]))


def metadata(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_the_card_says_what_was_trained_on_what(trained):
    text = (trained / "README.md").read_text()
    assert metadata(trained) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "tags": ["flashsloth"],
    }
    rows = [json.loads(line) for line in (trained.parents[1] / "log.jsonl").read_text().splitlines()]
    for stage in ("pretrain", "finetune"):
        last = [row for row in rows if row["stage"] == stage][-1]
        line = next(line for line in text.splitlines() if line.startswith(f"| {stage} | ") and "compressor" in line)
        assert f"| {last['tokens']:,} |" in line and f"| {last['loss']:.4f} |" in line and " GB |" in line
        assert f"| {stage} | scenes: images rendered by flashsloth.synthetic (scenes 1), seed 0 | 64 |" in text
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0])["output_dir"] == str(trained.parents[1])
    from importlib.metadata import version

    assert f"flashsloth {version('flashsloth')}, torch {version('torch')}" in text


def test_the_card_shows_the_loss_curve(trained):
    assert "](loss.png)" in (trained / "README.md").read_text()
    with Image.open(trained / "loss.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert picture.width > picture.height and len(colours) > 10


def test_every_kind_of_source_is_named():
    data = {
        "a": LlavaData(kind="llava", path=Path("a.json"), image_folder=Path(".")),
        "b": WebdatasetData(kind="webdataset", shards="b/{0..9}.tar"),
        "c": MessagesData(kind="messages", path="owner/name"),
        "both": MixtureData(kind="mixture", sources={"a": 2, "c": 0.5}),
    }
    texts = {name: card.describe_source(name, data) for name in data}
    assert texts["a"] == "a: llava `a.json`" and texts["b"] == "b: webdataset `b/{0..9}.tar`"
    assert texts["both"] == "both: 2 x a: llava `a.json`; 0.5 x c: messages `owner/name`"


def test_without_a_log_there_is_no_picture(tmp_path):
    assert card.plot_losses([], ["pretrain"], tmp_path / "loss.png") is False
    assert not list(tmp_path.iterdir()) and card.read_log(tmp_path / "log.jsonl") == []


def test_smoothing_is_a_trailing_mean():
    assert card._smoothed([1.0, 3.0]) == [1.0, 3.0]
    values = [float(index % 2) for index in range(400)]
    assert card._smoothed(values)[10:] == [0.5] * 390


def test_the_commit_is_that_of_the_code_and_tells_changes(tmp_path):
    assert card.code_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "code.py").write_text("x = 1\n")
    assert card.code_commit(tmp_path) is None  # nothing of it is in git yet
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert card.code_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("x = 2\n")
    assert card.code_commit(tmp_path) == f"{commit} with local changes"
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "other.py").write_text("")
    assert card.code_commit(tmp_path / "package") is None  # installed inside somebody's repository


def test_every_log_line_has_speed_tokens_and_memory(trained):
    rows = [json.loads(line) for line in (trained.parents[1] / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        (s, i) for s in ("pretrain", "finetune") for i in (1, 2, 3, 4)
    ]
    for before, row in zip([None, *rows], rows, strict=False):
        assert row["images"] == 4 * row["step"] and row["images_per_second"] > 0 and row["tokens_per_second"] > 0
        assert 0.05 < row["peak_memory_gb"] < 100
        if before is not None and before["stage"] == row["stage"]:
            assert row["tokens"] > before["tokens"]
    # every image takes 4 visual tokens, and a caption or question some
    assert all(row["tokens"] > 4 * row["images"] for row in rows)


class Schedule:
    def __init__(self, total_steps, budget_seconds, elapsed_seconds):
        self.total_steps, self.budget_seconds, self.elapsed_seconds = total_steps, budget_seconds, elapsed_seconds
        self.progress = 0.25


@pytest.mark.parametrize(
    ("schedule", "seconds"),
    [
        (Schedule(100, None, 7.0), 150.0),  # 75 steps of 2 seconds
        (Schedule(None, 60.0, 20.0), 40.0),  # the clock alone: speed does not matter
        (Schedule(100, 60.0, 20.0), 40.0),  # the clock comes first
        (Schedule(30, 600.0, 20.0), 10.0),  # the steps come first
        (Schedule(None, 60.0, 61.0), 0.0),
    ],
)
def test_time_left_follows_what_ends_the_stage(schedule, seconds):
    assert seconds_left(schedule, 25, 2.0) == seconds


def test_durations_are_read_as_hours_minutes_seconds():
    assert [clock_time(value) for value in (0.4, 61, 3599.6, 36_000)] == ["0:00:00", "0:01:01", "1:00:00", "10:00:00"]


def test_the_bar_is_drawn_on_a_terminal_alone(monkeypatch):
    for terminal in (True, False):
        output = io.StringIO()
        console = Console(file=output, force_terminal=terminal, width=200)
        monkeypatch.setattr(rich, "get_console", lambda console=console: console)
        bar = ProgressBar("finetune", images_per_step=8)
        state = TrainerState()
        state.is_world_process_zero = True
        bar.on_train_begin(None, state, None)
        bar.on_log(None, state, None, logs={"loss": 0.125})
        state.global_step, state.num_input_tokens_seen = 25, 4000
        bar.on_step_end(None, state, None, lr_scheduler=Schedule(None, 60.0, 20.0))
        bar.on_train_end(None, state, None)
        text = output.getvalue()
        assert bool(text) is terminal
        if terminal:
            for word in ("finetune", "step 25", "loss 0.1250", "images/s", "tokens/s", "GB", "0:00:40 left"):
                assert word in text


def test_reporters_are_what_the_recipe_asks_for(monkeypatch, caplog):
    monkeypatch.setattr(callbacks, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(callbacks, "is_wandb_available", lambda: True)
    assert reporters(LoggingRecipe()) == ["tensorboard"]
    assert reporters(LoggingRecipe(wandb=True)) == ["tensorboard", "wandb"]
    assert reporters(LoggingRecipe(tensorboard=False)) == []
    monkeypatch.setattr(callbacks, "is_tensorboard_available", lambda: False)
    monkeypatch.setattr(callbacks, "is_wandb_available", lambda: False)
    assert reporters(LoggingRecipe()) == [] and "tensorboard is not installed" in caplog.text
    with pytest.raises(ImportError, match="pip install wandb"):
        reporters(LoggingRecipe(wandb=True))


def test_tensorboard_files_are_written_by_default(tmp_path):
    pytest.importorskip("tensorboard")
    overrides = ["stages.pretrain.max_steps=1", "stages.finetune.max_steps=1", "logging.tensorboard=true"]
    run(load_recipe(DEBUG, [f"output_dir={tmp_path / 'run'}", *overrides]))
    for stage in ("pretrain", "finetune"):
        assert list((tmp_path / "run" / stage).rglob("events.out.tfevents.*"))

"""Trainer callbacks: the run's log file and progress bar, and the end and the checkpoints set by the clock."""

import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
import torch
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_tensorboard_available, is_wandb_available

from ..checkpoints.files import write_whole
from ..data.text_files import parse_json
from .optimization import ProgressScheduler, first_rank_value
from .recipe import LoggingRecipe

logger = logging.getLogger(__name__)

BYTES_OF_GB = 1e9


def reporters(settings: LoggingRecipe) -> list[str]:
    """Names of the Trainer's integrations that a recipe asks for.

    Raises:
        ImportError: `wandb` is asked for and not installed.
    """
    names = []
    if settings.tensorboard:
        if is_tensorboard_available():
            names.append("tensorboard")
        else:
            logger.warning("logging.tensorboard is ignored: tensorboard is not installed (pip install tensorboard)")
    if settings.wandb:
        if not is_wandb_available():
            raise ImportError("logging.wandb: true needs wandb; pip install wandb, or set it to false")
        names.append("wandb")
    return names


def peak_memory_bytes() -> int:
    """The most memory that this process has held: on the accelerator since the stage began, else altogether.

    0 where it cannot be known: on the CPU under Windows.
    """
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def seconds_left(scheduler: ProgressScheduler, step: int, seconds_per_step: float) -> float:
    """Time until the stage ends: by its steps at the present speed, or by its clock, whichever is sooner."""
    ends = []
    if scheduler.total_steps is not None:
        ends.append((scheduler.total_steps - step) * seconds_per_step)
    if scheduler.budget_seconds is not None:
        ends.append(scheduler.budget_seconds - scheduler.elapsed_seconds)
    return max(0.0, min(ends))


def clock_time(seconds: float) -> str:
    """A duration as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@dataclass
class Speed:
    """Images and tokens a second between two moments of a stage."""

    images_per_step: int
    step: int = 0
    tokens: int = 0
    moment: float = 0.0

    def start(self, state: TrainerState) -> None:
        self.step, self.tokens, self.moment = state.global_step, state.num_input_tokens_seen, time.monotonic()

    def measure(self, state: TrainerState) -> tuple[float, float, float]:
        """Images a second, tokens a second, seconds a step, since the last call or the start."""
        steps, tokens = state.global_step - self.step, state.num_input_tokens_seen - self.tokens
        seconds = max(time.monotonic() - self.moment, 1e-9)
        self.start(state)
        return steps * self.images_per_step / seconds, tokens / seconds, seconds / max(steps, 1)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; none where there is no such file. A last line that was cut by a kill is left out.

    Raises:
        ValueError: a line that is no row of a log; the message names it.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is {error}; remove the line") from error
        if not isinstance(row, dict) or not {"stage", "step", "loss"} <= row.keys():
            raise ValueError(f"{path}: line {number} is no row of a log of training; remove the line")
        rows.append(row)
    return rows


class LogFile(TrainerCallback):
    """One JSON line for each log of the Trainer, with images and seconds, in a file that a run can commit.

    Lines beyond the step from which a run resumes are removed first, so that no step appears twice.
    """

    def __init__(self, path: Path, stage: str, images_per_step: int) -> None:
        self.path, self.stage, self.images_per_step = path, stage, images_per_step
        self.speed = Speed(images_per_step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.path.exists():
            rows = [
                row for row in read_log(self.path) if row["stage"] != self.stage or row["step"] <= state.global_step
            ]
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        if torch.accelerator.is_available():
            torch.accelerator.reset_peak_memory_stats()
        self.speed.start(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:  # a stage's last loss is its result
            control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        lr_scheduler: ProgressScheduler | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        images, tokens, seconds_per_step = self.speed.measure(state)
        row = {
            "stage": self.stage,
            "step": state.global_step,
            "images": state.global_step * self.images_per_step,
            "loss": round(logs["loss"], 5),
            "grad_norm": round(logs.get("grad_norm", 0.0), 4),
            "learning_rate": logs["learning_rate"],
            "images_per_second": round(images, 2),
            "tokens": state.num_input_tokens_seen,
            "tokens_per_second": round(tokens, 1),
            "peak_memory_gb": round(peak_memory_bytes() / BYTES_OF_GB, 3),
        }
        left = ""
        if lr_scheduler is not None:
            row["seconds"] = round(lr_scheduler.elapsed_seconds, 1)
            left = f", {clock_time(seconds_left(lr_scheduler, state.global_step, seconds_per_step))} left"
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        logger.info(
            "%s step %d: loss %.4f, %.1f images/s, %.0f tokens/s, %.2f GB%s",
            *(self.stage, row["step"], row["loss"], images, tokens, row["peak_memory_gb"], left),
        )


class ProgressBar(TrainerCallback):
    """A line at the bottom of the terminal: share of the stage, loss, speed, memory and time left.

    The share and the time left follow the clock where the clock ends the stage. Nothing is drawn where the output is
    no terminal.
    """

    def __init__(self, stage: str, images_per_step: int) -> None:
        self.stage = stage
        self.speed = Speed(images_per_step)
        self._progress: Progress | None = None
        self._loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.speed.start(state)
        console = rich.get_console()  # that of the log's handler, so that its lines appear above the bar
        if state.is_world_process_zero and console.is_terminal:
            columns = (TextColumn(self.stage), BarColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=console, transient=True)
            self._progress.add_task("", total=1.0)
            self._progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {logs['loss']:.4f} · "

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: ProgressScheduler | None = None,
        **kwargs: Any,
    ) -> None:
        if self._progress is None or lr_scheduler is None:
            return
        images, tokens, seconds_per_step = self.speed.measure(state)
        left = clock_time(seconds_left(lr_scheduler, state.global_step, seconds_per_step))
        text = (
            f"step {state.global_step:,} · {self._loss}{images:.1f} images/s · {tokens:,.0f} tokens/s · "
            f"{peak_memory_bytes() / BYTES_OF_GB:.2f} GB · {left} left"
        )
        self._progress.update(self._progress.task_ids[0], completed=lr_scheduler.progress, description=text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the line away and give the terminal its cursor back, also where training did not come to its end."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Clock(TrainerCallback):
    """Ends the stage when its time is used up, and saves a checkpoint every so many minutes."""

    def __init__(self, save_minutes: float | None) -> None:
        self.save_seconds = None if save_minutes is None else 60 * save_minutes
        self._last_save = time.monotonic()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: ProgressScheduler | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        if lr_scheduler is not None and lr_scheduler.is_over:
            control.should_training_stop = True
            control.should_log = True
        elif (
            self.save_seconds is not None and first_rank_value(time.monotonic() - self._last_save) >= self.save_seconds
        ):
            control.should_save = True
        # the mean loss since the last line is not in the checkpoint, so a resumed run begins a new line as well
        control.should_log = control.should_log or control.should_save
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_save = time.monotonic()

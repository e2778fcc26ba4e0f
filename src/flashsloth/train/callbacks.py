"""Trainer callbacks: the run's log file, and the end and the checkpoints set by the clock."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .optimization import ProgressScheduler, first_rank_value

logger = logging.getLogger(__name__)


class LogFile(TrainerCallback):
    """One JSON line for each log of the Trainer, with images and seconds, in a file that a run can commit.

    Lines beyond the step from which a run resumes are removed first, so that no step appears twice.
    """

    def __init__(self, path: Path, stage: str, images_per_step: int) -> None:
        self.path, self.stage, self.images_per_step = path, stage, images_per_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.path.exists():
            # a line without its end was cut by a kill or a full disk
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            rows = [json.loads(line) for line in lines]
            rows = [row for row in rows if row["stage"] != self.stage or row["step"] <= state.global_step]
            staging = self.path.with_name(f"{self.path.name}.incomplete")
            staging.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(staging, self.path)
        self._last = (time.monotonic(), state.global_step)

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
        now, step = time.monotonic(), state.global_step
        seconds = max(now - self._last[0], 1e-9)
        row = {
            "stage": self.stage,
            "step": step,
            "images": step * self.images_per_step,
            "loss": round(logs["loss"], 5),
            "grad_norm": round(logs.get("grad_norm", 0.0), 4),
            "learning_rate": logs["learning_rate"],
            "images_per_second": round((step - self._last[1]) * self.images_per_step / seconds, 2),
        }
        if lr_scheduler is not None:
            row["seconds"] = round(lr_scheduler.elapsed_seconds, 1)
        self._last = (now, step)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        logger.info("%s step %d: loss %.4f, %.1f images/s", self.stage, step, row["loss"], row["images_per_second"])


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

"""Carry out the runs of a study, one after the other, each in a process of its own."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..train.recipe import LOG_FILE
from .plan import TRAINING_FOLDER, WORKER_LOG, Run

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        run: the run in progress, or just ended.
        finished, runs: runs.
        steps, total_steps: optimiser steps of all runs.
        seconds_left: by the speed of this start of the study; None before its first step.
    """

    run: Run
    finished: int
    runs: int
    steps: int
    total_steps: int
    seconds_left: float | None


def run_study(runs: Sequence[Run], on_progress: Callable[[Progress], None] | None = None) -> None:
    """Carry out what is not finished yet; an interrupted run goes on from its last checkpoint.

    Raises:
        ValueError: a run failed, or its folder holds a run with other settings.
    """
    for run in runs:  # all of them, before hours are spent on the first
        run.write_plan()
    total = sum(run.steps for run in runs)
    begun = time.monotonic()
    # work of an earlier start says nothing about the speed of this one
    steps_before = sum(run.steps if run.is_finished else _steps_done(run) for run in runs)
    done = sum(run.steps for run in runs if run.is_finished)
    finished = sum(run.is_finished for run in runs)

    def report(run: Run, steps: int) -> None:
        if on_progress is not None:
            new = done + steps - steps_before
            left = (time.monotonic() - begun) / new * (total - done - steps) if new > 0 else None
            on_progress(Progress(run, finished, len(runs), done + steps, total, left))

    for run in runs:
        if run.is_finished:
            continue
        _run_worker(run, report)
        finished += 1
        done += run.steps
        report(run, 0)


def _run_worker(run: Run, report: Callable[[Run, int], None]) -> None:
    log = run.folder / WORKER_LOG
    command = [sys.executable, "-m", "flashsloth.study.worker", str(run.folder)]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while True:
                report(run, _steps_done(run))
                try:
                    process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode or not run.is_finished:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise ValueError(f"{run.variant}, seed {run.seed} failed (exit code {process.returncode}): {last} (see {log})")


def _steps_done(run: Run) -> int:
    """Steps in the training log."""
    path = run.folder / TRAINING_FOLDER / LOG_FILE
    if not path.exists():
        return 0
    last: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line is being written
            break
        last[row["stage"]] = row["step"]
    return sum(last.values())

"""The measured tier: one process per measurement, so that models share neither memory nor warm caches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from flashsloth.kernels.packed_layers import HUGE_PAGES_VARIABLE, chosen_kernels

from .machine import LARGEST_OTHER_LOAD, commit, machine_card, measure_roofline, other_load, read_load
from .results import Measurement, Results, Roofline, Settings, versions
from .stock import entry_of
from .worker import MOST_DISCARDED


def open_results(path: Path, device: str, threads: int) -> Results:
    """The results in a file, or new ones.

    Raises:
        ValueError: the file was made on another machine.
    """
    machine = machine_card(device, threads)
    if not path.exists():
        return Results(machine, versions(), commit())
    results = Results.load(path)
    known = results.machine
    if known != machine:
        raise ValueError(
            f"{path} was measured on another machine ({known.gpu or known.cpu}, {known.threads} threads on "
            f"{known.cores} cores, {known.system}); give another --output"
        )
    return results


def with_roofline(
    results: Results, dtype: str, device: str, threads: int, allow_load: bool = False
) -> tuple[Results, Roofline]:
    """Results with the roofline of a dtype, measured if they lack it.

    Raises:
        ValueError: the machine is in use by others.
    """
    for roofline in results.rooflines:
        if (roofline.device, roofline.dtype, roofline.threads) == (device, dtype, threads):
            return results, roofline
    for _ in range(MOST_DISCARDED):
        before = read_load()
        roofline = measure_roofline(dtype, device, threads)
        load = other_load(before, read_load())
        if load <= LARGEST_OTHER_LOAD or allow_load:
            break
    else:
        raise ValueError(
            f"other processes took {load:.0%} of the CPU while the machine's own rates were measured; stop them, or "
            "measure all the same with --allow-load"
        )
    return dataclasses.replace(results, rooflines=[*results.rooflines, roofline]), roofline


def settings_of(
    models: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    images: Sequence[int],
    batches: Sequence[int],
    output_tokens: Sequence[int],
    dtypes: Sequence[str],
    weights: Mapping[str, str],
    kernels: str = "auto",
    **common: Any,
) -> list[Settings]:
    """All combinations, those of one model together. Names are checked first.

    Args:
        kernels: "auto" is what `inference.load` chooses for our own models, and torch's for all others.
    """
    found = [
        Settings(
            model=model, width=size[0], height=size[1], images=count, batch=batch, output_tokens=length, dtype=dtype,
            weights=weights.get(model), **common,
        )
        for model, dtype, size, count, batch, length in itertools.product(
            models, dtypes, sizes, images, batches, output_tokens
        )
    ]  # fmt: skip
    return [dataclasses.replace(settings, kernels=_kernels(settings, kernels)) for settings in found]


def _kernels(settings: Settings, kernels: str) -> Any:
    own = entry_of(settings).origin == "own"
    if kernels == "packed" and not own:
        raise ValueError(f"packed kernels are for our own models; {settings.model} ({settings.assembly}) is none")
    return chosen_kernels(kernels, settings.device) if own else "torch"


def measure_in_process(
    settings: Settings, roofline: Roofline, repetitions: int, warm_up: int, allow_load: bool
) -> Measurement:
    """Measured by a process of its own. One that dies becomes a measurement with an error."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "job.json", Path(folder) / "result.json"
        job = {"settings": asdict(settings), "roofline": asdict(roofline)}
        options = {"repetitions": repetitions, "warm_up": warm_up, "allow_load": allow_load}
        source.write_text(json.dumps({**job, **options}))
        command = [sys.executable, "-m", "flashsloth.bench.worker", str(source), str(target)]
        # huge pages are part of the fast path, as our command line has them, and not of torch's
        environment = {name: value for name, value in os.environ.items() if name != HUGE_PAGES_VARIABLE}
        if settings.kernels == "packed":
            environment[HUGE_PAGES_VARIABLE] = "1"
        process = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        if target.exists():
            return TypeAdapter(Measurement).validate_json(target.read_text())
    last = next((line for line in reversed(process.stderr.splitlines()) if line.strip()), "no message")
    killed = process.returncode == -signal.SIGKILL
    reason = "killed, probably for want of memory" if killed else f"exit code {process.returncode}: {last}"
    return Measurement(settings, error=reason)


def run_all(
    wanted: Sequence[Settings],
    results: Results,
    path: Path,
    repetitions: int,
    warm_up: int,
    allow_load: bool,
    on_result: Callable[[Measurement, bool], None] = lambda measurement, fresh: None,
) -> Results:
    """Measures what the results lack, and writes the file after each; returns all results."""
    for settings in wanted:
        known = results.find(settings)
        if known is None:
            results, roofline = with_roofline(results, settings.dtype, settings.device, settings.threads, allow_load)
            measurement = measure_in_process(settings, roofline, repetitions, warm_up, allow_load)
            results = results.with_measurements([measurement])
            results.save(path)
        on_result(known or measurement, known is None)
    return results

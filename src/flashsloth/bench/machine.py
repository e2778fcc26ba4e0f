"""The machine a measurement is made on: what it is, what it reaches, and whether somebody else is using it."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from flashsloth.checkpoints.loading import DTYPES, synchronize
from flashsloth.kernels.packed_layers import PackedLinear, supported
from flashsloth.kernels.widened_layers import WidenedLinear

from .results import Machine, Roofline

try:
    import psutil  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError("measuring needs psutil; install it with: pip install 'flashsloth[bench]'") from error

LARGEST_OTHER_LOAD = 0.1  # share of the CPU that other processes may take during a repetition
# by device: a GPU is done with what keeps a CPU busy before it has been asked for the next
MATRIX_SIZES = {
    "cpu": ((512, 2560, 10240), (1024, 2048, 8192), (2048, 2048, 2048)),
    "cuda": ((4096, 4096, 16384), (8192, 8192, 8192)),
}
READ_BYTES, READ_WIDTH = {"cpu": 2**29, "cuda": 2**32}, 4096
_ROUNDS = 5
_PASSES = 4  # over all shapes: a slow second must not decide
_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")


def _cpu() -> tuple[str, list[str]]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (values.get("flags") or values.get("Features") or "").split()
    name = values.get("model name") or platform.processor() or platform.machine()
    return name, [feature for feature in _CPU_FEATURES if feature in flags]


def cores() -> list[int]:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def machine_card(device: str, threads: int) -> Machine:
    """What is needed to read a time."""
    name, flags = _cpu()
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        cpu=name,
        cores=len(cores()),
        threads=threads,
        memory_bytes=psutil.virtual_memory().total,
        cpu_flags=flags,
        gpu=None if gpu is None else gpu.name,
        gpu_memory_bytes=None if gpu is None else gpu.total_memory,
    )


def commit() -> str | None:
    """Of the code, where it lies in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@dataclass(frozen=True)
class Reading:
    """Seconds so far: on the clock, of all processes on our processors, and of this process."""

    clock: float
    everybody: float
    own: float


def read_load() -> Reading:
    """A reading of now."""
    times = psutil.cpu_times(percpu=True)
    busy = sum(sum(times[core]) - times[core].idle - getattr(times[core], "iowait", 0.0) for core in cores())
    # time of guests is part of user time already
    busy -= sum(getattr(times[core], "guest", 0.0) + getattr(times[core], "guest_nice", 0.0) for core in cores())
    own = psutil.Process().cpu_times()
    return Reading(time.perf_counter(), busy, own.user + own.system)


def other_load(before: Reading, after: Reading) -> float:
    """Share of our processors that other processes took between two readings."""
    available = (after.clock - before.clock) * len(cores())
    return max(0.0, (after.everybody - before.everybody) - (after.own - before.own)) / available


def _times(work: Callable[[], torch.Tensor], device: str) -> list[float]:
    """Seconds of some rounds, after one that does not count."""
    times = []
    for _ in range(_ROUNDS + 1):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return times[1:]


def _products(left: torch.Tensor, right: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """Ways of multiplying by a weight that this machine has."""
    ways: list[Callable[[], torch.Tensor]] = [functools.partial(torch.nn.functional.linear, left, right)]
    if left.device.type == "cpu":
        layer = torch.nn.Linear(right.shape[1], right.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(right, requires_grad=False)
        quick = PackedLinear(layer) if supported(right.dtype) else WidenedLinear(layer)
        ways.append(functools.partial(quick.forward, left))
    return ways


class ReadingRate:
    """The rate of reading a matrix larger than any cache, which it holds.

    Args:
        dtype: key of `inference.DTYPES`.
    """

    def __init__(self, dtype: str, device: str) -> None:
        kind = DTYPES[dtype]
        self.device = device
        self.bytes = READ_BYTES[device]
        matrix = torch.ones(self.bytes // READ_WIDTH // kind.itemsize, READ_WIDTH, device=device, dtype=kind)
        row = torch.ones(1, READ_WIDTH, device=device, dtype=kind)
        # read as a decoder reads its weights, a product of a large matrix and one row; and by a plain sum
        self._ways = [*_products(row, matrix), matrix.view(torch.int32).sum]

    def measure(self) -> float:
        """Bytes a second, the best of some rounds of the fastest way."""
        return self.bytes / min(min(_times(work, self.device)) for work in self._ways)


def measure_roofline(dtype: str, device: str, threads: int) -> Roofline:
    """The best matrix rate over a few shapes of small language models, and the rate of reading a large matrix.

    Args:
        dtype: key of `inference.DTYPES`.
    """
    if device == "cpu":
        torch.set_num_threads(threads)
    kind = DTYPES[dtype]
    rate, best_shape = 0.0, MATRIX_SIZES[device][0]
    for shape in MATRIX_SIZES[device] * _PASSES:
        rows, inner, columns = shape
        left, right = (torch.randn(size, inner, device=device).to(kind) for size in (rows, columns))
        seconds = min(min(_times(work, device)) for work in _products(left, right))
        found = 2 * rows * inner * columns / seconds
        if found > rate:
            rate, best_shape = found, shape
    return Roofline(device, dtype, threads, rate, ReadingRate(dtype, device).measure(), best_shape)

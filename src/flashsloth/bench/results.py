"""The result file of the measured tier: what was measured, on which machine, by which code.

Seconds, bytes, FLOP/s and bytes/s throughout. None stands for "not measured", never for zero.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import ConfigDict, TypeAdapter, ValidationError

import flashsloth
from flashsloth.checkpoints.files import write_whole

FORMAT = 1
STAGES = ("preprocess", "encode", "compress", "prefill", "time_to_first_token", "decode_per_token", "total")


def versions() -> dict[str, str]:
    """What made the numbers."""
    return {
        "flashsloth": flashsloth.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@dataclass(frozen=True)
class Machine:
    """Where it ran.

    Attributes:
        cores: that the process may use; `threads` is what torch used of them.
        memory_bytes: of the machine.
        cpu_flags: those that decide which kernels run, such as avx512_bf16 or amx_bf16.
        gpu: its name, None without one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    system: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    cpu_flags: list[str]
    gpu: str | None = None
    gpu_memory_bytes: int | None = None


@dataclass(frozen=True)
class Roofline:
    """What the machine reached in the same run.

    Attributes:
        matrix_flops_per_second: of a matrix product of sizes like the models'.
        bandwidth_bytes_per_second: of reading weights.
        shape: (rows, inner size, columns) of the matrix product.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    device: str
    dtype: str
    threads: int
    matrix_flops_per_second: float
    bandwidth_bytes_per_second: float
    shape: tuple[int, int, int]

    def seconds(self, flops: int, read: int) -> float:
        """Of so many operations or of reading so many bytes, whichever takes longer."""
        return max(flops / self.matrix_flops_per_second, read / self.bandwidth_bytes_per_second)


@dataclass(frozen=True)
class Settings:
    """What identifies a measurement: one with equal settings is not repeated.

    Attributes:
        width, height: of each image in pixels.
        batch: prompts at a time. images: per prompt.
        output_tokens: of the answer, the first included.
        assembly: "own" is the model as shipped; "stock" is a plain transformers assembly of the same parts.
        quantization: name of the scheme, None without.
        kernels: "packed" as `inference.load` prepares our models for a CPU, "torch" as they are built.
        weights: folder they were read from, None for random ones.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str
    width: int
    height: int
    batch: int = 1
    images: int = 1
    text_tokens: int = 32
    output_tokens: int = 16
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int = 1
    attention: str = "sdpa"
    compile: bool = False
    quantization: str | None = None
    kernels: Literal["torch", "packed"] = "torch"
    assembly: Literal["own", "stock"] = "own"
    weights: str | None = None


@dataclass(frozen=True)
class Stage:
    """Seconds of one stage in each repetition that counts."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third; of a single sample that sample twice."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Measurement:
    """One model at one setting.

    Attributes:
        stages: by name, see `STAGES`; one that was not measured is absent, and `notes` says why.
        visual_tokens, prompt_tokens: of one prompt.
        parameter_bytes, cache_bytes: weights; keys, values and states of the batch at the end of the answer.
        peak_memory_bytes: resident set on CPU, allocated memory on CUDA.
        peak_above_weights_bytes: how much of it came on top of the loaded model.
        flops: of the batch, by stage, from the static tier.
        share_of_roofline: by stage, 1.0 is the roofline; of decoding, the median over the repetitions.
        read_rates: bytes a second of reading, beside each repetition; decoding is held against them where they were
            measured (weights that no cache holds), else against the roofline.
        discarded: repetitions thrown away because other processes took too much of the processor.
        under_load: measured although the machine was busy; not to be compared.
        error: why there is no measurement, in one line.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    settings: Settings
    stages: dict[str, Stage] = field(default_factory=dict)
    visual_tokens: int | None = None
    prompt_tokens: int | None = None
    parameter_bytes: int | None = None
    cache_bytes: int | None = None
    peak_memory_bytes: int | None = None
    peak_above_weights_bytes: int | None = None
    flops: dict[str, int] = field(default_factory=dict)
    share_of_roofline: dict[str, float] = field(default_factory=dict)
    discarded: int = 0
    under_load: bool = False
    read_rates: list[float] = field(default_factory=list)
    error: str | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown:
            raise ValueError(f"unknown stages {', '.join(unknown)}; known are {', '.join(STAGES)}")
        empty = [name for name, stage in self.stages.items() if not stage.samples]
        if empty:
            raise ValueError(f"stages without samples: {', '.join(empty)}; leave out what was not measured")

    def median(self, stage: str) -> float | None:
        """Median seconds of a stage, None where it was not measured."""
        return self.stages[stage].median if stage in self.stages else None


@dataclass(frozen=True)
class Results:
    """A result file.

    Attributes:
        commit: of the code, None outside a git checkout.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    machine: Machine
    versions: dict[str, str]
    commit: str | None = None
    rooflines: list[Roofline] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    format: int = FORMAT

    def find(self, settings: Settings) -> Measurement | None:
        """The measurement with these settings; one that ended in an error does not count."""
        for measurement in self.measurements:
            if measurement.settings == settings and measurement.error is None:
                return measurement
        return None

    def with_measurements(self, found: Sequence[Measurement]) -> Results:
        """A copy in which `found` replace those with the same settings."""
        replaced = [measurement.settings for measurement in found]
        kept = [measurement for measurement in self.measurements if measurement.settings not in replaced]
        return Results(self.machine, self.versions, self.commit, self.rooflines, [*kept, *found], self.format)

    def save(self, path: Path) -> None:
        """Writes the whole file or leaves the old one, with medians and quartiles beside the samples."""
        plain: dict[str, Any] = asdict(self)
        for values, measurement in zip(plain["measurements"], self.measurements, strict=True):
            values["summary"] = {
                name: {"median": stage.median, "quartiles": list(stage.quartiles)}
                for name, stage in measurement.stages.items()
            }
        write_whole(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads a result file; medians and quartiles are computed anew from the samples.

        Raises:
            ValueError: not a result file, with the first thing that is wrong.
        """
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}. Give a file written by flashsloth bench run.") from error
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            raise ValueError(f"{path} is no result file of format {FORMAT}. Give one written by flashsloth bench run.")
        for values in plain.get("measurements", []):
            values.pop("summary", None)
        try:
            return TypeAdapter(cls).validate_python(plain)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {where}: {first['msg']}. Measure anew, or mend the file.") from error

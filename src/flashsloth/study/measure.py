"""What a variant costs: training time, memory, floating point operations."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..reports.process_memory import peak_resident_bytes, reset_peak_resident_bytes, resident_bytes
from .plan import write_json

# Parts of the FLOP counts; the embedded query module runs inside the language model and is taken out of it.
FLOP_PARTS = ("vision_encoder", "compressor_and_projector", "embedded_query", "language_model")
_PART_MODULES: dict[str, tuple[str, ...]] = {
    "vision_encoder": ("model.vision_tower",),
    "compressor_and_projector": ("model.compressor", "model.projector"),
    "embedded_query": ("model.embedded_query",),
    "language_model": ("model.language_model", "lm_head"),
}


class TrainingUsage(TrainerCallback):
    """Writes the time and the memory of training to a file, stage by stage.

    Time is what the process computed (user and system seconds of all its threads; not of the loader's processes), or
    seconds on the clock where an accelerator computes. It is noted with every checkpoint and counted on from there
    when a run resumes, so that steps which were lost and repeated count once.

    Memory is the largest resident set of the process, or the largest allocation on the accelerator.

    Args:
        path: JSON file; read when it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_accelerator = torch.accelerator.is_available()
        self.stages: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.stages = json.loads(path.read_text(encoding="utf-8"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reset_peak()
        fresh = {"seconds": {}, "peak_bytes": 0, "start_bytes": self._memory()}
        self._stage = self.stages.setdefault(Path(args.output_dir).name, fresh)
        self._before = self._stage["seconds"].get(str(state.global_step), 0.0)
        self._started = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save or control.should_training_stop:
            self._note(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note(state.global_step)

    def totals(self) -> dict[str, Any]:
        """Seconds of all stages; the peak of memory in bytes, and how much of it training has added."""
        stages = list(self.stages.values())
        peak = max(stage["peak_bytes"] for stage in stages)
        return {
            "clock": "wall seconds" if self.on_accelerator else "CPU seconds",
            "seconds": sum(max(stage["seconds"].values()) for stage in stages),
            "peak_bytes": peak,
            # of the first stage: what it frees stays with the process and would hide what later stages take
            "added_bytes": peak - stages[0]["start_bytes"],
        }

    def _note(self, step: int) -> None:
        seconds = self._before + self._clock() - self._started
        # noted for later steps by an attempt that was cut off after its last checkpoint
        kept = {key: value for key, value in self._stage["seconds"].items() if int(key) < step}
        self._stage["seconds"] = {**kept, str(step): seconds}
        self._stage["peak_bytes"] = max(self._stage["peak_bytes"], self._peak())
        write_json(self.path, self.stages)

    def _clock(self) -> float:
        if self.on_accelerator:
            torch.accelerator.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _reset_peak(self) -> None:
        if self.on_accelerator:
            torch.accelerator.reset_peak_memory_stats()
        else:
            reset_peak_resident_bytes()

    def _memory(self) -> int:
        return torch.accelerator.memory_allocated() if self.on_accelerator else resident_bytes()

    def _peak(self) -> int:
        return torch.accelerator.max_memory_allocated() if self.on_accelerator else peak_resident_bytes()


def count_flops(
    model: FlashSlothForConditionalGeneration, batch: dict[str, Any], backward: bool = False
) -> dict[str, int]:
    """Floating point operations of one forward pass, by part, and their sum as `total`.

    Matrix products and convolutions are counted, an addition and a multiplication as two; attention must be `eager`
    for its products to be seen on every device.

    Args:
        batch: arguments of the model's `forward`.
        backward: propagate the loss as well; only `total` is given then.
    """
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(backward), counter:
        output = model(**batch, use_cache=False)
        if backward:
            output.loss.backward()
    if backward:
        model.zero_grad()
        return {"total": counter.get_total_flops()}
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(model).__name__
    parts = {
        part: sum(by_module.get(f"{root}.{module}", 0) for module in modules)
        for part, modules in _PART_MODULES.items()
    }
    parts["language_model"] -= parts["embedded_query"]
    return {**parts, "total": counter.get_total_flops()}


def mean_counts(counts: Sequence[dict[str, int]], divisor: float | None = None) -> dict[str, float]:
    """The counts added up, over `divisor` or their number."""
    divisor = len(counts) if divisor is None else divisor
    return {key: sum(count[key] for count in counts) / divisor for key in counts[0]}

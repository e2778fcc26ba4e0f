"""One optimiser step with compression and without: seconds, samples/s and memory, each variant in its own process.

`python -m flashsloth.bench.training SETTINGS.json RESULT.json` measures one variant.

Shape suffixes: B rows, T tokens, K images of a row, G query groups of a row.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # comes with accelerate, which training needs
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from ..checkpoints.files import write_whole
from ..checkpoints.hub import resolve
from ..checkpoints.loading import synchronize
from ..model.configuration_flashsloth import FlashSlothConfig
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.prompt_encoding import IGNORED_LABEL
from ..reports.process_memory import peak_resident_bytes, reset_peak_resident_bytes, resident_bytes
from ..reports.table import MEBI, Column, Table
from ..train.trainer import uses_cpu
from .models import MODELS, model_named
from .results import versions

TINY = {
    "vision_config": {
        "model_type": "siglip_vision_model", "image_size": 96, "patch_size": 16, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    },
    "text_config": {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    },
    "embedded_query_layer": 1, "embedded_query_num_heads": 4,
}  # fmt: skip
# what is set over a model's own configuration
VARIANTS: dict[str, dict[str, Any]] = {"compressed": {}, "uncompressed": {"compressor": "none", "num_query_tokens": 0}}
DTYPES = ("float32", "bfloat16")
LEADING_TOKENS = 2
# AdamW in float32: weight, gradient and two moments of a trained parameter, the weight alone of a frozen one
TRAINED_BYTES, FROZEN_BYTES = 16, 4


@dataclass(frozen=True)
class TrainingSettings:
    """What is measured.

    Attributes:
        model: "tiny", "nano" (their sizes), or an own model of `models.MODELS`; weights are random.
        variant: a key of `VARIANTS`.
        batch: samples of a step, one image each.
        dtype: float32, or bfloat16 for autocast over float32 weights.
        steps, warmup: timed steps, and untimed ones before them.
        question_tokens, answer_tokens: text of a sample; the answer carries the loss.
        threads: of torch on the CPU; 0 leaves its default.
    """

    model: str = "nano"
    variant: str = "compressed"
    batch: int = 8
    dtype: str = "float32"
    steps: int = 10
    warmup: int = 2
    question_tokens: int = 16
    answer_tokens: int = 32
    threads: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; use {' or '.join(DTYPES)}")
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}; use {' or '.join(VARIANTS)}")
        for name, least in (("batch", 1), ("steps", 1), ("warmup", 0), ("question_tokens", 1), ("answer_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def training_models() -> list[str]:
    """Names that `TrainingSettings.model` takes."""
    return ["tiny", "nano", *(name for name, model in MODELS.items() if model.origin == "own")]


def training_config(name: str, variant: str) -> FlashSlothConfig:
    """The configuration of a model, compressed as it is or not at all.

    Raises:
        ValueError: no such model, or one that is not FlashSloth's.
    """
    if name == "tiny":
        config = FlashSlothConfig(**TINY)
    elif name == "nano":
        config = AutoConfig.from_pretrained(resolve(name))
    else:
        if name in MODELS and MODELS[name].origin != "own":
            raise ValueError(f"{name} cannot be compressed or not; use one of {', '.join(training_models())}")
        model = model_named(name).on_meta()
        assert isinstance(model, FlashSlothForConditionalGeneration)
        config = model.config
    values = {**config.to_dict(), **VARIANTS[variant]}
    vocabulary = config.text_config.vocab_size
    for offset, key in enumerate(("image_token_id", "query_token_id"), start=1):
        values[key] = vocabulary - offset if values[key] is None else values[key]
    return FlashSlothConfig.from_dict(values)


def random_batch(config: FlashSlothConfig, settings: TrainingSettings) -> dict[str, Tensor]:
    """Samples of one image, one question and one answer, as the collator makes them; without padding."""
    assert config.image_token_id is not None and config.query_token_id is not None
    generator = torch.Generator().manual_seed(0)
    images, queries = config.num_image_tokens, config.num_query_tokens
    question = LEADING_TOKENS + images
    query = question + settings.question_tokens
    answer = query + queries
    length = answer + settings.answer_tokens
    lowest_special = min(config.image_token_id, config.query_token_id)
    text = (0, lowest_special) if lowest_special > config.text_config.vocab_size // 2 else (
        max(config.image_token_id, config.query_token_id) + 1, config.text_config.vocab_size
    )  # fmt: skip
    ids_BT = torch.randint(*text, (settings.batch, length), generator=generator)
    ids_BT[:, LEADING_TOKENS:question] = config.image_token_id
    labels_BT = torch.full_like(ids_BT, IGNORED_LABEL)
    labels_BT[:, answer:] = ids_BT[:, answer:]
    shape = (settings.batch, config.num_views, 3, config.image_height, config.image_width)
    batch = {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": labels_BT,
        "image_positions": torch.full((settings.batch, 1), LEADING_TOKENS),
        "pixel_values": torch.randn(shape, generator=generator),
    }
    if queries:
        ids_BT[:, query:answer] = config.query_token_id
        question_ids_BT = torch.zeros_like(ids_BT)
        question_ids_BT[:, question:query] = 1
        batch |= {"query_positions": torch.full((settings.batch, 1), query), "question_ids": question_ids_BT}
    return batch


def _device() -> torch.device:
    device = None if uses_cpu() else torch.accelerator.current_accelerator()
    return torch.device("cpu") if device is None else device


class TrainingLoop:
    """Forward, backward, clip, fused AdamW, on batches that lie ready.

    Args:
        model: moved to the accelerator if there is one; parameters that require no gradient stay as they are.
        batches: arguments of its forward method, used in turn.
        learning_rate: of AdamW.
        dtype: of autocast, or float32 for none.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[dict[str, Tensor]], learning_rate: float, dtype: str
    ) -> None:
        self.device = _device()
        self.model = model.to(self.device).train()
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=learning_rate, fused=True)
        self.autocast = None if dtype == "float32" else getattr(torch, dtype)
        self.batches = [{name: value.to(self.device) for name, value in batch.items()} for batch in batches]
        self.step = 0

    def run(self, steps: int) -> None:
        """So many optimiser steps."""
        for _ in range(steps):
            batch = self.batches[self.step % len(self.batches)]
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss = self.model(**batch, use_cache=False, loss_only=True).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.trainable, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1


def measure_variant(settings: TrainingSettings) -> dict[str, Any]:
    """Measure one variant in this process; for memory to be its own, in a fresh one.

    Raises:
        ValueError: no such model; weights and AdamW's state do not fit the machine.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    config = training_config(settings.model, settings.variant)
    _refuse_too_large(config, settings)
    torch.manual_seed(0)
    with _device():  # drawing billions of weights takes a CPU longer than all steps a GPU
        model = FlashSlothForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    batch = random_batch(config, settings)
    loop = TrainingLoop(model, [batch], 2e-5, settings.dtype)
    before = resident_bytes() if uses_cpu() else torch.accelerator.memory_allocated()
    if uses_cpu():
        reset_peak_resident_bytes()
    loop.run(settings.warmup)
    seconds, processor_seconds = [], []
    for _ in range(settings.steps):
        synchronize()
        started, processor = time.perf_counter(), time.process_time()
        loop.run(1)
        synchronize()
        seconds.append(time.perf_counter() - started)
        processor_seconds.append(time.process_time() - processor)
    peak = peak_resident_bytes() if uses_cpu() else torch.accelerator.max_memory_allocated()
    return {
        "settings": asdict(settings),
        "device": str(loop.device),
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "trained_parameters": trained,
        "visual_tokens": config.num_image_tokens,
        "tokens_of_a_sample": batch["input_ids"].shape[1],
        "step_seconds": seconds,
        "step_processor_seconds": processor_seconds,
        "memory_kind": "resident" if uses_cpu() else "allocated",
        "memory_before_bytes": before,
        "memory_peak_bytes": peak,
        # gradients and moments appear in the first step; what is left is kept for the backward pass
        "memory_state_bytes": (TRAINED_BYTES - FROZEN_BYTES) * trained,
        "memory_added_bytes": peak - before,
    }


def _refuse_too_large(config: FlashSlothConfig, settings: TrainingSettings) -> None:
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(config)
    frozen = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters()) - frozen
    needed = trained * TRAINED_BYTES + frozen * FROZEN_BYTES
    available = psutil.virtual_memory().available if uses_cpu() else torch.accelerator.get_memory_info()[0]
    if needed > available:
        raise ValueError(
            f"{settings.model} needs {needed / 1e9:.1f} GB for float32 weights, gradients and AdamW's state alone, "
            f"{available / 1e9:.1f} GB are free here; choose a smaller model"
        )


def measure_training(
    settings: TrainingSettings,
    variants: Sequence[str] = tuple(VARIANTS),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure variants one after the other, each in a process of its own.

    Returns:
        versions, and by variant what `measure_variant` gives plus `samples_per_second` and `seconds` as median,
        min and max.

    Raises:
        ValueError: bad settings, or a variant whose process failed; says how.
    """
    results = {}
    for variant in variants:
        if progress is not None:
            progress(variant)
        result = _in_child(replace(settings, variant=variant))
        seconds = result["step_seconds"]
        result["seconds"] = _spread(seconds)
        result["samples_per_second"] = _spread([settings.batch / value for value in seconds])
        results[variant] = result
    return {"tier": "train", "versions": versions(), "model": settings.model, "variants": results}


def _in_child(settings: TrainingSettings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        given, made = Path(name) / "settings.json", Path(name) / "result.json"
        given.write_text(json.dumps(asdict(settings)), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(given), str(made)]
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if process.returncode or not made.exists():
            reason = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise ValueError(f"the {settings.variant} variant of {settings.model} failed: {reason[0]}")
        return json.loads(made.read_text(encoding="utf-8"))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def training_table(report: dict[str, Any]) -> Table:
    """A row for each variant; ratios are those of the first variant to each."""
    variants = list(report["variants"].items())
    first = variants[0][1]["samples_per_second"]["median"]
    columns = (
        Column("variant", lambda item: item[0]),
        Column("visual tokens", lambda item: item[1]["visual_tokens"]),
        Column("tokens a sample", lambda item: item[1]["tokens_of_a_sample"]),
        Column("samples/s", lambda item: item[1]["samples_per_second"]["median"], ".2f"),
        Column("lowest", lambda item: item[1]["samples_per_second"]["min"], ".2f"),
        Column("highest", lambda item: item[1]["samples_per_second"]["max"], ".2f"),
        Column("ratio", lambda item: first / item[1]["samples_per_second"]["median"], ".2f"),
        Column("step ms", lambda item: 1000 * item[1]["seconds"]["median"], ".0f"),
        Column("peak MiB", lambda item: item[1]["memory_peak_bytes"], ",.0f", MEBI),
        Column("added MiB", lambda item: item[1]["memory_added_bytes"], ",.0f", MEBI),
    )
    return Table.of("An optimiser step with and without compression", columns, variants)


def training_markdown(report: dict[str, Any]) -> str:
    """The table and a line about how it was measured."""
    settings = next(iter(report["variants"].values()))
    chosen = settings["settings"]
    told = (
        f"{report['model']}, {chosen['batch']} samples a step, {chosen['dtype']}, {chosen['steps']} steps on "
        f"{settings['device']} with {settings['threads']} threads, torch {report['versions']['torch']}. Random "
        f"weights, encoder frozen, AdamW; memory is {settings['memory_kind']}, added is what steps took beyond "
        "weights and batch."
    )
    return f"{training_table(report)}\n\n{told}\n"


def _main(given: str, made: str) -> None:
    settings = TrainingSettings(**json.loads(Path(given).read_text(encoding="utf-8")))
    write_whole(Path(made), json.dumps(measure_variant(settings)))


if __name__ == "__main__":
    _main(*sys.argv[1:])

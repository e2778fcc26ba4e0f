"""Measure one thing in a process of its own: `python -m flashsloth.bench.worker JOB.json RESULT.json`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers import logging as transformers_logging

from flashsloth.checkpoints.files import write_whole
from flashsloth.checkpoints.loading import DTYPES
from flashsloth.kernels.int8_linear import Int8Linear, PromptAndTokenLinear
from flashsloth.kernels.packed_layers import PackedLinear, keep_freed_memory, prepare_for_cpu_
from flashsloth.kernels.quantization import quantize_
from flashsloth.reports.process_memory import peak_resident_bytes

from .arithmetic import prefill_flops
from .machine import LARGEST_OTHER_LOAD, READ_BYTES, Reading, ReadingRate, other_load, read_load
from .memory import cache_bytes
from .results import Measurement, Roofline, Settings, Stage
from .stages import Stages, build_filled
from .stock import entry_of

# a machine that is never quiet is reported, not waited for
MOST_DISCARDED = 3
READ_RATE = "read_rate"


def held_bytes(modules: list[torch.nn.Module]) -> int:
    """Bytes of the weights below the modules as they are held, each once."""
    seen: set[Any] = {parameter for module in modules for parameter in module.parameters()}
    seen.update(
        layer.packed
        for module in modules
        for layer in module.modules()
        if isinstance(layer, (PackedLinear, Int8Linear)) and layer.packed is not None
    )
    # a quantised tensor is made of several plain ones
    return sum(plain.numel() * plain.element_size() for parameter in seen for plain in _plain(parameter))


def _plain(tensor: Any) -> list[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]


def repeat(
    run: Callable[[], dict[str, float]],
    repetitions: int,
    allow_load: bool,
    reading: Callable[[], Reading] = read_load,
) -> tuple[dict[str, list[float]], int, bool]:
    """Runs until enough repetitions went undisturbed.

    Returns:
        seconds by stage, repetitions discarded, and whether disturbed ones are among those kept.

    Raises:
        ValueError: the machine is in use by others.
    """
    seconds: dict[str, list[float]] = {}
    discarded, loaded, kept = 0, False, 0
    while kept < repetitions:
        before = reading()
        laps = run()
        load = other_load(before, reading())
        if load > LARGEST_OTHER_LOAD:
            if not allow_load:
                discarded += 1
                if discarded > MOST_DISCARDED * repetitions:
                    raise ValueError(
                        f"other processes took {load:.0%} of the CPU in repetition after repetition (allowed: "
                        f"{LARGEST_OTHER_LOAD:.0%}); stop them, or measure all the same with --allow-load"
                    )
                continue
            loaded = True
        kept += 1
        for stage, value in laps.items():
            seconds.setdefault(stage, []).append(value)
    return seconds, discarded, loaded


def measure(settings: Settings, roofline: Roofline, repetitions: int, warm_up: int, allow_load: bool) -> Measurement:
    """Builds the model, fills it, and times its stages.

    Args:
        settings: what to measure; `weights` may name a folder of one of our own models.
        roofline: of the same run.
        repetitions: how often.
        warm_up: untimed runs before them.
        allow_load: keep repetitions during which others used the CPU.
    """
    if settings.device == "cpu":
        torch.set_num_threads(settings.threads)
    entry, dtype = entry_of(settings), DTYPES[settings.dtype]
    if settings.weights is not None or settings.quantization is not None:
        option = "weights" if settings.weights is not None else "quantization"
        if entry.origin != "own":
            raise ValueError(
                f"{option} is for FlashSloth's own models; {settings.model} ({settings.assembly}) is none"
            )
    if settings.weights is None:
        model = build_filled(entry, dtype, settings.device)
    else:
        model = AutoModelForImageTextToText.from_pretrained(settings.weights, dtype=dtype).to(settings.device).eval()
    for part in [model] if hasattr(model, "set_attn_implementation") else [model.vision_tower, model.language_model]:
        if hasattr(part, "set_attn_implementation"):
            part.set_attn_implementation(settings.attention)
    if settings.quantization is not None:
        quantize_(model, settings.quantization)
    if settings.kernels == "packed":
        prepare_for_cpu_(model)
        keep_freed_memory()
    parts = entry.dissect(model)
    stages = Stages(entry, model, settings)
    before = _peak(settings.device)
    begun = time.perf_counter()
    stages.run()
    first = time.perf_counter() - begun
    for _ in range(warm_up - 1):
        stages.run()
    peak = _peak(settings.device)
    # not for weights that a cache may hold: it would empty the cache
    rate = ReadingRate(settings.dtype, settings.device) if held_bytes([model]) > READ_BYTES[settings.device] else None
    run = stages.run if rate is None else partial(_between_readings, stages.run, rate)
    seconds, discarded, loaded = repeat(run, repetitions, allow_load)
    read_rates = seconds.pop(READ_RATE, [])
    config, count = parts.text_config, settings.batch * settings.images
    cached = stages.prompt_tokens + settings.output_tokens - 1
    cache = settings.batch * cache_bytes(config, cached, dtype.itemsize)
    # of a fresh model: quantised weights are charged as those they stand for
    plain = entry.dissect(entry.on_meta())
    flops = {
        "encode": count * plain.vision_flops(stages.image),
        "compress": count * plain.connector_flops(stages.image, stages.prompt_tokens),
        "prefill": settings.batch * prefill_flops(plain.layers, config, plain.head, stages.prompt_tokens),
    }
    found = {stage: Stage(samples) for stage, samples in seconds.items()}
    shares = {
        stage: count / found[stage].median / roofline.matrix_flops_per_second
        for stage, count in flops.items()
        if stage != "compress"
    }
    if "decode_per_token" in found:
        layers = [layer for part in parts.layers for layer in part.modules()]
        idle = held_bytes([layer.prompt for layer in layers if isinstance(layer, PromptAndTokenLinear)])
        read = held_bytes([*parts.layers, parts.head]) - idle + cache
        rates = read_rates or [roofline.bandwidth_bytes_per_second] * repetitions
        pairs = zip(found["decode_per_token"].samples, rates, strict=True)
        shares["decode_per_token"] = read / statistics.median(step * rate for step, rate in pairs)
    return Measurement(
        settings=settings,
        stages=found,
        visual_tokens=stages.visual_tokens,
        prompt_tokens=stages.prompt_tokens,
        parameter_bytes=held_bytes([model]),
        cache_bytes=cache,
        peak_memory_bytes=peak,
        peak_above_weights_bytes=max(0, peak - before),
        flops=flops,
        share_of_roofline=shares,
        discarded=discarded,
        under_load=loaded,
        read_rates=read_rates,
        notes=[f"the first run, with all one-time cost, took {first:.2f} s"],
    )


def _between_readings(run: Callable[[], dict[str, float]], rate: ReadingRate) -> dict[str, float]:
    """The laps of a run and the mean rate of reading before and after it: a shared machine's changes by the minute."""
    before = rate.measure()
    laps = run()
    return {**laps, READ_RATE: (before + rate.measure()) / 2}


def _peak(device: str) -> int:
    """The most memory this process, or the accelerator, has held, in bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes()


def main() -> None:
    transformers_logging.set_verbosity_error()
    source, target = map(Path, sys.argv[1:])
    job = json.loads(source.read_text())
    settings, roofline = Settings(**job.pop("settings")), Roofline(**job.pop("roofline"))
    try:
        result = measure(settings, roofline, **job)
    except (ValueError, ImportError, RuntimeError, MemoryError) as error:
        result = Measurement(settings, error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
    write_whole(target, json.dumps(asdict(result)))


if __name__ == "__main__":
    main()

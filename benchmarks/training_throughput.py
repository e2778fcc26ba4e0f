"""Samples per second and peak memory of a stage-2 training step.

Two comparisons, each of two arms that take turns in one process:

- `path`: the project's training (recipe, images decoded from disk, template, collator, Trainer) against a plain
  PyTorch loop on tensors that were made beforehand.
- `compression`: the plain loop with the recipe's compressor against the same without compression.

    python benchmarks/training_throughput.py --sizes nano mid --output throughput.json

Peak memory is measured apart, one process for each arm. Weights are random.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import SIGLIP_BASE, machine
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from flashsloth.bench.training import TrainingLoop
from flashsloth.checkpoints.loading import synchronize
from flashsloth.data.dataset import build_collator, build_dataset
from flashsloth.reports.process_memory import peak_resident_bytes, resident_bytes
from flashsloth.train.build import build
from flashsloth.train.freeze import set_trainable_parts
from flashsloth.train.recipe import Recipe, parse_recipe
from flashsloth.train.run import run
from flashsloth.train.trainer import uses_cpu

NANO = Path(__file__).parents[1] / "configs" / "nano" / "nano.yaml"
TEMPLATE = NANO.with_name("chat_template.jinja")
PARTS = ["compressor", "projector", "query_tokens", "embedded_query", "language_model"]
# the shape of SmolLM2-360M
DECODER_360M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
COMPARISONS = {"path": ("project", "plain"), "compression": ("compressed", "uncompressed")}
WORDS = ["red", "green", "blue", "small", "large", "circle", "square", "above", "below", "between", "three", "seven"]
# What 95 of 100 repetitions of a normally distributed ratio stay within, in standard deviations.
DEVIATIONS = 1.96


class Finished(Exception):
    """Every round is measured: the rest of the training is not needed."""


def model_tree(size: str) -> dict[str, Any]:
    """The `model` section of a recipe."""
    if size in ("nano", "tiny"):
        path = NANO if size == "nano" else NANO.parents[1] / "debug" / "two_stages.yaml"
        tree = yaml.safe_load(path.read_text())["model"]
        if size == "nano" and uses_cpu():  # its recipe is for a GPU; the backward pass of sdpa is not vectorised here
            tree["attention"] = "eager"
    else:
        config = {"compressor": "spatial_attention", "compressor_window": 3, "num_query_tokens": 9}
        tree = {
            "vision": SIGLIP_BASE,
            "language": DECODER_360M,
            "tokenizer": {"source": "synthetic", "vocabulary_size": 1024},
            "config": {**config, "embedded_query_layer": 7, "embedded_query_num_heads": 12},
        }
    return {**tree, "chat_template": str(TEMPLATE)}


def write_data(folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """JPEG photographs of noise over a gradient, and conversations about them, as a LLaVA file."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 200, settings.image_pixels, dtype=np.float32)
    for index in range(settings.images):
        noise = generator.normal(0, 20, (settings.image_pixels, settings.image_pixels, 3))
        pixels = (ramp[:, None, None] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=90)
    records = []
    for index in range(settings.images * settings.repeats):
        turns = []
        for turn in range(settings.turns):
            question, answer = (" ".join(generator.choice(WORDS, length)) for length in settings.words)
            turns.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": answer})
        image = f"{index % settings.images}.jpg"
        records.append({"id": str(index), "image": image, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    return {"kind": "llava", "path": str(folder / "records.json"), "image_folder": str(folder)}


def make_recipe(folder: Path, settings: argparse.Namespace, compressed: bool = True) -> Recipe:
    model = model_tree(settings.size)
    if not compressed:
        model["config"] = {**model["config"], "compressor": "none"}
    stage = {
        "name": "finetune",
        "data": "conversations",
        "template": "chat",
        "train": [*(["vision_encoder"] if settings.train_encoder else []), *PARTS],
        "learning_rate": 2e-5,
        "max_steps": 10**8,
        "batch_size": settings.batch,
    }
    return parse_recipe(
        {
            "model": model,
            "data": {"conversations": write_data(folder, settings)},
            "stages": [stage],
            "output_dir": str(folder / "run"),
            "precision": settings.dtype,
            "logging": {"every_steps": 10**6, "tensorboard": False},
            "loader": {
                "workers": settings.workers,
                "prefetch": settings.prefetch,
                **({} if settings.seen else {"cache_mb": 0}),
            },
        }
    )


def _plain_loop(model: nn.Module, recipe: Recipe, batches: list[dict[str, torch.Tensor]]) -> TrainingLoop:
    return TrainingLoop(model, batches, recipe.stages[0].learning_rate, recipe.precision)


def prepared(recipe: Recipe) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """The model of a recipe and a few of its batches."""
    torch.manual_seed(recipe.seed)
    stage = recipe.stages[0]
    model, processor = build(recipe.model)
    set_trainable_parts(model, stage.train)
    model.set_attn_implementation(recipe.model.attention)
    dataset = build_dataset(recipe, stage, model.config.image_height)
    collate = build_collator(recipe, stage, processor)
    size = stage.batch_size
    batches = [
        collate([dataset[index % len(dataset)] for index in range(start, start + size)])
        for start in range(0, 4 * size, size)
    ]
    return model, batches


class TakeTurns(TrainerCallback):
    """Times blocks of Trainer steps and, between them, blocks of the plain loop."""

    def __init__(self, recipe: Recipe, settings: argparse.Namespace, batches: list[dict[str, torch.Tensor]]) -> None:
        self.recipe, self.settings, self.batches = recipe, settings, batches
        self.seconds: list[tuple[float, float]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        # the Trainer may have changed the forward method of its model, so the copy gets the class's own
        twin = copy.deepcopy(model)
        vars(twin).pop("forward", None)
        self.plain = _plain_loop(twin, self.recipe, self.batches)
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.settings.seen and state.epoch < 1:
            return
        self.steps += 1
        if self.steps == self.settings.warmup:
            synchronize()
            self.started = time.perf_counter()
        elif self.steps == self.settings.warmup + self.settings.steps:
            synchronize()
            ours = time.perf_counter() - self.started
            self.seconds.append((ours, timed(self.plain.run, self.settings)))
            self.steps = 0
            if len(self.seconds) == self.settings.rounds:
                raise Finished


def timed(run_steps: Callable[[int], None], settings: argparse.Namespace) -> float:
    run_steps(settings.warmup)
    synchronize()
    started = time.perf_counter()
    run_steps(settings.steps)
    synchronize()
    return time.perf_counter() - started


def measure_path(folder: Path, settings: argparse.Namespace) -> list[tuple[float, float]]:
    recipe = make_recipe(folder, settings)
    turns = TakeTurns(recipe, settings, prepared(recipe)[1])
    try:
        run(recipe, callbacks=[turns])
    except Finished:
        return turns.seconds
    raise AssertionError("the stage ended before its rounds were measured")


def measure_compression(folder: Path, settings: argparse.Namespace) -> list[tuple[float, float]]:
    loops = []
    for compressed in (True, False):
        recipe = make_recipe(folder, settings, compressed)
        model, batches = prepared(recipe)
        loops.append(_plain_loop(model, recipe, batches))
    return [(timed(loops[0].run, settings), timed(loops[1].run, settings)) for _ in range(settings.rounds)]


class Memory(TrainerCallback):
    def __init__(self, steps: int, seen: bool) -> None:
        self.steps, self.seen = steps, seen

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= self.steps and (not self.seen or state.epoch > 1):
            raise Finished


def measure_memory(arm: str, folder: Path, settings: argparse.Namespace) -> dict[str, int]:
    """Peak memory in bytes of one arm alone in its process, and what of it was there before the first step."""
    recipe = make_recipe(folder, settings, compressed=arm != "uncompressed")
    if arm == "project":
        before = resident_bytes()
        with contextlib.suppress(Finished):
            run(recipe, callbacks=[Memory(settings.warmup + settings.steps, settings.seen)])
    else:
        model, batches = prepared(recipe)
        loop = _plain_loop(model, recipe, batches)
        before = resident_bytes()
        loop.run(settings.warmup + settings.steps)
    synchronize()
    if uses_cpu():
        return {"peak_resident": peak_resident_bytes(), "resident_before": before}
    return {"peak_allocated": torch.accelerator.max_memory_allocated(), "resident_before": before}


def summary(seconds: list[tuple[float, float]], arms: tuple[str, str], settings: argparse.Namespace) -> dict[str, Any]:
    """Samples per second of both arms and the ratio of the first to the second, round by round."""
    samples = settings.steps * settings.batch
    rates = {arm: [samples / pair[index] for pair in seconds] for index, arm in enumerate(arms)}
    ratios = [second / first for first, second in seconds]
    return {
        "samples_per_second": {
            arm: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for arm, values in rates.items()
        },
        "ratio": {
            "of": f"{arms[0]} / {arms[1]}",
            "median": statistics.median(ratios),
            "mean": statistics.fmean(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "half_width_95": DEVIATIONS * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None,
        },
        "rounds": [dict(zip(arms, pair, strict=True)) for pair in seconds],
    }


def machine_and_load() -> dict[str, Any]:
    device = "cpu" if uses_cpu() else torch.cuda.get_device_name() if torch.cuda.is_available() else "accelerator"
    return {"device": device, **machine(), "load_at_start": os.getloadavg()[0]}


def sizes(folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    recipe = make_recipe(folder, settings)
    model, batches = prepared(recipe)
    counts = set_trainable_parts(model, recipe.stages[0].train)
    return {
        "parameters": sum(value.numel() for value in model.parameters()),
        "trainable": sum(count.trainable for count in counts),
        "visual_tokens": model.config.num_image_tokens,
        "patches": model.config.num_views * model.config.grid_height * model.config.grid_width,
        "tokens_of_a_row": batches[0]["input_ids"].shape[1],
    }


def child(size: str, task: str) -> Any:
    """Run one measurement in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *sys.argv[1:], "--size", size, "--task", task, "--output", file.name]
        subprocess.run(command, check=True)
        return json.loads(Path(file.name).read_text())


def perform(settings: argparse.Namespace) -> Any:
    kind, _, arm = settings.task.partition(":")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "memory":
            return measure_memory(arm, folder, settings)
        if kind == "sizes":
            return sizes(folder, settings)
        measure = {"path": measure_path, "compression": measure_compression}[kind]
        return summary(measure(folder, settings), COMPARISONS[kind], settings)


def describe(size: str, comparison: str, result: dict[str, Any]) -> str:
    lines = []
    for arm, rate in result["samples_per_second"].items():
        memory = next(value for key, value in result["memory"][arm].items() if key.startswith("peak"))
        lines.append(
            f"{size:5} {comparison:12} {arm:13} {rate['median']:9.2f} samples/s ({rate['min']:.2f} to "
            f"{rate['max']:.2f}), peak {memory / 2**20:,.0f} MiB"
        )
    ratio = result["ratio"]
    spread = "" if ratio["half_width_95"] is None else f" +- {ratio['half_width_95']:.3f}"
    lines.append(
        f"{size:5} {comparison:12} {ratio['of']}: {ratio['median']:.3f} (mean {ratio['mean']:.3f}{spread}, "
        f"{ratio['min']:.3f} to {ratio['max']:.3f})"
    )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "nano", "mid"), default=["nano", "mid"])
    parser.add_argument("--comparisons", nargs="+", choices=tuple(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--train-encoder", action="store_true", help="as nano's own recipe and HD's second stage do")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a block")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them, at least what is prefetched")
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each arm")
    parser.add_argument("--workers", type=int, default=1, help="processes that read data")
    parser.add_argument("--prefetch", type=int, default=2, help="batches a worker prepares ahead")
    parser.add_argument("--images", type=int, default=64, help="different images on disk")
    parser.add_argument("--repeats", type=int, default=64, help="conversations about each image")
    parser.add_argument("--image-pixels", type=int, default=512, help="side of the images on disk")
    parser.add_argument("--seen", action="store_true", help="measure `path` after a first epoch, which is kept")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--words", type=int, nargs=2, default=[10, 30], metavar=("QUESTION", "ANSWER"))
    parser.add_argument("--output", type=Path, default=Path("throughput.json"))
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    ahead = settings.workers * settings.prefetch
    if settings.warmup < ahead:
        parser.error(
            f"--warmup {settings.warmup} is below --workers times --prefetch, {ahead}: batches made while the other "
            "arm ran would be timed as if they had cost nothing"
        )
    return settings


def main() -> None:
    settings = parse()
    if settings.task is not None:
        settings.output.write_text(json.dumps(perform(settings)))
        return
    kept = {key: value for key, value in vars(settings).items() if key not in ("size", "task", "output")}
    report: dict[str, Any] = {"machine": machine_and_load(), "settings": kept, "results": {}}
    print(json.dumps(report, indent=2))
    for size in settings.sizes:
        result = report["results"][size] = {"model": child(size, "sizes")}
        print(size, result["model"])
        for comparison in settings.comparisons:
            arms = COMPARISONS[comparison]
            result[comparison] = child(size, comparison)
            result[comparison]["memory"] = {arm: child(size, f"memory:{arm}") for arm in arms}
            print(describe(size, comparison, result[comparison]), flush=True)
    settings.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

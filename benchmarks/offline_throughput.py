"""What batched runs and encoding an image once save; see `--help` of the two commands."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import SIGLIP_BASE, machine
from PIL import Image
from transformers.utils import logging as transformers_logging

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, inference
from flashsloth.kernels.packed_layers import chosen_kernels, prepare_for_cpu_
from flashsloth.kernels.quantization import quantize_
from flashsloth.model.processing_flashsloth import FlashSlothProcessor
from flashsloth.offline import Record, RunSettings, read_records, run_records
from flashsloth.synthetic import SyntheticDataset

QUESTIONS = (
    "what is in the picture?",
    "how many circles are there?",
    "is there a red square in the picture?",
    "what colour is the largest shape?",
    "which one is the smallest?",
    "what stands at the left?",
    "what is written in the picture?",
    "how many squares are there?",
    "is there a triangle?",
    "what is above the circle?",
)
# half the layers of SmolLM2-135M
SMALL_DECODER = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 15,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 1024,  # nano's tokenizer
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "flashsloth": {},  # the defaults
    "hd": {
        "vision_config": SIGLIP_BASE,
        "text_config": SMALL_DECODER,
        "view_grid": [2, 2],
        "embedded_query_layer": 7,
        "embedded_query_num_heads": 12,
    },
}
FAMILIES = {"scenes": 1.0, "charts": 1.0, "text": 1.0}  # those that need no photographs
KILL_AFTER_LINES = 0.3

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Output = Annotated[Path, typer.Option("--output", "-o", help="JSON file; a markdown table is written beside it.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or another of torch's.")]
Threads = Annotated[int, typer.Option(help="Threads of torch; 0 leaves its default.", min=0)]


@dataclass(frozen=True)
class Stopwatch:
    """Seconds on the wall and of this process (its finished children included), from now on."""

    wall: float
    processor: float

    @classmethod
    def start(cls) -> Stopwatch:
        return cls(time.perf_counter(), _processor_seconds())

    def read(self) -> dict[str, float]:
        return {
            "wall_seconds": time.perf_counter() - self.wall,
            "processor_seconds": _processor_seconds() - self.processor,
        }


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@app.command("batches")
def batches(
    images: Annotated[int, typer.Option("--images", help="Rendered images, each with one question.", min=8)] = 500,
    batch_size: Annotated[int, typer.Option("--batch-size", help="As in `flashsloth run`.", min=1)] = 32,
    workers: Annotated[
        int | None, typer.Option("--workers", help="As in `flashsloth run`.", min=0, show_default=False)
    ] = None,
    streams: Annotated[
        int | None, typer.Option("--streams", help="As in `flashsloth run`.", min=1, show_default=False)
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Repetitions; the two take turns, each over all images.", min=1)
    ] = 3,
    model: str = "nano",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = 0,
    output: Output = Path("batches.json"),
) -> None:
    """Images/s of `flashsloth run` and of one-at-a-time `ask` in the same process; then kill -9 and resume."""
    transformers_logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = _render(folder, images)
        settings = RunSettings(model, device, dtype, batch_size, workers, streams)
        session = inference.load(model, device, dtype)
        for record in records[:8]:
            session.ask(list(record.images), record.question)
        run_records(records[:batch_size], folder / "warm.jsonl", settings)
        measured, different = [], 0
        for index in range(rounds):
            watch = Stopwatch.start()
            answers = {r.id: session.ask(list(r.images), r.question).text for r in records}
            one_by_one = {"images": images, **watch.read()}
            path = folder / f"{index}.jsonl"
            watch = Stopwatch.start()
            summary = run_records(records, path, settings)
            batched = {"images": images, **watch.read(), "seconds_without_loading": summary.seconds}
            different += sum(answers[row["id"]] != row["answer"] for row in _lines(path))
            measured.append({"ask": one_by_one, "run": batched})
        resumed = _kill_and_resume(folder, settings, {row["id"]: row["answer"] for row in _lines(path)})
    rates = {
        "ask": [row["ask"]["images"] / row["ask"]["wall_seconds"] for row in measured],
        "run": [row["run"]["images"] / row["run"]["seconds_without_loading"] for row in measured],
    }
    ratios = [run / ask for ask, run in zip(rates["ask"], rates["run"], strict=True)]
    report = {
        "machine": _machine(),
        "settings": {
            "images": images,
            "batch_size": batch_size,
            "workers": workers,
            "streams": streams,
            "model": model,
            "device": device,
            "dtype": dtype,
        },
        "images_per_second": {name: _spread(values) for name, values in rates.items()},
        "ratio": _spread(ratios),
        "answers_that_differ": different,
        "kill_and_resume": resumed,
        "rounds": measured,
    }
    rows = [
        [
            f"{model} on {device}, {dtype}, batch {batch_size}" + ("" if workers is None else f", {workers} workers"),
            *(f"{report['images_per_second'][arm]['median']:.1f}" for arm in ("ask", "run")),
            f"{report['ratio']['median']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{different} of {rounds * images}",
            f"{resumed['before_the_kill']} + {resumed['after']}, {resumed['doubled']} doubled, {resumed['lost']} lost",
        ]
    ]
    columns = ["", "ask, images/s", "run, images/s", "ratio", "answers that differ", "killed, resumed"]
    _write(output, report, columns, rows)


def _render(folder: Path, count: int) -> list[Record]:
    data = SyntheticDataset("test", count, seed=7, weights=FAMILIES, turns=1)
    rows = []
    for index in range(count):
        sample = data.sample(index)
        sample.image.save(folder / f"{index}.png")
        rows.append({"id": str(index), "image": f"{index}.png", "question": sample.turns[0].question})
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(str(folder / "records.jsonl"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _kill_and_resume(folder: Path, settings: RunSettings, expected: dict[str, str]) -> dict[str, Any]:
    """The command line killed with signal 9 amid its run, then started again."""
    path = folder / "killed.jsonl"
    command = [sys.executable, "-m", "flashsloth_cli", "run", str(folder / "records.jsonl"), "-o", str(path)]
    command += ["--model", settings.model, "--dtype", settings.dtype, "--device", settings.device]
    command += ["--batch-size", str(settings.batch_size)]
    command += [] if settings.workers is None else ["--workers", str(settings.workers)]
    command += ["--streams", str(settings.streams)] if settings.streams else []
    wanted = int(KILL_AFTER_LINES * len(expected))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < wanted):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    before = path.read_bytes().count(b"\n")
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    rows = _lines(path)
    ids = [row["id"] for row in rows]
    return {
        "exit_code_of_the_killed": code,
        "before_the_kill": before,
        "after": len(rows) - before,
        "doubled": len(ids) - len(set(ids)),
        "lost": len(expected.keys() - set(ids)),
        "answers_that_differ": sum(expected[row["id"]] != row.get("answer") for row in rows),
    }


@app.command("encode-once")
def encode_once(
    shape: Annotated[
        str,
        typer.Option(
            "--shape", help="nano; flashsloth: the published size; hd: five views, SigLIP-base (random weights)."
        ),
    ] = "nano",
    images: Annotated[int, typer.Option("--images", help="Images, each asked all ten questions.", min=1)] = 10,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.", min=1)] = 4,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="A scheme of `flashsloth quantize`.", show_default=False)
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="As in `flashsloth ask`; not timed.")] = False,
    threads: Threads = 0,
    output: Output = Path("encode_once.json"),
) -> None:
    """Cost of the first and the tenth question about an image, as turns and independent of each other."""
    transformers_logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    if shape == "nano":
        session = inference.load("nano", device, dtype, quantization, compile)
    else:
        session = _random_session(shape, device, dtype, quantization, compile)
    data = SyntheticDataset("test", images, seed=7, weights=FAMILIES, turns=1)
    pictures = [data.sample(index).image for index in range(images)]
    seconds: dict[str, list[list[float]]] = {}
    processor_seconds: dict[str, list[list[float]]] = {}
    reused: dict[str, list[int]] = {}
    _ask_all(session, pictures[0], "turns", max_new_tokens)  # the first calls are slower
    for picture in pictures:
        for way in ("naive", "independent", "turns"):
            walls, processors, tokens = _ask_all(session, picture, way, max_new_tokens)
            seconds.setdefault(way, []).append(walls)
            processor_seconds.setdefault(way, []).append(processors)
            reused[way] = tokens
    ways = {}
    for way, rows in seconds.items():
        columns = [statistics.median(values) for values in zip(*rows, strict=True)]
        ways[way] = {
            "median_seconds_of_question": columns,
            "tenth_over_first": _spread([row[-1] / row[0] for row in rows]),
            "tenth_over_first_processor_time": _spread([row[-1] / row[0] for row in processor_seconds[way]]),
            "reused_tokens_of_question": reused[way],
        }
    config = session.config
    report = {
        "machine": _machine(),
        "settings": {
            "shape": shape,
            "images": images,
            "max_new_tokens": max_new_tokens,
            "device": device,
            "dtype": dtype,
            "quantization": quantization,
            "compile": compile,
            "batch": 1,
        },
        "visual_tokens": config.num_image_tokens,
        "views": config.num_views,
        "ways": ways,
    }
    title = ", ".join(filter(None, (f"{shape} on {device}", dtype, quantization, "compiled" if compile else None)))
    table = [
        [
            f"{title}: {way}",
            *(f"{1000 * ways[way]['median_seconds_of_question'][index]:.1f}" for index in (0, 1, -1)),
            f"{ways[way]['tenth_over_first']['median']:.2f}",
            str(ways[way]["reused_tokens_of_question"][-1]),
        ]
        for way in ways
    ]
    columns = ["", "first, ms", "second, ms", "tenth, ms", "tenth / first", "prompt tokens re-used by the tenth"]
    _write(output, report, columns, table)


def _ask_all(
    session: inference.FlashSloth, picture: Image.Image, way: str, max_new_tokens: int
) -> tuple[list[float], list[float], list[int]]:
    """Wall and processor seconds, and re-used prompt tokens, of each question about one picture."""
    conversation = session.conversation(picture)
    walls, processors, tokens = [], [], []
    for question in QUESTIONS:
        watch = Stopwatch.start()
        if way == "naive":
            answer = session.ask(picture, question, max_new_tokens=max_new_tokens)
        else:
            if way == "independent":
                conversation.reset()
            answer = conversation.ask(question, max_new_tokens=max_new_tokens)
        read = watch.read()
        walls.append(read["wall_seconds"])
        processors.append(read["processor_seconds"])
        tokens.append(answer.reused_tokens)
    return walls, processors, tokens


def _random_session(
    shape: str, device: str, dtype: str, quantization: str | None, compile: bool
) -> inference.FlashSloth:
    """Random weights filled for real, prepared as `inference.load` does; nano's tokenizer and template."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape is {shape!r}; use nano, {' or '.join(SHAPES)}")
    nano = inference.load("nano", "cpu")
    text = nano.config.text_config
    config = FlashSlothConfig(
        **SHAPES[shape], image_token_id=nano.config.image_token_id, query_token_id=nano.config.query_token_id
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(text, name))
    torch.manual_seed(0)
    torch.set_default_dtype(inference.DTYPES[dtype])
    with inference.select_device(device):
        model = FlashSlothForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None  # random weights: answers of equal length
    model.generation_config.pad_token_id = text.pad_token_id
    # ids beyond nano's vocabulary have no text
    model.generation_config.suppress_tokens = list(range(text.vocab_size, config.text_config.vocab_size)) or None
    if quantization is not None:
        quantize_(model, quantization)
    if chosen_kernels("auto", model.device.type) == "packed":
        prepare_for_cpu_(model)
    processor = FlashSlothProcessor.from_config(
        config, nano.processor.tokenizer, chat_template=nano.processor.chat_template
    )
    return inference.FlashSloth(model, processor, name=shape, compile=compile)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _machine() -> dict[str, Any]:
    return {**machine(), "load": os.getloadavg()[0]}


def _write(output: Path, report: dict[str, Any], columns: list[str], rows: list[list[str]]) -> None:
    output.write_text(json.dumps(report, indent=2) + "\n")
    lines = [columns, ["---"] * len(columns), *rows]
    table = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    output.with_suffix(".md").write_text(table)
    typer.echo(table)


if __name__ == "__main__":
    app()

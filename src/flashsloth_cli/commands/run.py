"""`flashsloth run`: a question about every image of a folder, or every question of a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from flashsloth_cli import exported, options


def run(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of images; JSON, JSONL, parquet or CSV file of questions; or hub dataset NAME:SPLIT.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file of answers.", show_default=False)],
    question: Annotated[
        str | None,
        typer.Option("--question", "-q", help="Asked of every record without its own.", show_default=False),
    ] = None,
    model: options.Model = "nano",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_new_tokens: options.MaxNewTokens = None,
    visual_tokens: options.VisualTokens = None,
    schema: options.Schema = None,
    choices: options.Choices = None,
    regex: options.Regex = None,
    confidence: options.Confidence = False,
    quantize: options.Quantize = None,
    compiled: options.Compile = False,
    share_equal_views: options.ShareEqualViews = False,
    batch_size: Annotated[int, typer.Option(help="Records asked at once.", min=1)] = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that decode images ahead of the model; default 0 on a CPU of two threads, else 1.",
            min=0,
            show_default=False,
        ),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(help="Batches answered side by side; default 2 on a CPU, else 1.", min=1, show_default=False),
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again what failed before.")] = False,
    retry_changed: Annotated[
        bool, typer.Option("--retry-changed", help="Ask again records whose question or image has changed since.")
    ] = False,
    ray: Annotated[
        int, typer.Option(help="Copies of the model on a Ray cluster (RAY_ADDRESS, else this machine).", min=0)
    ] = 0,
) -> None:
    """Answer questions about many images, in batches.

    Each answer is a line of the output. Stopped or killed, the same command goes on where it was; a record that
    cannot be asked gets a line with its error, and the others go on.

    [bold]Examples[/bold]

      flashsloth run photos/ -o captions.jsonl --question "what is in the picture?"
      flashsloth run questions.jsonl -o answers.jsonl --batch-size 64 --workers 4
      flashsloth run questions.parquet -o answers.jsonl --model Tongbo/FlashSloth-3.2B --device cuda
      flashsloth run photos/ -o dogs.jsonl -q "is it a dog?" --choices yes,no --confidence
      flashsloth run photos/ -o captions.jsonl -q "what is it?" --ray 8
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging as transformers_logging

    from flashsloth.offline import RunSettings, read_records, run_records

    exported.refuse(model, "run")
    console = Console(stderr=True)
    transformers_logging.disable_progress_bar()
    records = read_records(data, question)
    settings = RunSettings(
        model=model,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        streams=streams,
        max_new_tokens=max_new_tokens,
        visual_tokens=visual_tokens,
        retry_errors=retry_errors,
        retry_changed=retry_changed,
        ray_workers=ray,
        quantization=quantize,
        compile=compiled,
        share_equal_views=share_equal_views,
        **options.read_form(schema, choices, regex, confidence),
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("asking", total=len(records), rate="")

        started, compiling = time.perf_counter(), compiled
        if compiling:
            bar.update(task, description="compiling, once")

        def show(done: int, _total: int) -> None:
            nonlocal compiling
            if compiling:
                seconds = time.perf_counter() - started
                console.print(f"loaded, compiled and answered the first batch in {seconds:.1f} s", style="dim")
                bar.update(task, description="asking")
                compiling = False
            speed = bar.tasks[task].speed
            bar.update(task, completed=done, rate="" if speed is None else f"{speed:.1f} records/s")

        summary = run_records(records, output, settings, show)
    rate = summary.answered / summary.seconds if summary.answered else 0.0
    console.print(
        f"{summary.answered} answered, {summary.failed} failed, {summary.skipped} done before; {rate:.1f} records/s",
        highlight=False,
        soft_wrap=True,
    )

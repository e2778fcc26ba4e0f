"""`flashsloth eval MODEL`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flashsloth_cli import options

UNFINISHED = 3


def run(
    model: Annotated[str, typer.Argument(help="Packaged model, folder, or hub id.", show_default=False)],
    suite: Annotated[
        str | None,
        typer.Option(help="paper, quick or nano; default nano where no --tasks are named.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names of lmms-eval's tasks, with commas.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions a task; default all.", min=1, show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of results; default eval-MODEL-SUITE.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder that `flashsloth eval fetch` filled; default the hub.", show_default=False),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="A variant in the same table, such as quantize=int8-dynamic-cpu, compressor=average, "
            "visual-tokens=36, dtype=bfloat16 or zero-embedded-query=yes (repeatable).",
            show_default=False,
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also without images, with shuffled ones, and the most frequent answer.")
    ] = False,
    judge_url: Annotated[
        str | None,
        typer.Option(help="Base URL of an OpenAI-compatible judge; its key is $OPENAI_API_KEY.", show_default=False),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's name at that URL.")] = "gpt-4o-2024-11-20",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    visual_tokens: options.VisualTokens = None,
    batch_size: Annotated[int, typer.Option(help="Questions asked at once.", min=1)] = 32,
    images: Annotated[int, typer.Option(help="Images of the nano suite's mixture.", min=1)] = 1200,
    turns: Annotated[int, typer.Option(help="Questions an image of the nano suite.", min=1)] = 6,
    seed: Annotated[int, typer.Option(help="Seed of the nano suite's images.", min=0)] = 0,
    photos: Annotated[
        str | None, typer.Option(help="Folder of CIFAR-10's parquet files; default $FLASHSLOTH_CIFAR10_DIR.")
    ] = None,
    shown: Annotated[int, typer.Option(help="Right and wrong samples a task in the HTML page.", min=0)] = 12,
) -> None:
    """Score a model, and write a report in Markdown, HTML and JSON.

    Every row says what its number needs to be believed. A task that cannot be evaluated says why in one line, the
    others go on, and the exit code is 3. Killed, the same command goes on where it was; nothing is asked twice.

    [bold]Examples[/bold]

      flashsloth eval nano --suite nano

      flashsloth eval nano --suite nano --controls --compare quantize=int8-dynamic-cpu --compare compressor=average

      flashsloth eval Tongbo/FlashSloth-3.2B --suite paper --data data/ --judge-url http://localhost:8000/v1

      flashsloth eval Tongbo/FlashSloth-3.2B --tasks pope,gqa --limit 100

      accelerate launch --num_processes 8 -m flashsloth_cli eval Tongbo/FlashSloth-3.2B --suite paper
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported; there is a bar for all tasks

    from rich.console import Console
    from rich.progress import Progress, TaskID
    from transformers.utils import logging as transformers_logging

    from flashsloth.evaluate.benchmarks import chosen
    from flashsloth.evaluate.report import SCORES, write_report
    from flashsloth.evaluate.runner import EvalSettings, run_suite
    from flashsloth.evaluate.variants import CONTROLS, read_variants
    from flashsloth.evaluate.verdicts import DONE
    from flashsloth.reports.table import Table
    from flashsloth_cli.tables import print_table, table_console

    transformers_logging.disable_progress_bar()
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    suite = suite or (None if names else "nano")
    settings = EvalSettings(
        model=model,
        suite=suite or "",
        benchmarks=chosen(suite, names),
        variants=read_variants(compare or [], CONTROLS if controls else []),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        visual_tokens=visual_tokens,
        quantization=quantize,
        limit=limit,
        data=data,
        own={"images": images, "turns": turns, "seed": seed, "photos": photos},
        judge_url=judge_url,
        judge_model=judge_model,
        shown=shown,
    )
    folder = output or Path(f"eval-{Path(model).name}-{suite or 'tasks'}")
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            shown_tasks: dict[str, TaskID] = {}

            def show(label: str, done: int, total: int) -> None:
                if label not in shown_tasks:
                    shown_tasks[label] = bar.add_task(label, total=total)
                bar.update(shown_tasks[label], completed=done, total=total)

            results = run_suite(settings, folder, show)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"the same command goes on with what is in {folder}") from error
    if results is None:  # another process of the same run reports
        return
    rows = results["rows"]
    written = write_report(folder)
    print_table(table_console(), Table.of("", SCORES, rows, texts=2))
    console.print(f"wrote {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    if any(row["status"] != DONE for row in rows):
        raise typer.Exit(UNFINISHED)

"""`flashsloth bench train`: an optimiser step with compression and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def train(
    model: Annotated[str, typer.Option("--model", "-m", help="tiny, nano, or FlashSloth on any backbone.")] = "nano",
    batch: Annotated[int, typer.Option(help="Samples of a step, one image each.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 (autocast).")] = "float32",
    steps: Annotated[int, typer.Option(help="Timed steps.", min=1)] = 10,
    warmup: Annotated[int, typer.Option(help="Untimed steps before them.", min=0)] = 2,
    question_tokens: Annotated[int, typer.Option(help="Tokens of the question.", min=1)] = 16,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of the answer.", min=1)] = 32,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves its default.", min=0)] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number here.", show_default=False)
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table here.", show_default=False)
    ] = None,
) -> None:
    """Seconds, samples/s and memory of an optimiser step with compression and without.

    The encoder is frozen, all else trains with AdamW, as in the second stage.
    Weights and data are random; each variant runs in a process of its own.

    [bold]Examples[/bold]

      flashsloth bench train

      flashsloth bench train --model flashsloth-smollm2-360m --batch 2 --dtype bfloat16 --json train.json
    """
    from rich.console import Console

    from flashsloth.bench.training import TrainingSettings, measure_training, training_markdown, training_table
    from flashsloth.checkpoints.files import write_whole

    from ...tables import print_table, table_console

    settings = TrainingSettings(
        model=model, batch=batch, dtype=dtype, steps=steps, warmup=warmup, question_tokens=question_tokens,
        answer_tokens=answer_tokens, threads=threads,
    )  # fmt: skip
    with Console(stderr=True).status("measuring") as status:
        report = measure_training(settings, progress=lambda name: status.update(f"measuring {model}, {name}"))
    print_table(table_console(), training_table(report))
    if json_file is not None:
        write_whole(json_file, json.dumps(report, indent=2) + "\n")
    if markdown_file is not None:
        write_whole(markdown_file, training_markdown(report))

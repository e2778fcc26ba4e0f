"""`flashsloth evaluate-synthetic`: exact match on held-out rendered images."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from flashsloth_cli import options
from flashsloth_cli.tables import table_console


def evaluate_synthetic(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.", show_default=False)],
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    count: Annotated[int, typer.Option(help="Images.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    family: Annotated[
        list[str] | None, typer.Option(help="Family of images (repeatable); default all.", show_default=False)
    ] = None,
    turns: Annotated[int, typer.Option(help="Questions an image.", min=1)] = 6,
    photos: Annotated[
        str | None, typer.Option(help="Folder of CIFAR-10's parquet files; default $FLASHSLOTH_CIFAR10_DIR.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions a batch.", min=1)] = 64,
    zero_embedded_query: Annotated[
        bool, typer.Option("--zero-embedded-query", help="Ablation: EmbQ adds nothing.")
    ] = False,
    compressor: Annotated[
        str | None, typer.Option(help="Ablation: this compressor instead, without retraining.", show_default=False)
    ] = None,
    visual_tokens: options.VisualTokens = None,
    absent_share: Annotated[
        float, typer.Option(help="Share of the questions that are about what is not there.", min=0, max=1)
    ] = 0.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report here.", show_default=False)
    ] = None,
) -> None:
    """Exact match per task and family on held-out rendered images.

    [bold]Examples[/bold]

      flashsloth evaluate-synthetic runs/nano/finetune/model --count 2000 --json out.json

      flashsloth evaluate-synthetic runs/nano/finetune/model --zero-embedded-query
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

    from flashsloth.evaluate.ablations import replaced_compressor, zeroed_embedded_query
    from flashsloth.evaluate.synthetic import ALL, evaluate, write_report

    session = options.load_session(model, "auto", "auto")
    loaded, processor = session.model, session.processor
    with ExitStack() as stack:
        if zero_embedded_query:
            stack.enter_context(zeroed_embedded_query(loaded))
        if compressor is not None:
            stack.enter_context(replaced_compressor(loaded, compressor))
        console = Console(stderr=True)
        progress = stack.enter_context(Progress(transient=True, console=console, disable=not console.is_terminal))
        task = progress.add_task("images", total=count)
        report = evaluate(
            loaded,
            processor,
            split=split,
            count=count,
            seed=seed,
            families=family,
            turns=turns,
            photos=photos,
            batch_size=batch_size,
            visual_tokens=visual_tokens,
            absent_share=absent_share,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    report.settings |= {"model": model, "zero_embedded_query": zero_embedded_query, "compressor": compressor}
    table = Table("task", "questions", "exact match", "majority answer", title=Text(f"{model}, {split} split"))
    for name, score in sorted(report.tasks.items()):
        table.add_row(name, str(score.total), f"{score.accuracy:.1%}", f"{report.majority[name].accuracy:.1%}")
    table.add_section()
    for name, score in sorted(report.families.items()):
        table.add_row(name, str(score.total), f"{score.accuracy:.1%}", f"{report.majority[name].accuracy:.1%}")
    if report.held_out.total:
        table.add_row("held-out combinations", str(report.held_out.total), f"{report.held_out.accuracy:.1%}", "")
    overall = report.overall
    table.add_row(ALL, str(overall.total), f"{overall.accuracy:.1%}", f"{report.majority[ALL].accuracy:.1%}")
    table_console().print(table)
    if json_file is not None:
        write_report(report, json_file)

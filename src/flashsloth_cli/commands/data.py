"""`flashsloth data`: look at training data before training, and draw it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from flashsloth.data.check import Report

DEFECTS_FOUND = 2
BAR_WIDTH = 24

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at training data before training, and draw it."""


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as for train.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Records of each source to read, spread over it; default: all.", min=1, show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read; default: the recipe's loader.workers.", min=0, show_default=False),
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes of the training run, to count its steps.", min=1)] = 1,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A sort of defect to leave out, such as 'duplicate id'; repeat for several."),
    ] = None,
    show: Annotated[int, typer.Option(help="Defects to print; --json has them all.", min=0)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read all data of a recipe as training would, and report every defect with its file and record.

    The exit code is 2 when there are defects. No weights are loaded.

    [bold]Examples[/bold]

      flashsloth data check configs/debug/two_stages.yaml

      flashsloth data check recipe.yaml --limit 10000 --workers 8 --json > report.json
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    from flashsloth.data.check import check_recipe
    from flashsloth.train.build import build_processor
    from flashsloth.train.recipe import load_recipe

    logging.disable_progress_bar()
    settings = load_recipe(recipe, overrides)
    config, processor = build_processor(settings.model)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True)
    # where nothing is drawn, it would still print an empty line
    with progress if console.is_terminal else nullcontext():
        tasks: dict[str, Any] = {}

        def on_progress(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        report = check_recipe(
            settings,
            processor,
            config.image_height,
            limit=limit,
            workers=settings.loader.workers if workers is None else workers,
            processes=processes,
            on_progress=on_progress,
        )
    report.findings = [finding for finding in report.findings if finding.kind not in (ignore or ())]
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), ensure_ascii=False) + "\n")
    else:
        _print(report, Console(highlight=False), show)
    if report.findings:
        raise typer.Exit(DEFECTS_FOUND)


def _print(report: Report, console: Console, show: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("source", "kind", "samples", "checked", "broken", "images a sample", box=None, title_justify="left")
    for source in report.sources:
        images = ", ".join(f"{number:,} x {count}" for count, number in sorted(source.images.items()))
        size = "stream" if source.size is None else f"{source.size:,}"
        share = f" ({source.broken / source.checked:.1%})" if source.broken else ""
        table.add_row(source.name, source.kind, size, f"{source.checked:,}", f"{source.broken:,}{share}", images)
    console.print(table)
    for stage in report.stages:
        steps = "until the clock ends it" if stage.steps is None else f"{stage.steps:,} steps"
        epochs = "" if stage.epochs is None else f", {stage.epochs:.3g} epochs"
        console.print(f"\n[bold]stage {escape(stage.name)}[/bold]: {steps}{epochs}, max_length {stage.max_length}")
        for name, lengths in stage.sources.items():
            summary = lengths.to_dict()
            dropped = f"{summary['dropped_turns_share']:.1%} of turns dropped, {lengths.shortened:,} samples shortened"
            console.print(f"  {escape(name)}: {summary['samples']:,} samples, {dropped}")
            for title in ("text_tokens", "visual_tokens"):
                _print_histogram(console, title.replace("_", " "), summary[title])
    kinds = Counter(finding.kind for finding in report.findings)
    if not kinds:
        console.print("\nno defects", style="green")
        return
    counts = ", ".join(f"{count:,} x {kind}" for kind, count in kinds.most_common())
    console.print(f"\n[bold red]{len(report.findings):,} defects[/bold red]: {counts}")
    for finding in report.findings[:show]:
        console.print(
            f"  {escape(finding.place)}: [red]{finding.kind}[/red]: {escape(finding.message)}", soft_wrap=True
        )
    if len(report.findings) > show:
        console.print(f"  and {len(report.findings) - show:,} more (--show, --json)")


def _print_histogram(console: Console, title: str, summary: dict[str, Any]) -> None:
    if not summary["counts"]:
        return
    parts = (
        f"mean {summary['mean']:.1f}, median {summary['median']:.0f}, 95% {summary['p95']:.0f}, max {summary['max']}"
    )
    console.print(f"    {title}: {parts}")
    largest = max(summary["counts"])
    if len(summary["counts"]) == 1:
        return
    for low, high, count in zip(summary["bins"], summary["bins"][1:], summary["counts"], strict=False):
        bar = "█" * max(round(BAR_WIDTH * count / largest), count > 0)
        console.print(f"      {low:7.0f} to {high:7.0f} {bar:<{BAR_WIDTH}} {count:,}")


@app.command()
def draw(
    family: Annotated[str, typer.Argument(help="Family of images.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Folder to draw into.", show_default=False)],
    count: Annotated[int, typer.Option(help="Images, rounded up to whole files.", min=1)] = 1000,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Seed of the images.", min=0)] = 0,
    image_size: Annotated[int, typer.Option(help="Longer side in pixels.", min=32)] = 288,
    turns: Annotated[int, typer.Option(help="Questions an image.", min=1)] = 20,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
) -> None:
    """Draw images of a family into files that training reads.

    For families whose programs take too long to draw while a model trains. The folder is named as `drawn` in a recipe.
    Stopped or killed, the same command goes on where it was.

    [bold]Examples[/bold]

      flashsloth data draw figures drawn/ --count 20000 --workers 2
    """
    from rich.console import Console
    from rich.progress import Progress

    from flashsloth.synthetic.drawing import draw as draw_family

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(family, total=count)
        for done in draw_family(family, folder, count, split, seed, workers, image_size=image_size, turns=turns):
            progress.update(task, advance=done)

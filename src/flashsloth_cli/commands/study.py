"""`flashsloth study`: variants of a recipe, trained with several seeds and compared."""

from pathlib import Path
from typing import Annotated

import typer

from flashsloth_cli import messages


def study(
    file: Annotated[Path, typer.Argument(help="YAML study.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Overrides of the base recipe, for all variants.", show_default=False
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="VARIANT", help="Run this variant; repeat for several.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="Run this seed of the study; repeat for several.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder of runs and report; default: the study's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their visual tokens.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Draw the report of the finished runs only.")] = False,
    publish: Annotated[
        Path | None, typer.Option(help="Folder that gets a copy of the report's page and plots.", show_default=False)
    ] = None,
) -> None:
    """Train variants of a recipe on the same data with several seeds, and compare them.

    Finished runs are kept and interrupted ones resumed: start the same command again.

    [bold]Examples[/bold]

      flashsloth study configs/studies/compression.yaml --dry-run

      flashsloth study configs/studies/compression.yaml --only sap --seed 0

      flashsloth study configs/studies/compression.yaml --report --publish docs
    """
    import logging

    from rich.console import Console
    from rich.table import Table

    from flashsloth.study.config import load_study
    from flashsloth.study.plan import make_plan

    if dry_run and (report or publish is not None):
        raise ValueError("--dry-run contradicts --report and --publish: it only lists the runs")
    console = Console(stderr=True)
    messages.show_log()
    settings = load_study(file)
    if output_dir is not None:
        settings.output_dir = output_dir
    runs = make_plan(settings, overrides or (), only, seed)
    if dry_run:
        table = Table("variant", "seed", "visual tokens", "query tokens", "steps", "state", title=str(file))
        for run in runs:
            state = "finished" if run.is_finished else "begun" if run.folder.exists() else "to do"
            counts = (run.seed, run.visual_tokens, run.query_tokens, run.steps)
            table.add_row(run.variant, *map(str, counts), state)
        Console().print(table)
        return
    if not report:
        _train(runs, console)

    from flashsloth.study.report import write_report

    page = write_report(settings, make_plan(settings, overrides or ()), file.stem, publish)
    logging.getLogger("flashsloth").info("report: %s", page)


def _train(runs: list, console) -> None:
    import logging

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as ProgressBar

    from flashsloth.study.runner import Progress, run_study

    logger = logging.getLogger("flashsloth")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, {task.fields[left]} left"),
    )
    with ProgressBar(*columns, console=console) as bar:
        task = bar.add_task("study", total=sum(run.steps for run in runs), left="?")
        finished = sum(run.is_finished for run in runs)

        def show(progress: Progress) -> None:
            nonlocal finished
            run = progress.run
            left = _duration(progress.seconds_left)
            description = f"{run.variant}, seed {run.seed} ({progress.finished}/{progress.runs} runs done)"
            bar.update(task, completed=progress.steps, description=description, left=left)
            if progress.finished > finished:
                finished = progress.finished
                logger.info("%s, seed %d: finished; %s left of the study", run.variant, run.seed, left)

        run_study(runs, show)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"

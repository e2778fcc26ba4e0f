"""`flashsloth explain-check`: whether maps of attention tell the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashsloth_cli import options
from flashsloth_cli.tables import table_console


def explain_check(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Packaged model, folder, or hub id.")] = "nano",
    count: Annotated[int, typer.Option(help="Questions.", min=2)] = 500,
    family: Annotated[
        list[str] | None,
        typer.Option(help="scenes, charts or text (receipts); may be repeated. Default all.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the images and of the random order.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report here.", show_default=False)
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw curves and pointing game here (.png).", show_default=False)
    ] = None,
    rows_file: Annotated[
        Path | None,
        typer.Option(
            "--rows", help="Keep what was measured here; the same command goes on from it.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Masked images a batch.", min=1)] = 32,
    visual_tokens: options.VisualTokens = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Measure whether maps of attention tell where an answer comes from.

    On drawn images of the test split: how fast the answer's probability falls when the most attended regions are
    masked, and rises when only they are shown, against a random order and the middle of the image; whether a map's
    maximum lies on what the question asks about; how far maps move when the question changes.

    [bold]Examples[/bold]

      flashsloth explain-check --count 500 --rows rows.jsonl --json check.json --plot check.png

      flashsloth explain-check runs/nano/finetune/model --family scenes
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from flashsloth.checkpoints.files import write_json
    from flashsloth.evaluate.faithfulness import FAMILIES, FaithfulnessCheck, questions
    from flashsloth.evaluate.faithfulness_report import plot, read_rows, summarize, write_rows
    from flashsloth.synthetic.sample import REFERENCE_SIZE

    if plot_file is not None:
        import flashsloth.reports.plots  # noqa: F401  # refused now rather than at the end where matplotlib is missing
    families = list(family or FAMILIES)
    session = options.load_session(model, device, dtype)
    session.image_tokens(1, visual_tokens)
    images = questions(families, count, seed, max(session.config.image_height, REFERENCE_SIZE))
    settings: dict[str, Any] = {
        "model": model,
        "families": families,
        "seed": seed,
        "split": "test",
        "visual_tokens": visual_tokens or session.config.num_image_tokens,
    }
    rows = [] if rows_file is None else read_rows(rows_file, settings)
    wanted = {asked[0].image: len(asked) for asked in images}
    done = {image for image in wanted if sum(row.image == image for row in rows) == wanted[image]}
    rows = [row for row in rows if row.image in done]
    check = FaithfulnessCheck(session, seed, batch_size, visual_tokens)
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("questions", total=sum(wanted.values()), completed=len(rows))
        try:
            for asked in images:
                if asked[0].image in done:
                    continue
                rows += check.run(asked)
                progress.update(task, completed=len(rows))
                if rows_file is not None:
                    write_rows(rows_file, settings, rows)
        except KeyboardInterrupt:
            if rows_file is None:
                raise
            raise KeyboardInterrupt(f"the same command goes on after {len(rows)} questions") from None
    summary = summarize(rows, settings)
    _print(summary)
    if json_file is not None:
        write_json(json_file, summary)
    if plot_file is not None:
        plot(summary, plot_file)


def _print(summary: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from flashsloth.evaluate.faithfulness_report import NAMES, order_of

    def shown(found: dict[str, Any] | None) -> str:
        return "" if found is None else f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"

    settings = summary["settings"]
    title = f"{settings['model']}: {summary['questions']} questions about {summary['images']} images"
    table = Table(
        "questions", "order", "deletion, less is better", "insertion, more is better", "pointing", "share on it",
        title=Text(title),
    )  # fmt: skip
    for group, found in summary["groups"].items():
        for name in order_of(found["pointing"]):
            columns = ("deletion_area", "insertion_area", "pointing", "share_on_it")
            values = (shown(found[column].get(name)) for column in columns)
            table.add_row(f"{group} ({found['questions']})", NAMES[name], *values)
        table.add_section()
    console = table_console()
    console.print(table)
    moves = Table("map", "change", "moves by (total variation)", title="How far maps move")
    for layer, changes in summary["groups"]["all"]["moves"].items():
        for change, found in changes.items():
            moves.add_row(NAMES[layer], f"{change} ({found['n']})", shown(found))
    console.print(moves)

"""`flashsloth eval fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

UNFINISHED = 3


def fetch(
    folder: Annotated[Path, typer.Argument(help="Folder of the data, for --data.", show_default=False)],
    suite: Annotated[str, typer.Option(help="paper or quick.")] = "paper",
    tasks: Annotated[
        str | None, typer.Option(help="Only these, with commas; default all of the suite.", show_default=False)
    ] = None,
) -> None:
    """Fetch the benchmarks from the hub, for machines without a network.

    Each set becomes a folder as `datasets` saves it, whole or not at all; the same command goes on after a break.

    [bold]Examples[/bold]

      flashsloth eval fetch data/

      flashsloth eval fetch data/ --tasks pope,gqa
    """
    from rich.console import Console

    from flashsloth.evaluate.benchmarks import chosen
    from flashsloth.evaluate.harness import fetch as fetch_set
    from flashsloth_cli import messages

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    rows = chosen(None if names else suite, names)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"{len(rows)} sets, about {sum(row.gigabytes for row in rows):.0f} GB", style="dim")
    missing = False
    for row in rows:
        try:
            with console.status(f"{row.title}, about {row.gigabytes:g} GB"):
                target = fetch_set(row, folder)
            console.print(f"{row.title}: {target}")
        except ValueError as error:
            messages.say(f"error: {error}")
            missing = True
    if missing:
        raise typer.Exit(UNFINISHED)

"""`flashsloth convert`: the authors' checkpoint format to ours, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flashsloth_cli import messages


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder or hub id of the checkpoint.", show_default=False)
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; must not exist yet.", show_default=False)
    ],
    to_official: Annotated[
        bool, typer.Option("--to-official", help="From this project's format to the authors'.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST when it exists and is not empty.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the tokenizer, for a checkpoint that has none.", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "2GB",
) -> None:
    """Convert a checkpoint of the FlashSloth authors to an ordinary Hugging Face folder, or back.

    Every tensor is accounted for: one that is missing, left over or misshapen is named and nothing is written.

    [bold]Examples[/bold]

      flashsloth convert Tongbo/FlashSloth-3.2B flashsloth-3.2b
      flashsloth convert --to-official my-finetune my-finetune-official
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from flashsloth.checkpoints import hub
    from flashsloth.checkpoints.convert_official import convert_checkpoint

    console = Console(stderr=True)
    columns = BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tensors", total=None)
        convert_checkpoint(
            hub.locate(source),
            destination,
            to_official=to_official,
            overwrite=overwrite,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    messages.say(f"wrote {destination}")

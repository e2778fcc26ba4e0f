"""`flashsloth convert`: the authors' checkpoint format to ours, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


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
) -> None:
    """Convert a checkpoint of the FlashSloth authors to an ordinary Hugging Face folder, or back.

    Every tensor is accounted for: one that is missing, left over or misshapen is named and nothing is written.

    [bold]Examples[/bold]

      flashsloth convert Tongbo/FlashSloth-3.2B flashsloth-3.2b
      flashsloth convert --to-official my-finetune my-finetune-official
    """
    from flashsloth import hub
    from flashsloth.model.convert_official import convert_checkpoint

    convert_checkpoint(hub.locate(source), destination, to_official=to_official)
    Console(stderr=True).print(f"wrote {destination}", highlight=False)

"""`flashsloth merge`: an adapter and its base model to one plain folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashsloth_cli import messages


def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of a trained adapter.", show_default=False)
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist yet.", show_default=False)
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Base model, where it is not the one the adapter names.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT when it exists and is not empty.")
    ] = False,
) -> None:
    """Merge a LoRA adapter into its base model: the result is an ordinary folder that needs neither.

    An adapter trained on 4-bit weights is merged into the unquantized base.

    [bold]Examples[/bold]

      flashsloth merge runs/lora/finetune/model my-model
      flashsloth merge runs/qlora/finetune/model my-model --base Tongbo/FlashSloth-3.2B
    """
    from transformers.utils import logging

    from flashsloth.checkpoints.adapters import merge as merge_adapter

    logging.disable_progress_bar()
    merge_adapter(adapter, destination, base=base, overwrite=overwrite)
    messages.say(f"wrote {destination}")

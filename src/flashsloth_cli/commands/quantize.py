"""`flashsloth quantize`: a model whose linear layers hold 8 or 4 bits a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashsloth_cli import messages


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Packaged model, folder, or hub id.", show_default=False)
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    scheme: Annotated[str, typer.Option(metavar="SCHEME", help="int8-dynamic, int8-weight-only or int4-weight-only.")],
    encoder: Annotated[
        bool | None,
        typer.Option(
            "--encoder/--no-encoder",
            help="Quantize the vision encoder too; default only for int8-dynamic.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="DTYPE", help="Of what is not quantized: auto (as saved), float32, bfloat16, float16."),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT when it exists and is not empty.")
    ] = False,
) -> None:
    """Quantize the decoder (and encoder) with torchao; the result is an ordinary folder.

    [bold]Examples[/bold]

      flashsloth quantize nano nano-int8 --scheme int8-dynamic
      flashsloth ask photo.jpg "What is in the picture?" --model nano-int8
    """
    from transformers.utils import logging

    from flashsloth.kernels.quantization import quantize_folder

    logging.disable_progress_bar()
    quantize_folder(model, destination, scheme, encoder, dtype=dtype, overwrite=overwrite)
    messages.say(f"wrote {destination}")

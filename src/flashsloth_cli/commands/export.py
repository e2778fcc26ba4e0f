"""`flashsloth export`: a model as graphs that run without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flashsloth_cli import messages


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Packaged model, folder, adapter or hub id.", show_default=False)
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.", show_default=False)],
    format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="onnx or openvino.")] = "onnx",
    weights: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="How weights are held: float32, float16 (half the file, computes in float32), int8, or int4 (layers "
            "of the decoder; encoder and head int8).",
        ),
    ] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST when it exists and is not empty.")
    ] = False,
) -> None:
    """Write a model as graphs that onnxruntime runs without torch, and compare their answers with the model's.

    Graphs that do not agree with the model are refused. Ask what was written with `flashsloth ask --model DST`, or
    with `flashsloth-edge ask DST`, a package of its own that needs no torch.

    [bold]Examples[/bold]

      flashsloth export nano nano-onnx
      flashsloth export nano nano-int8 --weights int8
      flashsloth export nano nano-openvino --format openvino --weights int4
      flashsloth ask photo.jpg "What is in the picture?" --model nano-onnx
    """
    from transformers.utils import logging

    from flashsloth.export import export_folder

    logging.disable_progress_bar()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("starting ...") as status:
        manifest = export_folder(
            model, destination, format, weights, overwrite, on_step=lambda step: status.update(f"{step} ...")
        )
    found = manifest.check
    size = sum(path.stat().st_size for path in destination.iterdir()) / 1e6
    messages.say(
        f"wrote {destination}, {size:.1f} MB; {found['equal_answers']} of {found['answers']} answers equal the "
        f"model's, logits differ by {found['logit_difference']:.1e} of their largest at most"
    )

"""`flashsloth info`: what a model is made of and what it takes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from flashsloth_cli import options
from flashsloth_cli.tables import table_console


def _parse_size(text: str) -> tuple[int, int]:
    width, separator, height = text.lower().partition("x")
    if not separator or not (width.isdigit() and height.isdigit()) or not int(width) or not int(height):
        raise ValueError(f"--image-size is {text!r}; give WIDTHxHEIGHT in pixels, such as 1280x720")
    return int(width), int(height)


def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Packaged model, folder, or hub id.", show_default=False)
    ] = "nano",
    image_size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="An image to count tokens for.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show architecture, parameters by part, visual tokens and memory of a model. No weights are loaded.

    [bold]Examples[/bold]

      flashsloth info nano
      flashsloth info Tongbo/FlashSloth_HD-3.2B --image-size 1280x720
    """
    from flashsloth.checkpoints import hub, untrusted
    from flashsloth.checkpoints.pretrained import load_config, reading
    from flashsloth.checkpoints.summary import summarize

    size = None if image_size is None else _parse_size(image_size)
    folder = hub.resolve(model)
    if hub.is_adapter(folder):
        from flashsloth.checkpoints.adapters import base_folder

        folder = base_folder(folder)
    with reading(folder, untrusted.CONFIG):
        summary = summarize(load_config(folder), size)
    if as_json:
        options.write_json(summary.to_dict())
        return
    console = table_console()
    table = Table("part", "what", "parameters", box=None, pad_edge=False, title=Text(model), title_justify="left")
    table.columns[-1].justify = "right"
    for part in summary.parts:
        table.add_row(part.name, Text(part.description), f"{part.parameters:,}")
    table.add_row("total", "", f"{summary.parameters:,}", style="bold")
    console.print(table)
    console.print(f"\n{summary.views}", markup=False, soft_wrap=True)
    console.print(f"visual tokens an image: {summary.visual_tokens} (uncompressed: {summary.uncompressed_tokens})")
    if len(summary.visual_token_choices) > 1:
        console.print(f"a request may choose: {', '.join(map(str, summary.visual_token_choices))} visual tokens")
    weights = ", ".join(f"{count / 1e6:,.1f} MB {name}" for name, count in summary.weight_bytes.items())
    console.print(f"weights in memory: {weights}")
    console.print(f"cache at bfloat16: {summary.cache_bytes_per_token / 1024:,.1f} KiB a token")

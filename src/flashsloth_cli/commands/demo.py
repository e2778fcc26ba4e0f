"""`flashsloth demo`: three questions about sample images."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from flashsloth_cli import options
from flashsloth_cli.tables import table_console


def demo(
    model: options.Model = "nano",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 8,
) -> None:
    """Answer three questions about sample images and show where the time goes."""
    from flashsloth.checkpoints.hub import ASSETS

    console = table_console()
    session = options.load_session(model, device, dtype)
    folder = ASSETS / "samples"
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    # The first call pays for memory and kernels that later ones find ready; it is not what a user waits for.
    session.ask(folder / samples[0]["image"], samples[0]["question"], max_new_tokens=1)
    answers = [
        session.ask(folder / sample["image"], sample["question"], max_new_tokens=max_new_tokens) for sample in samples
    ]

    table = Table("", *(sample["image"] for sample in samples), box=None, pad_edge=False)
    table.add_row("question", *(sample["question"] for sample in samples))
    table.add_row("answer", *(Text(answer.text, style="bold") for answer in answers))
    table.add_row("expected", *(sample["answer"] for sample in samples))
    table.add_row("visual tokens", *(str(answer.visual_tokens) for answer in answers))
    table.add_row("  uncompressed", *(str(answer.uncompressed_tokens) for answer in answers))
    for stage in options.STAGES:
        table.add_row(stage, *(options.milliseconds(getattr(answer.timings, stage)) for answer in answers))
    table.add_row("total", *(options.milliseconds(answer.timings.total) for answer in answers))
    table.add_row("new tokens", *(str(answer.new_tokens) for answer in answers))
    console.print(
        f"\n{session.name} on {session.device}, {session.model.dtype}, sample images in {folder}\n",
        markup=False,
        soft_wrap=True,
    )
    console.print(table)
    console.print(
        "\nYour own image:\n"
        '  flashsloth ask photo.jpg "What is in the picture?"     (.venv/bin/flashsloth after `make demo`)\n'
        "\nThe published 3.2B checkpoint (downloaded and converted once, 6.4 GB each):\n"
        '  flashsloth ask photo.jpg "What is in the picture?" --model Tongbo/FlashSloth-3.2B\n'
        '  flashsloth ask receipt.jpg "What is the total?" --model Tongbo/FlashSloth_HD-3.2B',
        markup=False,
        soft_wrap=True,
    )

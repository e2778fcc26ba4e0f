"""`flashsloth bench tokens`: what models cost by arithmetic alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import DEFAULT_SIZES


def tokens(
    models: Annotated[
        str | None, typer.Option(help="Names separated by commas; default all. See --list.", show_default=False)
    ] = None,
    sizes: Annotated[str, typer.Option(metavar="WxH,...", help="Image sizes in pixels.")] = DEFAULT_SIZES,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the prompt beside the image.", min=0)] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; only memory depends on it.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Prompts at a time; only memory depends on it.", min=1)] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number here.", show_default=False)
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the tables here.", show_default=False)
    ] = None,
    list_models: Annotated[bool, typer.Option("--list", help="List the models and stop.")] = False,
) -> None:
    """Visual tokens, parameters, FLOPs and memory, from configurations alone.

    Each model sees the image as its own default preprocessing cuts it.
    A multiply-add is two FLOPs; attention counts every pair of positions; the
    head runs once. Activations are an estimate.

    [bold]Examples[/bold]

      flashsloth bench tokens

      flashsloth bench tokens --models flashsloth,qwen2-vl-2b --sizes 1920x1080

      flashsloth bench tokens --json tokens.json --markdown tokens.md
    """
    from rich.console import Console

    from flashsloth.bench.models import MODELS
    from flashsloth.bench.results import versions
    from flashsloth.bench.tables import token_markdown, token_notes, token_tables
    from flashsloth.bench.tokens import available_models, measure_all
    from flashsloth.checkpoints.files import write_whole
    from flashsloth.reports.table import Column, Table

    from ...tables import print_table, table_console
    from . import options

    console = table_console()
    if list_models:
        columns = (
            Column("name", lambda item: item[0]),
            Column("model", lambda item: item[1].title),
            Column("built", lambda item: item[1].origin),
        )
        print_table(console, Table.of("", columns, MODELS.items(), texts=3))
        return
    names = None if models is None else options.names(models)
    sizes_given = options.sizes(sizes, "--sizes")
    with Console(stderr=True).status("counting") as status:
        costs = measure_all(
            names, sizes_given, text_tokens, dtype, batch, progress=lambda name: status.update(f"counting {name}")
        )
    missing = [name for name in MODELS if names is None and name not in available_models()]
    if missing:
        Console(stderr=True).print(f"left out, needs a newer transformers: {', '.join(missing)}", style="dim")
    for table in token_tables(costs, text_tokens, dtype, batch):
        print_table(console, table)
        console.print()
    for line in token_notes(costs):
        console.print(line, style="dim")
    settings = {"sizes": sizes_given, "text_tokens": text_tokens, "dtype": dtype, "batch": batch}
    if json_file is not None:
        content = {"versions": versions(), "settings": settings, "models": [cost.to_dict() for cost in costs]}
        write_whole(json_file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if markdown_file is not None:
        made_by = ", ".join(f"{name} {version}" for name, version in versions().items())
        write_whole(markdown_file, f"<!-- {made_by} -->\n\n{token_markdown(costs, text_tokens, dtype, batch)}")

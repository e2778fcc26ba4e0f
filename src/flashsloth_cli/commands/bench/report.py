"""`flashsloth bench report`: plots and a page from result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import numbers


def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="JSON files of `bench run`.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the page and its plots.")] = Path("report"),
    baseline: Annotated[str, typer.Option(help="Model the others are compared with.")] = "flashsloth",
    output_tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Lengths to state totals for, beside those measured.")
    ] = "8,32,128,512",
) -> None:
    """Draw what `bench run` measured, and say where FlashSloth wins and where it loses.

    Writes report.md and PNGs: time to the first token by stage and by image
    size, total time against output length with the lengths at which a rival
    catches up, visual tokens against time, memory, and how time and memory grow
    with images, batch and output length. What a file lacks is named, not drawn.

    Several files are several runs: other machines, dtypes, threads or versions
    of the code are shown apart and never compared.

    [bold]Examples[/bold]

      flashsloth bench run --sizes 384x384,768x768 --output-tokens 1,64

      flashsloth bench report bench.json -o report

      flashsloth bench report cpu.json cuda.json --output-tokens 16,256 -o both
    """
    lengths = numbers(output_tokens, "--output-tokens")
    for path in files:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {problem}; give JSON files written by flashsloth bench run")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder")

    from flashsloth.bench.page import write_report
    from flashsloth.bench.results import Results

    found = {str(path): Results.load(path) for path in files}
    page = write_report(found, output, baseline, lengths)
    typer.echo(page)

"""`flashsloth bench`: what FlashSloth and its peers cost."""

from __future__ import annotations

import typer

from .report import report
from .run import run
from .tokens import tokens
from .train import train

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)
for command in (tokens, run, report, train):
    app.command()(command)


@app.callback()
def bench() -> None:
    """Compare the cost of FlashSloth with that of other small vision-language models at their real sizes.

    [bold]tokens[/bold] counts by arithmetic: seconds, on any machine, no weights, no download.
    [bold]run[/bold] measures: minutes, with random weights in memory, no download.
    [bold]report[/bold] draws what was measured, and says where FlashSloth loses.
    [bold]train[/bold] times an optimiser step with compression and without.
    """

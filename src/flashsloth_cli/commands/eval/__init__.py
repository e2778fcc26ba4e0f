"""`flashsloth eval`: scores that can be trusted."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from .compare import compare
from .fetch import fetch
from .run import run

RUN = "run"


class _RunByDefault(TyperGroup):
    """`eval MODEL` is `eval run MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args != ["--help"]:
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_RunByDefault, add_completion=False, rich_markup_mode="rich", no_args_is_help=True)
for command in (run, fetch, compare):
    app.command()(command)


@app.callback()
def evaluation() -> None:
    """Score a model on the 14 benchmarks of the paper, or on the project's own held-out sets.

    [bold]flashsloth eval MODEL[/bold] is short for [bold]flashsloth eval run MODEL[/bold]; see the --help of that.

      flashsloth eval nano --suite nano

      flashsloth eval fetch data/

      flashsloth eval Tongbo/FlashSloth-3.2B --suite paper --data data/
    """

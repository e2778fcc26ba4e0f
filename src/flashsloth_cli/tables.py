"""Wide tables on the terminal, and whole in a file."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

# wide enough for every column where the output is no terminal
FILE_WIDTH = 170


def table_console() -> Console:
    """Standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def print_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
) -> None:
    """The first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)

"""Wide tables on the terminal, and whole in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from flashsloth.reports.table import Table

# wide enough for every column where the output is no terminal
FILE_WIDTH = 170


def table_console() -> Console:
    """Standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def print_table(console: Console, table: Table) -> None:
    """A table with its title above it."""
    shown = RichTable(title=table.title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    for index, heading in enumerate(table.columns):
        shown.add_column(heading, justify="right" if index >= table.texts else "left")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)

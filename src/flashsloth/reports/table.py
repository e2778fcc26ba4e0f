"""Tables: columns that know how to read and to write a value, as Markdown or on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

KIBI, MEBI, MEGA, GIGA, TERA = 2**10, 2**20, 1e6, 1e9, 1e12
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """What a table says about each item in one place.

    Attributes:
        heading: above it.
        value: from an item to a number or text, None where it is not known.
        show: how a value is written: a format specification, or a function.
        unit: what numbers are divided by.
    """

    heading: str
    value: Callable[[Any], Any]
    show: str | Callable[[Any], str] = ""
    unit: float | None = None

    def cell(self, item: Any) -> str:
        """The value of an item as text."""
        value = self.value(item)
        if value is None:
            return NOTHING
        value = value if self.unit is None else value / self.unit
        return format(value, self.show) if isinstance(self.show, str) else self.show(value)


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        title: one line, or nothing.
        columns: headings.
        rows: as many texts as columns.
        texts: how many columns at the left hold text; the others are aligned as numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    texts: int = 1

    @classmethod
    def of(cls, title: str, columns: Sequence[Column], items: Iterable[Any], texts: int = 1) -> Table:
        """A row for every item."""
        rows = [tuple(column.cell(item) for column in columns) for item in items]
        return cls(title, tuple(column.heading for column in columns), rows, texts)

    def __str__(self) -> str:
        """The table in the dialect of GitHub, under its title in bold."""
        ruler = ["---"] * self.texts + ["---:"] * (len(self.columns) - self.texts)
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
            for line in (self.columns, ruler, *self.rows)
        ]
        return "\n".join([f"**{self.title}**", "", *lines] if self.title else lines)

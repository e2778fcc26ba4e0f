"""`flashsloth eval compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    before: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="Folder of another run of the same tasks.", show_default=False)],
    flips: Annotated[int, typer.Option(help="Flipped samples named a task.", min=0)] = 5,
) -> None:
    """How far two runs are apart, task by task: a paired bootstrap, and which answers flipped.

    The interval holds 95 % of the differences of samples drawn again; a difference is clear where zero is outside it.

    [bold]Example[/bold]

      flashsloth eval compare eval-nano-nano eval-mine-nano
    """
    from flashsloth.evaluate.report import differences, read_results
    from flashsloth.reports.table import Column, Table
    from flashsloth_cli.tables import print_table, table_console

    columns = (
        Column("benchmark", lambda item: item[0]["benchmark"]),
        Column("samples", lambda item: item[1].samples),
        Column("difference", lambda item: item[1].mean, "+.2f"),
        Column("from", lambda item: item[1].low, "+.2f"),
        Column("to", lambda item: item[1].high, "+.2f"),
        Column("clear", lambda item: "yes" if item[1].is_clear else "no"),
        Column("better", lambda item: len(item[1].gained)),
        Column("worse", lambda item: len(item[1].lost)),
        Column("better samples", lambda item: " ".join(map(str, item[1].gained[:flips])) or None),
        Column("worse samples", lambda item: " ".join(map(str, item[1].lost[:flips])) or None),
    )
    found = differences(after, read_results(after)["rows"], before)
    print_table(table_console(), Table.of(f"{after} minus {before}, points", columns, found))

"""Put the tables of docs/explain-check.json into docs/explain.md: `python scripts/explain_tables.py`.

The report is that of `flashsloth explain-check --json docs/explain-check.json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
REPORT, PAGE = DOCS / "explain-check.json", DOCS / "explain.md"
BETWEEN = re.compile(r"(?<=<!-- tables -->\n\n).*?(?=\n<!-- end of tables -->)", re.DOTALL)
NAMES = {"embq": "EmbQ", "sap": "SAP", "decoder": "decoder", "centre": "centre", "random": "random"}
GROUPS = {"all": "all", "scenes": "scenes", "charts": "charts", "text": "receipts"}
COLUMNS = ("deletion_area", "insertion_area", "pointing", "share_on_it")
CHANGES = ("the same question again", "other words for it", "another question")


def shown(found: dict[str, Any] | None, with_interval: bool) -> str:
    if found is None:
        return ""
    interval = f" [{found['low']:.2f}, {found['high']:.2f}]" if with_interval else ""
    return f"{found['mean']:.2f}{interval}"


def tables(report: dict[str, Any]) -> str:
    """Of what was measured, and of how far maps move."""
    lines = [
        "| questions | map | deletion, less is better | insertion, more is better | pointing | share on it |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for group, name in GROUPS.items():
        found = report["groups"][group]
        for layer, label in NAMES.items():
            cells = [shown(found[column].get(layer), group == "all") for column in COLUMNS]
            lines.append(f"| {name} ({found['questions']}) | {label} | {' | '.join(cells)} |")
    lines += ["", "| map | " + " | ".join(f"{change}, moves by" for change in CHANGES) + " |", "|---|---:|---:|---:|"]
    for layer, changes in report["groups"]["all"]["moves"].items():
        cells = [f"{changes[change]['mean']:.3f} ({changes[change]['n']})" for change in CHANGES]
        lines.append(f"| {NAMES[layer]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    report = json.loads(REPORT.read_text())
    text, count = BETWEEN.subn(lambda _: tables(report), PAGE.read_text())
    assert count == 1, f"{PAGE} has no place for the tables"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()

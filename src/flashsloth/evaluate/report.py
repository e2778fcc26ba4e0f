"""What was evaluated as a page in Markdown, one in HTML with samples, and a plot beside the published rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from ..checkpoints.files import read_json, write_whole
from ..reports.page import write_page
from ..reports.table import Column, Table
from .bootstrap import Difference, compare
from .runner import RESULTS_FILE, SAMPLES

MARKDOWN, HTML, PLOT = "report.md", "report.html", "report.png"
TEMPLATES = Path(str(files(__package__) / "templates"))
AS_IT_IS = "as it is"


def _value(name: str) -> Any:
    return lambda row: row.get(name)


SCORES = (
    Column("benchmark", _value("benchmark")),
    Column("variant", lambda row: row["variant"] or AS_IT_IS),
    Column("score", _value("score"), ".2f"),
    Column("published", _value("published"), ".1f"),
    Column("tolerance", lambda row: row["tolerance"] if row["published"] is not None else None, "g"),
    Column("verdict", _value("verdict")),
    Column("samples", _value("samples"), "d"),
    Column("visual tokens", _value("visual_tokens"), ".1f"),
    Column(
        "ms a sample", lambda row: None if row["seconds_a_sample"] is None else 1000 * row["seconds_a_sample"], ".1f"
    ),
)
PROVENANCE = (
    Column("benchmark", _value("benchmark")),
    Column("variant", lambda row: row["variant"] or AS_IT_IS),
    Column("suite", _value("suite")),
    Column("task", _value("task")),
    Column("version", _value("version"), str),
    Column("split", _value("split")),
    Column("metric", _value("metric")),
    Column("first prompt", _value("prompt"), lambda text: " ".join(json.dumps(text, ensure_ascii=False).split())),
    Column("dtype", _value("dtype")),
    Column("quantisation", _value("quantization")),
    Column("model", _value("model")),
    Column("weights", _value("weights")),
    Column("commit", _value("commit")),
    Column("harness", _value("harness")),
    Column("data revision", _value("data_revision")),
    Column("note", _value("note")),
)
PUBLISHED = ("benchmark", "FlashSloth", "FlashSloth-HD")


def write_report(folder: Path) -> list[Path]:
    """Pages of the results in a folder.

    Raises:
        ValueError: the folder holds no results.
    """
    results = read_results(folder)
    rows = results["rows"]
    values = {
        "results": results,
        "scores": Table.of("", SCORES, rows, texts=2),
        "provenance": Table.of("", PROVENANCE, rows, texts=len(PROVENANCE)),
        "details": [(row, _details(row)) for row in rows if row.get("details")],
        "unfinished": [row for row in rows if row["reason"]],
        "differences": differences(folder, rows),
        "published": _published(rows),
    }
    written = [folder / MARKDOWN, folder / HTML]
    write_page(written[0], TEMPLATES / "report.md.jinja", **values)
    shown = [(row, *_shown(samples_of(folder, row))) for row in rows if not row["variant"]]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    write_whole(written[1], environment.get_template("report.html.jinja").render(**values, shown=shown))
    if any(row["published"] is not None for row in rows):
        from .report_plot import draw

        written.append(draw(rows, folder / PLOT))
    return written


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` of a folder.

    Raises:
        ValueError: it holds none.
    """
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(f"{folder} holds no {RESULTS_FILE}; `flashsloth eval MODEL --output {folder}` writes one")
    return read_json(folder / RESULTS_FILE)


def samples_of(folder: Path, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Samples of a row; none where it has no score at all."""
    from .variants import Variant

    path = folder / SAMPLES / Variant(row["variant"]).folder / f"{row['task']}.json"
    return read_json(path)["samples"] if row["samples"] and path.is_file() else []


def differences(
    folder: Path, rows: Sequence[Mapping[str, Any]], before: Path | None = None
) -> list[tuple[Mapping[str, Any], Difference]]:
    """Variants beside the model as it is; with `before`, this run beside an earlier one, task by task.

    Raises:
        ValueError: the two folders hold no task in common, or other data.
    """
    reference = folder if before is None else before
    bases = {
        row["task"]: row for row in (rows if before is None else read_results(before)["rows"]) if not row["variant"]
    }
    found = []
    for row in rows:
        is_variant = bool(row["variant"])
        if row["task"] not in bases or is_variant != (before is None):
            continue
        first, second = samples_of(reference, bases[row["task"]]), samples_of(folder, row)
        if any(each["score"] is not None for each in first) and any(each["score"] is not None for each in second):
            found.append((row, compare(first, second)))
    if before is not None and not found:
        raise ValueError(f"{before} and {folder} have no scored task in common")
    return found


def _details(row: Mapping[str, Any]) -> Table:
    columns = (Column("part", lambda item: item[0]), Column("score", lambda item: item[1], ".4g"))
    return Table.of("", columns, row["details"].items())


def _published(rows: Sequence[Mapping[str, Any]]) -> str:
    published = {row["benchmark"]: row["published_all"] for row in rows if row["published_all"]}
    if not published:
        return ""
    names = list(next(iter(published.values())))
    columns = [Column("benchmark", lambda item: item[0])]

    def score_of(name: str) -> Callable[[tuple[str, dict[str, float]]], float | None]:
        return lambda item: item[1].get(name)

    columns += [Column(name, score_of(name), "g") for name in names]
    return str(Table.of("", columns, published.items()))


def _shown(samples: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(right, wrong) of those that are shown."""
    picked = [each for each in samples if each["shown"]]
    return [each for each in picked if each["score"] == 1.0], [each for each in picked if each["score"] != 1.0]

"""What a check of maps found: rows on disk, means with intervals, and a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..inference.explanation import LAYERS
from .faithfulness import BASELINES, FRACTIONS, Checked

DRAWS = 2000  # of the bootstrap
COLOURS = {"embq": "#c8391f", "sap": "#e8a317", "decoder": "#6b3fa0", "centre": "#4c6f8a", "random": "#8a8a8a"}
NAMES = {"embq": "EmbQ", "sap": "SAP", "decoder": "decoder", "centre": "centre", "random": "random"}


def read_rows(path: Path, settings: dict[str, Any]) -> list[Checked]:
    """Rows that an earlier run with the same settings has written; none where there is no file.

    Raises:
        ValueError: the file is of other settings, or no such file at all.
    """
    if not path.is_file():
        return []
    first, *rest = path.read_text(encoding="utf-8").splitlines() or [""]
    try:
        found = json.loads(first)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no file of rows of this command; give another name") from error
    if found != settings:
        raise ValueError(
            f"{path} was written with other settings ({first:.200}); give another name, or delete it to begin anew"
        )
    rows: list[Checked] = []
    for line in rest:
        try:
            rows.append(Checked(**json.loads(line)))
        except json.JSONDecodeError:
            break  # of a run that was interrupted while it wrote
    return rows


def write_rows(path: Path, settings: dict[str, Any], rows: Iterable[Checked]) -> None:
    """The settings, then a line for each question."""
    lines = [json.dumps(settings), *(json.dumps(asdict(row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def area(curve: Sequence[float]) -> float:
    """The mean probability over all fractions, by trapezoids."""
    points = zip(itertools.pairwise(FRACTIONS), itertools.pairwise(curve), strict=True)
    return sum((right - left) * (first + second) / 2 for (left, right), (first, second) in points)


def mean_with_interval(values: Sequence[float], images: Sequence[int]) -> dict[str, float | int]:
    """Mean and its 95% interval by a bootstrap over images, whose questions belong together."""
    numbers, index = np.unique(images, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(0).integers(0, len(numbers), (DRAWS, len(numbers)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(np.mean(values))
    return {"mean": round(mean, 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": len(values)}


def summarize(rows: Sequence[Checked], settings: dict[str, Any]) -> dict[str, Any]:
    """Plain values, for JSON: of all questions, of each family, and of those answered rightly."""
    groups: dict[str, list[Checked]] = {"all": list(rows)}
    for family in dict.fromkeys(row.family for row in rows):
        groups[family] = [row for row in rows if row.family == family]
    groups["answered rightly"] = [row for row in rows if row.is_correct]
    return {
        "settings": settings,
        "fractions": FRACTIONS,
        "questions": len(rows),
        "images": len({row.image for row in rows}),
        "accuracy": round(float(np.mean([row.is_correct for row in rows])), 4),
        "groups": {name: _summary(own) for name, own in groups.items() if own},
    }


def _summary(rows: Sequence[Checked]) -> dict[str, Any]:
    images = [row.image for row in rows]

    def table(values: Callable[[Checked], dict[str, float]]) -> dict[str, Any]:
        names = dict.fromkeys(name for row in rows for name in values(row))
        found = {}
        for name in names:
            own = [(values(row)[name], image) for row, image in zip(rows, images, strict=True) if name in values(row)]
            found[name] = mean_with_interval(*zip(*own, strict=True))
        return found

    def areas(kind: str) -> Callable[[Checked], dict[str, float]]:
        return lambda row: {name: area(curve) for name, curve in getattr(row, kind).items()}

    def against_random(kind: str) -> Callable[[Checked], dict[str, float]]:
        def difference(row: Checked) -> dict[str, float]:
            found = areas(kind)(row)
            return {name: value - found["random"] for name, value in found.items() if name != "random"}

        return difference

    curves = {
        kind: {
            name: [round(float(value), 4) for value in np.mean([getattr(row, kind)[name] for row in rows], axis=0)]
            for name in getattr(rows[0], kind)
        }
        for kind in ("deletion", "insertion")
    }
    return {
        "questions": len(rows),
        "deletion_area": table(areas("deletion")),
        "insertion_area": table(areas("insertion")),
        "deletion_against_random": table(against_random("deletion")),
        "insertion_against_random": table(against_random("insertion")),
        "pointing": table(lambda row: row.hits),
        "share_on_it": table(lambda row: row.shares),
        "moves": {
            layer: table(lambda row, layer=layer: row.moves[layer])  # type: ignore[misc]
            for layer in rows[0].moves
        },
        "curves": curves,
    }


def order_of(names: Iterable[str]) -> list[str]:
    """Layers first, then baselines."""
    given = set(names)
    return [name for name in (*LAYERS, *BASELINES) if name in given]


def plot(summary: dict[str, Any], path: Path) -> None:
    """Deletion and insertion curves and the pointing game, side by side.

    Raises:
        ImportError: matplotlib is missing.
    """
    from ..reports.plots import WIDTH, figure_of, save

    whole = summary["groups"]["all"]
    figure = figure_of(WIDTH, 3.4)
    axes = figure.subplots(1, 3)
    for axis, kind, title in (
        (axes[0], "deletion", "most attended masked first"),
        (axes[1], "insertion", "most attended shown first"),
    ):
        for name in order_of(whole["curves"][kind]):
            style = "--" if name in BASELINES else "-"
            axis.plot(
                summary["fractions"], whole["curves"][kind][name], style, color=COLOURS[name], label=NAMES[name],
                marker=".",
            )  # fmt: skip
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("masked share of the image" if kind == "deletion" else "shown share of the image")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("probability of the answer")
    names = order_of(whole["pointing"])
    found = [whole["pointing"][name] for name in names]
    errors = [
        [max(0.0, each["mean"] - each["low"]) for each in found],
        [max(0.0, each["high"] - each["mean"]) for each in found],
    ]
    axes[2].bar(
        [NAMES[name] for name in names],
        [each["mean"] for each in found],
        yerr=errors,
        color=[COLOURS[name] for name in names],
    )
    axes[2].set_title("maximum on what was asked about", fontsize="medium")
    axes[2].tick_params(axis="x", labelrotation=30)
    axes[2].grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    save(figure, path)

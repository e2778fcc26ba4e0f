"""Bars of the scores beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reports.plots import WIDTH, figure_of, legend_below, save

OURS = "this run"
HEIGHT = 0.45  # inches of a benchmark


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """A group of bars a benchmark: this run, and the paper's models; scores on other scales as shares of the best."""
    shown = [row for row in rows if not row["variant"] and row["published_all"]]
    names = [OURS, *shown[0]["published_all"]]
    figure = figure_of(WIDTH, 1.2 + HEIGHT * len(shown))
    axes = figure.subplots()
    thickness = 0.8 / len(names)
    for place, name in enumerate(names):
        values = [row["score"] if name == OURS else row["published_all"][name] for row in shown]
        tops = [max(100.0, *row["published_all"].values(), row["score"] or 0) for row in shown]
        lengths = [0.0 if value is None else 100 * value / top for value, top in zip(values, tops, strict=True)]
        heights = [row + thickness * (place - (len(names) - 1) / 2) for row in range(len(shown))]
        axes.barh(heights, lengths, height=thickness, label=name)
    axes.set_yticks(range(len(shown)), [row["benchmark"] for row in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("score, of 100 (MME: of the best)")
    axes.grid(axis="x", alpha=0.3)
    legend_below(figure, axes, note="published: Tong et al., CVPR 2025, released model zoo")
    save(figure, path)
    return path

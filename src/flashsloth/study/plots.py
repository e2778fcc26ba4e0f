"""Plots of a study: accuracy against cost, and accuracy by task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .results import VariantResults, task_names

_GIGA = 1e9


def draw_costs(results: dict[str, VariantResults], reference: str, path: Path) -> None:
    """Exact match (mean; bars from the lowest to the highest seed) against tokens, operations and training time."""
    has_reference = reference in results
    base = results[reference].measured("training", "seconds").mean if has_reference else 1.0
    positions = _set_apart({name: variant.measured("visual_tokens").mean for name, variant in results.items()})
    axes_of: list[tuple[str, Callable[[VariantResults], float]]] = [
        ("visual tokens an image (set apart where equal)", lambda variant: positions[variant.name]),
        ("GFLOPs of a prefill", lambda variant: variant.measured("flops", "prefill", "total").mean / _GIGA),
        (
            f"training time / that of “{results[reference].label}”" if has_reference else "training seconds",
            lambda variant: variant.measured("training", "seconds").mean / base,
        ),
    ]
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    handles: list[Any] = []
    for axes, (label, cost) in zip(figure.subplots(1, 3, sharey=True), axes_of, strict=True):
        handles = []
        for index, variant in enumerate(results.values()):
            accuracy = variant.accuracy()
            handles.append(
                axes.errorbar(
                    cost(variant),
                    100 * accuracy.mean,
                    yerr=_errors(accuracy.mean, accuracy.low, accuracy.high),
                    fmt="o",
                    capsize=3,
                    color=f"C{index}",
                    label=variant.label,
                )
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        if label.startswith("visual"):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({variant.measured("visual_tokens").mean for variant in results.values()}))
            axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
            axes.minorticks_off()
            axes.set_ylabel("exact match in %")
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    _save(figure, path)


def draw_tasks(results: dict[str, VariantResults], path: Path) -> None:
    """Bars of exact match for every task, one panel a family, one colour a variant."""
    tasks = task_names(results)
    families = list(dict.fromkeys(task.partition("/")[0] for task in tasks))
    most = max(sum(task.startswith(f"{family}/") for task in tasks) for family in families)
    height = 0.8 / len(results)
    figure = Figure(figsize=(4.6 * len(families), 1.5 + 0.14 * most * (len(results) + 1)), layout="constrained")
    panels = list(figure.subplots(1, len(families), squeeze=False)[0])
    for axes, family in zip(panels, families, strict=True):
        of_family = [task for task in tasks if task.startswith(f"{family}/")]
        for index, variant in enumerate(results.values()):
            spreads = [variant.accuracy(task) for task in of_family]
            rows = [row for row, spread in enumerate(spreads) if spread.by_seed]
            known = [spreads[row] for row in rows]
            errors = [_errors(spread.mean, spread.low, spread.high) for spread in known]
            axes.barh(
                [row + (index + 0.5) * height - 0.4 for row in rows],
                [100 * spread.mean for spread in known],
                height,
                xerr=[[error[side][0] for error in errors] for side in (0, 1)],
                error_kw={"elinewidth": 0.6},
                color=f"C{index}",
                label=variant.label,
            )
        axes.set_yticks(range(len(of_family)), [task.partition("/")[2] for task in of_family], fontsize="small")
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_title(family)
        axes.set_xlabel("exact match in %")
        axes.grid(axis="x", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    _save(figure, path)


def _set_apart(tokens: dict[str, float]) -> dict[str, float]:
    """Spread equal numbers a little on a logarithmic axis, so that none hides another."""
    places = {}
    for name, value in tokens.items():
        equal = [other for other, count in tokens.items() if count == value]
        places[name] = value * 1.07 ** (equal.index(name) - (len(equal) - 1) / 2)
    return places


def _errors(mean: float, low: float, high: float) -> list[list[float]]:
    """Lengths below and above the mean, in %; rounding must not make them negative."""
    return [[100 * max(0.0, mean - low)], [100 * max(0.0, high - mean)]]


def _save(figure: Figure, path: Path) -> None:
    # no date and no version in the file: the same numbers give the same bytes
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})

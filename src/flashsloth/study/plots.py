"""Plots of a study: accuracy against cost, and accuracy by task."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..reports.plots import error_bars, figure_of, legend_below, logarithmic, save
from ..reports.table import GIGA
from .results import Spread, VariantResults, task_names


def draw_costs(results: dict[str, VariantResults], reference: str, path: Path) -> None:
    """Exact match (mean; bars from the lowest to the highest seed) against tokens, operations and training time."""
    has_reference = reference in results
    base = results[reference].measured("training", "seconds").mean if has_reference else 1.0
    positions = _set_apart({name: variant.measured("visual_tokens").mean for name, variant in results.items()})
    axes_of: list[tuple[str, Callable[[VariantResults], float]]] = [
        ("visual tokens an image (set apart where equal)", lambda variant: positions[variant.name]),
        ("GFLOPs of a prefill", lambda variant: variant.measured("flops", "prefill", "total").mean / GIGA),
        (
            f"training time / that of “{results[reference].label}”" if has_reference else "training seconds",
            lambda variant: variant.measured("training", "seconds").mean / base,
        ),
    ]
    figure = figure_of(13, 4.6)
    panels = list(figure.subplots(1, 3, sharey=True))
    for axes, (label, cost) in zip(panels, axes_of, strict=True):
        for index, variant in enumerate(results.values()):
            spread = variant.accuracy()
            axes.errorbar(
                cost(variant), 100 * spread.mean, yerr=_errors([spread]), fmt="o", capsize=3, color=f"C{index}",
                label=variant.label,
            )  # fmt: skip
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    logarithmic(panels[0].xaxis, base=2)
    panels[0].set_xticks(sorted({variant.measured("visual_tokens").mean for variant in results.values()}))
    panels[0].minorticks_off()
    panels[0].set_ylabel("exact match in %")
    legend_below(figure, panels[0], columns=4)
    save(figure, path)


def draw_tasks(results: dict[str, VariantResults], path: Path) -> None:
    """Bars of exact match for every task, one panel a family, one colour a variant."""
    tasks = task_names(results)
    families = list(dict.fromkeys(task.partition("/")[0] for task in tasks))
    most = max(sum(task.startswith(f"{family}/") for task in tasks) for family in families)
    height = 0.8 / len(results)
    figure = figure_of(4.6 * len(families), 1.5 + 0.14 * most * (len(results) + 1))
    panels = list(figure.subplots(1, len(families), squeeze=False)[0])
    for axes, family in zip(panels, families, strict=True):
        of_family = [task for task in tasks if task.startswith(f"{family}/")]
        for index, variant in enumerate(results.values()):
            spreads = [variant.accuracy(task) for task in of_family]
            rows = [row for row, spread in enumerate(spreads) if spread.by_seed]
            known = [spreads[row] for row in rows]
            axes.barh(
                [row + (index + 0.5) * height - 0.4 for row in rows],
                [100 * spread.mean for spread in known],
                height,
                xerr=_errors(known),
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
    legend_below(figure, panels[0], columns=4)
    save(figure, path)


def _set_apart(tokens: dict[str, float]) -> dict[str, float]:
    """Spread equal numbers a little on a logarithmic axis, so that none hides another."""
    places = {}
    for name, value in tokens.items():
        equal = [other for other, count in tokens.items() if count == value]
        places[name] = value * 1.07 ** (equal.index(name) - (len(equal) - 1) / 2)
    return places


def _errors(spreads: Sequence[Spread]) -> list[list[float]]:
    """Lengths below and above the means, in %."""
    ends = ([100 * getattr(spread, end) for spread in spreads] for end in ("mean", "low", "high"))
    return error_bars(*ends)

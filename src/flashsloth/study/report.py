"""The report of a study: one Markdown page, its plots, and the same numbers as JSON."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints.files import replace_file
from ..evaluate.synthetic import ALL
from ..reports.page import write_page
from ..reports.table import GIGA, MEBI, NOTHING, Column, Table
from .config import Claim, Study
from .measure import FLOP_PARTS
from .plan import Run, write_json
from .plots import draw_costs, draw_tasks
from .results import CONFIDENCE, Difference, Spread, VariantResults, collect, decide, majority, task_names

TEMPLATE = Path(__file__).with_name("page.md.jinja")


def write_report(study: Study, runs: Sequence[Run], name: str, publish: Path | None = None) -> Path:
    """Write the report of the finished runs into the study's folder.

    Args:
        runs: the whole study's, finished or not.
        name: of the files: NAME.md, NAME.json, NAME-costs.png, NAME-tasks.png.
        publish: folder that gets a copy of the page and the plots.

    Returns:
        path of the page.

    Raises:
        ValueError: no run is finished.
    """
    results = collect(study, runs)
    folder = study.output_dir
    costs, tasks = folder / f"{name}-costs.png", folder / f"{name}-tasks.png"
    draw_costs(results, study.reference, costs)
    draw_tasks(results, tasks)
    page, first = folder / f"{name}.md", _first_run(results)
    write_page(
        page,
        TEMPLATE,
        name=name,
        finished=sum(len(variant.runs) for variant in results.values()),
        planned=len(runs),
        images=" + ".join(f"{count:,} ({stage})" for stage, count in first["images"].items()),
        settings=study.evaluation,
        run=first,
        reference=study.variants[study.reference].label,
        plots=[costs.name, tasks.name],
        confidence=f"{CONFIDENCE:.0%}",
        variants=_variant_table(study, results),
        claims=_claim_table(study, results),
        differences=_difference_table(study, results),
        operations=_operations_table(results),
        tasks=_task_table(results),
    )
    write_json(folder / f"{name}.json", summary(study, results))
    if publish is not None:
        publish.mkdir(parents=True, exist_ok=True)
        for path in (page, costs, tasks):
            replace_file(publish / path.name, partial(shutil.copyfile, path))
    return page


def summary(study: Study, results: dict[str, VariantResults]) -> dict[str, Any]:
    """All means and spreads, and the claims, as plain values."""
    keys = [ALL, *study.evaluation.families, *task_names(results)]
    variants = {}
    for name, variant in results.items():
        run = _first_run({name: variant})
        variants[name] = {
            "label": variant.label,
            "visual_tokens": run["visual_tokens"],
            "query_tokens": run["query_tokens"],
            "exact_match": {key: variant.accuracy(key).to_json() for key in keys if variant.accuracy(key).by_seed},
            "training_seconds": variant.measured("training", "seconds").to_json(),
            "training_peak_bytes": variant.measured("training", "peak_bytes").to_json(),
            "training_added_bytes": variant.measured("training", "added_bytes").to_json(),
            "flops": run["flops"],
        }
    claims = []
    for claim in study.claims:
        found = decide(claim, results)
        entry: dict[str, Any] = {"text": claim.text, "margin": claim.margin, "verdict": None}
        if found is not None:
            entry |= {"difference": found.spread.to_json(), "interval": [found.low, found.high]}
            entry["verdict"] = found.verdict(claim.margin)
        claims.append(entry)
    return {"variants": variants, "claims": claims}


def _first_run(results: dict[str, VariantResults]) -> dict[str, Any]:
    return next(run for variant in results.values() for run in variant.runs.values())


def _variant_table(study: Study, results: dict[str, VariantResults]) -> Table:
    keys = (ALL, *study.evaluation.families)
    reference = results.get(study.reference)

    def run(variant: VariantResults) -> dict[str, Any]:
        return _first_run({variant.name: variant})

    def tokens(variant: VariantResults) -> str:
        queries = run(variant)["query_tokens"]
        return f"{run(variant)['visual_tokens']}{f' + {queries}' if queries else ''}"

    columns = (
        Column("variant", lambda variant: variant.label),
        Column("seeds", lambda variant: len(variant.runs)),
        *(Column(key, partial(VariantResults.accuracy, key=key), partial(percent, with_range=True)) for key in keys),
        Column("visual tokens", tokens),
        Column("prefill", lambda variant: run(variant)["flops"]["prefill"]["total"], ".3f", GIGA),
        Column("training step", lambda variant: run(variant)["flops"]["training_step"], ".3f", GIGA),
        Column("training time", partial(_with_ratio, reference, "seconds", 1, "s")),
        Column("memory", partial(_with_ratio, reference, "added_bytes", MEBI, "MiB")),
    )
    table = Table.of("", columns, results.values())
    chance = (f"{100 * majority(results, key):.1f}" for key in keys)
    return replace(table, rows=[*table.rows, ("most frequent answer", "", *chance, *[""] * 5)])


def _with_ratio(reference: VariantResults | None, what: str, unit: float, name: str, variant: VariantResults) -> str:
    value = variant.measured("training", what).mean
    base = 0.0 if reference is None else reference.measured("training", what).mean
    return f"{value / unit:,.0f} {name}{f' ({value / base:.2f}x)' if base else ''}"


def _claim_table(study: Study, results: dict[str, VariantResults]) -> Table:
    def by_seed(found: Difference) -> str:
        return ", ".join(f"{_points(value)} (seed {seed})" for seed, value in found.spread.by_seed.items())

    rows = []
    for claim in study.claims:
        found = decide(claim, results)
        margin = f"{100 * claim.margin:g}" if claim.margin else ""
        told = ("not measured; a variant has no finished run", *[NOTHING] * 3)
        if found is not None:
            told = (f"**{found.verdict(claim.margin)}**", _points(found.spread.mean), _interval(found), by_seed(found))
        rows.append((claim.text, told[0], margin, *told[1:]))
    return Table("", ("claim", "verdict", "margin", "mean", "interval", "by seed"), rows, texts=2)


def _difference_table(study: Study, results: dict[str, VariantResults]) -> Table:
    found: list[tuple[Claim, str, Difference]] = [
        (claim, key, difference)
        for claim in study.claims
        for key in (ALL, *study.evaluation.families)
        if (difference := decide(claim, results, key)) is not None
    ]

    def names(item: tuple[Claim, str, Difference]) -> str:
        return f"{study.variants[item[0].variant].label} − {study.variants[item[0].reference].label}"

    columns = (
        Column("difference", names),
        Column("questions", lambda item: item[1]),
        Column("claim", lambda item: item[2].verdict(item[0].margin)),
        Column("mean", lambda item: item[2].spread.mean, _points),
        Column("standard deviation", lambda item: item[2].spread.deviation, lambda share: f"{100 * share:.2f}"),
        Column("interval", lambda item: _interval(item[2])),
    )
    return Table.of("", columns, found, texts=3)


def _operations_table(results: dict[str, VariantResults]) -> Table:
    passes = {"prefill": "prefill", "training step, forward": "training_forward"}

    def count(part: str, item: tuple[str, str, dict[str, float]]) -> float:
        return item[2][part]

    columns = (
        Column("variant", lambda item: item[0]),
        Column("pass", lambda item: item[1]),
        *(Column(part.replace("_", " "), partial(count, part), ".4f", GIGA) for part in (*FLOP_PARTS, "total")),
    )
    items = [
        (variant.label, label, _first_run({variant.name: variant})["flops"][key])
        for variant in results.values()
        for label, key in passes.items()
    ]
    return Table.of("", columns, items, texts=2)


def _task_table(results: dict[str, VariantResults]) -> Table:
    columns = (
        Column("task", str),
        *(Column(variant.label, variant.accuracy, percent) for variant in results.values()),
        Column("most frequent answer", lambda task: 100 * majority(results, task), ".1f"),
    )
    return Table.of("", columns, task_names(results))


def percent(spread: Spread, with_range: bool = False) -> str:
    """A share as `12.3 ± 0.4`, with `(11.9–12.7)` behind it on demand."""
    if not spread.by_seed:
        return NOTHING
    text = f"{100 * spread.mean:.1f}"
    if spread.deviation is None:
        return text
    text += f" ± {100 * spread.deviation:.1f}"
    return f"{text} ({100 * spread.low:.1f}–{100 * spread.high:.1f})" if with_range else text


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _interval(found: Difference) -> str:
    if found.low is None or found.high is None:
        return "no interval from one seed"
    return f"{_points(found.low)} to {_points(found.high)}"

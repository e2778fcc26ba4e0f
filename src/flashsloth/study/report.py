"""The report of a study: one Markdown page, its plots, and the same numbers as JSON."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints.files import replace_file, write_whole
from ..evaluate.synthetic import ALL
from .config import Claim, Study
from .measure import FLOP_PARTS
from .plan import Run, write_json
from .plots import draw_costs, draw_tasks
from .results import (
    CONFIDENCE,
    Difference,
    Spread,
    VariantResults,
    collect,
    decide,
    majority,
    task_names,
)

_GIGA, _MEBI = 1e9, 2**20
NOT_MEASURED = "–"


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
    replace_file(costs, lambda path: draw_costs(results, study.reference, path))
    replace_file(tasks, lambda path: draw_tasks(results, path))
    page = folder / f"{name}.md"
    text = render(study, results, len(runs), name, [costs.name, tasks.name])
    write_whole(page, text)
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
        run = next(iter(variant.runs.values()))
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


def render(study: Study, results: dict[str, VariantResults], planned: int, name: str, plots: Sequence[str]) -> str:
    """The page as Markdown."""
    finished = sum(len(variant.runs) for variant in results.values())
    run = next(iter(next(iter(results.values())).runs.values()))
    settings = study.evaluation
    images = " + ".join(f"{count:,} ({stage})" for stage, count in run["images"].items())
    lines = [
        f"# Study: {name}",
        "",
        f"{finished} of {planned} runs, each on {images} training images, the same for all variants of a seed; scored "
        f"on {settings.count:,} held-out images ({', '.join(settings.families)}) with up to {settings.turns} "
        f"questions each, the same for all runs. Trained on {run['device']}, {run['precision']}; torch "
        f"{run['software']['torch']}, transformers {run['software']['transformers']}.",
        "",
        "## Exact match and cost",
        "",
        "Exact match in %: mean ± standard deviation over seeds (lowest to highest). Visual tokens are those of an "
        "image; behind the plus sign the query tokens of a question. GFLOPs: reading one question about one image, "
        "and one training step of the last stage, per image. Time "
        f"({run['training']['clock']} of the training loop) and memory (what training adds to the process with its "
        "loaded model) are means; in brackets the ratio to the variant "
        f"“{study.variants[study.reference].label}”.",
        "",
        *_main_table(study, results),
        "",
        f"![Exact match against visual tokens, operations and training time]({plots[0]})",
        "",
        "## Claims",
        "",
        *_claims(study, results),
        "",
        "## Where the operations are",
        "",
        "GFLOPs for one image, last stage.",
        "",
        *_flops_table(results),
        "",
        "## Every task",
        "",
        "Exact match in %, mean ± standard deviation over seeds.",
        "",
        *_task_table(results),
        "",
        f"![Exact match of every task]({plots[1]})",
        "",
    ]
    return "\n".join(lines)


def _main_table(study: Study, results: dict[str, VariantResults]) -> list[str]:
    families = study.evaluation.families
    rows = []
    reference = results.get(study.reference)
    for variant in results.values():
        run = next(iter(variant.runs.values()))
        queries = f" + {run['query_tokens']}" if run["query_tokens"] else ""
        rows.append(
            [
                variant.label,
                str(len(variant.runs)),
                *(percent(variant.accuracy(key), with_range=True) for key in (ALL, *families)),
                f"{run['visual_tokens']}{queries}",
                f"{run['flops']['prefill']['total'] / _GIGA:.3f}",
                f"{run['flops']['training_step'] / _GIGA:.3f}",
                _with_ratio(variant, reference, ("training", "seconds"), 1, "s"),
                _with_ratio(variant, reference, ("training", "added_bytes"), _MEBI, "MiB"),
            ]
        )
    chance = [f"{100 * majority(results, key):.1f}" for key in (ALL, *families)]
    rows.append(["most frequent answer", "", *chance, *[""] * 5])
    heads = [
        "variant",
        "seeds",
        ALL,
        *families,
        "visual tokens",
        "prefill",
        "training step",
        "training time",
        "memory",
    ]
    return table(heads, rows)


def _with_ratio(
    variant: VariantResults, reference: VariantResults | None, path: tuple[str, str], unit: float, name: str
) -> str:
    value = variant.measured(*path).mean
    text = f"{value / unit:,.0f} {name}"
    base = 0.0 if reference is None else reference.measured(*path).mean
    return f"{text} ({value / base:.2f}x)" if base else text


def _claims(study: Study, results: dict[str, VariantResults]) -> list[str]:
    if not study.claims:
        return ["The study states none."]
    lines = [
        f"Differences in exact match (points), paired by seed, with the {CONFIDENCE:.0%} interval of a paired t test. "
        "A claim holds when its whole interval is above zero (or above minus the margin it states), does not hold "
        "when the whole interval is below, and is otherwise not resolved by these seeds.",
        "",
    ]
    rows = []
    for claim in study.claims:
        found = decide(claim, results)
        lines.append(f"- {_sentence(study, claim, found)}")
        for key in (ALL, *study.evaluation.families):
            found = decide(claim, results, key)
            if found is not None:
                rows.append(
                    [
                        f"{study.variants[claim.variant].label} − {study.variants[claim.reference].label}",
                        key,
                        _points(found.spread.mean),
                        NOT_MEASURED if found.spread.deviation is None else f"{100 * found.spread.deviation:.2f}",
                        _interval(found),
                        found.verdict(claim.margin),
                    ]
                )
    return [*lines, "", *table(["difference", "questions", "mean", "standard deviation", "interval", "claim"], rows)]


def _sentence(study: Study, claim: Claim, found: Difference | None) -> str:
    margin = f" (margin {100 * claim.margin:g} points)" if claim.margin else ""
    text = f"{claim.text}{margin}:"
    if found is None:
        return f"{text} not measured; a variant has no finished run."
    by_seed = ", ".join(f"{_points(value)} (seed {seed})" for seed, value in found.spread.by_seed.items())
    verdict = found.verdict(claim.margin)
    return f"{text} **{verdict}**. Mean difference {_points(found.spread.mean)}, {_interval(found)}: {by_seed}."


def _flops_table(results: dict[str, VariantResults]) -> list[str]:
    rows = []
    for variant in results.values():
        flops = next(iter(variant.runs.values()))["flops"]
        for label, key in (("prefill", "prefill"), ("training step, forward", "training_forward")):
            counts = [f"{flops[key][part] / _GIGA:.4f}" for part in (*FLOP_PARTS, "total")]
            rows.append([variant.label, label, *counts])
    return table(["variant", "pass", *(part.replace("_", " ") for part in FLOP_PARTS), "total"], rows)


def _task_table(results: dict[str, VariantResults]) -> list[str]:
    rows = []
    for task in task_names(results):
        cells = [percent(variant.accuracy(task)) for variant in results.values()]
        rows.append([task, *cells, f"{100 * majority(results, task):.1f}"])
    return table(["task", *(variant.label for variant in results.values()), "most frequent answer"], rows)


def percent(spread: Spread, with_range: bool = False) -> str:
    """A share as `12.3 ± 0.4`, with `(11.9–12.7)` behind it on demand."""
    if not spread.by_seed:
        return NOT_MEASURED
    text = f"{100 * spread.mean:.1f}"
    if spread.deviation is None:
        return text
    text += f" ± {100 * spread.deviation:.1f}"
    return f"{text} ({100 * spread.low:.1f}–{100 * spread.high:.1f})" if with_range else text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _interval(found: Difference) -> str:
    if found.low is None or found.high is None:
        return "no interval from one seed"
    return f"{_points(found.low)} to {_points(found.high)}"

"""Where the baseline loses, told from the pairs of numbers that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .comparison import (
    LONGEST_ANSWER,
    METRICS,
    Case,
    Condition,
    Crossover,
    Pair,
    Variant,
    crossovers,
    is_rival,
    pairs,
)
from .tables import GIGA, MEBI


@dataclass(frozen=True)
class Loss:
    """What a rival has less of than the baseline, under one condition."""

    rival: Variant
    condition: Condition
    pairs: list[Pair]
    crossovers: list[Crossover]


def losses(cases: Sequence[Case], baseline: Variant) -> list[Loss]:
    """Every condition and metric at which a rival is faster or smaller, rival by rival, in the order of the cases.

    A crossover counts where longer answers are slower with the baseline.
    """
    bases = {case.condition: case for case in cases if case.variant == baseline}
    found = []
    for case in cases:
        base = bases.get(case.condition)
        if base is None or not is_rival(case.variant, baseline):
            continue
        lost = [pair for pair in pairs(case, base) if pair.lost]
        crossed = [crossing for crossing in crossovers(case, base) if crossing.baseline_slower_after]
        if lost or crossed:
            found.append(Loss(case.variant, case.condition, lost, crossed))
    return found


def sizes_won_and_lost(cases: Sequence[Case], baseline: Variant) -> list[tuple[Variant, list[str], list[str]]]:
    """For each rival the image sizes at which its first token comes sooner, and those at which it does not.

    Only where it and the baseline were measured at several sizes of one workload; small images first.
    """
    bases = {case.condition: case for case in cases if case.variant == baseline}
    found: dict[tuple[Variant, Condition], dict[Condition, bool]] = {}
    for case in cases:
        base = bases.get(case.condition)
        if base is None or not is_rival(case.variant, baseline):
            continue
        mine, theirs = case.stage("time_to_first_token"), base.stage("time_to_first_token")
        if mine is not None and theirs is not None:
            key = case.variant, case.condition.workload
            found.setdefault(key, {})[case.condition] = mine.median < theirs.median
    rows = []
    for (variant, _), verdicts in found.items():
        if len(verdicts) > 1:
            ordered = sorted(verdicts, key=lambda condition: condition.width * condition.height)
            sooner = [condition.size for condition in ordered if verdicts[condition]]
            later = [condition.size for condition in ordered if not verdicts[condition]]
            rows.append((variant, sooner, later))
    return rows


def quantity(metric: str, value: float) -> str:
    """A number with its unit."""
    if metric == "visual_tokens":
        return f"{value:,.0f}"
    if metric == "cache_bytes":
        return f"{value / MEBI:,.1f} MiB"
    if metric.endswith("_bytes"):
        return f"{value / GIGA:.2f} GB"
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def ratio_text(ratio: float) -> str:
    """Two decimals, or as many as it takes to tell it from 1."""
    decimals = next((d for d in (2, 3, 4) if f"{ratio:.{d}f}" != f"{1:.{d}f}"), 2)
    return f"{ratio:.{decimals}f}"


def in_words(loss: Loss) -> str:
    """One line, without the rival and the condition."""
    parts = []
    for pair in loss.pairs:
        name = METRICS[pair.metric]
        if pair.metric == "total":
            name = f"total of {pair.output_tokens} tokens"
        noise = " (samples overlap: may be chance)" if pair.overlaps else ""
        against = f"{quantity(pair.metric, pair.value)} against {quantity(pair.metric, pair.base)}"
        parts.append(f"{name} {ratio_text(pair.ratio)}x, {against}{noise}")
    for crossing in loss.crossovers:
        how = "measured" if crossing.measured else "by ms/token, longer than was measured"
        parts.append(f"answers from {math.ceil(crossing.tokens):,} tokens on ({how})")
    return "; ".join(parts)


def tally(found: Sequence[Loss], settings: int) -> str:
    """One line about the losses to one rival: at how many of the settings, and by how much at most.

    Args:
        settings: at which both were measured.
    """
    lowest: dict[str, float] = {}
    at: dict[str, set[Condition]] = {}
    for loss in found:
        for pair in loss.pairs:
            lowest[pair.metric] = min(pair.ratio, lowest.get(pair.metric, math.inf))
            at.setdefault(pair.metric, set()).add(loss.condition)
    parts = [
        f"{name} at {len(at[metric])} of {settings} (down to {ratio_text(lowest[metric])}x)"
        for metric, name in METRICS.items()
        if metric in at
    ]
    crossed = [math.ceil(crossing.tokens) for loss in found for crossing in loss.crossovers]
    if crossed:
        parts.append(
            f"long answers, from {min(crossed):,} tokens on at the earliest and {max(crossed):,} at the latest"
        )
    return "; ".join(parts)


def crossover_lines(cases: Sequence[Case], baseline: Case) -> list[str]:
    """One sentence a rival about where total times cross, for cases under one condition."""
    lines = []
    for case in cases:
        if not is_rival(case.variant, baseline.variant) or case.condition != baseline.condition:
            continue
        name, own = case.variant.title, baseline.variant.title
        found = crossovers(case, baseline)
        for crossing in found:
            how = "measured" if crossing.measured else "by ms/token beyond what was measured"
            slow, fast = (own, name) if crossing.baseline_slower_after else (name, own)
            lines.append(
                f"**{name}**: from {math.ceil(crossing.tokens):,} output tokens on ({crossing.seconds:.3g} s; {how}) "
                f"{slow} is slower than {fast}."
            )
        if not found:
            lines.append(_without_crossover(case, baseline))
    return lines


def _without_crossover(case: Case, baseline: Case) -> str:
    name, own = case.variant.title, baseline.variant.title
    last = min(max((knot[0] for knot in c.knots()), default=0) for c in (case, baseline))
    reach = LONGEST_ANSWER if case.total(LONGEST_ANSWER) and baseline.total(LONGEST_ANSWER) else last
    mine, theirs = case.total(reach), baseline.total(reach)
    if mine is None or theirs is None:
        return f"**{name}**: the file lacks what a total time takes."
    verdict = "sooner at every length" if mine < theirs else "later at every length" if mine > theirs else "as fast"
    return f"**{name}**: {verdict} up to {reach:,} output tokens{'' if verdict == 'as fast' else f' than {own}'}."

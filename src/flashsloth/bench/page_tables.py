"""Tables of `flashsloth bench report`: ratios, stages, crossovers, memory, slopes and losses as rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial

from flashsloth.reports.table import GIGA, MEBI, Column, Table

from .comparison import LONGEST_ANSWER, METRICS, TIMES, Case, Condition, Loss, Variant, crossovers, pairs
from .counted import Memory
from .scaling import AXES, Series
from .tables import milliseconds, spread

_SPLIT = ("encode", "compress", "prefill")
_TITLE = Column("model", lambda found: found.variant.title)  # of a case or a series


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


def _by_condition(cases: Sequence[Case], first: Condition) -> list[tuple[Condition, list[Case]]]:
    """Cases by condition, that of the plots before the others."""
    conditions = sorted(dict.fromkeys(case.condition for case in cases), key=lambda condition: condition != first)
    return [(condition, [case for case in cases if case.condition == condition]) for condition in conditions]


def ratio_tables(
    cases: Sequence[Case], baseline: Variant | None, lengths: Sequence[int], first: Condition
) -> list[Table]:
    """For each condition first token, totals, time a token and peak memory, with ratios to the baseline in brackets.

    Args:
        lengths: output tokens of the totals, beside those measured.
        first: the condition whose table comes first.
    """
    tables = []
    for condition, members in _by_condition(cases, first):
        base = next((case for case in members if case.variant == baseline), None)
        columns = (
            _TITLE,
            Column("first token", partial(_beside, "time_to_first_token", base)),
            *(
                Column(f"{length:,} tokens", partial(_total, length, base))
                for length in sorted({*lengths, *(length for case in members for length in case.by_length)} - {1})
            ),
            Column("time a token", partial(_beside, "decode_per_token", base)),
            Column("peak memory", partial(_beside, "peak_memory_bytes", base)),
        )
        tables.append(Table.of(f"Times and memory: {condition}", columns, members))
    return tables


def _beside(metric: str, base: Case | None, case: Case) -> str | None:
    if base is not None and not case.variant.under_load:
        for pair in pairs(case, base):
            if pair.metric == metric:
                return f"{quantity(metric, pair.value)} ({ratio_text(pair.ratio)})"
    own = {"decode_per_token": case.per_token, "peak_memory_bytes": case.longest.peak_memory_bytes}
    value = own[metric] if metric in own else case.median(metric)
    return None if value is None else quantity(metric, value)


def _total(length: int, base: Case | None, case: Case) -> str | None:
    mine = case.total(length)
    if mine is None:
        return None
    theirs = None if base is None or case.variant.under_load else base.total(length)
    exact = all(length in dict(c.knots()) for c in (case, base if theirs else None) if c is not None)
    ratio = f" ({ratio_text(mine / theirs)})" if theirs else ""
    return f"{'' if exact else '≈ '}{quantity('total', mine)}{ratio}"


def stage_tables(cases: Sequence[Case], first: Condition) -> list[Table]:
    """How the first token's time is split, for each condition; samples of all output lengths together."""
    columns = (
        _TITLE,
        Column("visual tokens", lambda case: case.longest.visual_tokens, ","),
        *(Column(f"{TIMES[name]} ms", partial(_share, name)) for name in _SPLIT),
        Column("first token ms", lambda case: case.median("time_to_first_token"), milliseconds),
        Column("spread", lambda case: spread(case.stage("time_to_first_token").samples), ".0%"),
        Column("samples", lambda case: len(case.stage("time_to_first_token").samples)),
        Column("preprocess ms, not included", lambda case: case.median("preprocess"), milliseconds),
    )
    timed = [case for case in cases if case.stage("time_to_first_token") is not None]
    return [Table.of(f"Stages: {condition}", columns, own) for condition, own in _by_condition(timed, first)]


def _share(name: str, case: Case) -> str | None:
    seconds, whole = case.median(name), case.median("time_to_first_token")
    if seconds is None or not whole:
        return None
    share = "<1%" if 0 < seconds / whole < 0.005 else f"{seconds / whole:.0%}"
    return f"{milliseconds(seconds)} ({share})"


def crossover_table(rivals: Sequence[tuple[Case, Case]]) -> Table:
    """Where the total times of rivals and the baseline cross, and who is slower with longer answers.

    Args:
        rivals: with the baseline's case beside each, all of one condition.
    """
    rows = []
    for case, base in rivals:
        name, own = case.variant.title, base.variant.title
        found = crossovers(case, base)
        for crossing in found:
            slower = own if crossing.baseline_slower_after else name
            how = "measured" if crossing.measured else "by ms/token beyond what was measured"
            rows.append((name, slower, how, f"{math.ceil(crossing.tokens):,}", f"{crossing.seconds:.3g}"))
        if not found:
            last = min(max((length for length, _ in c.knots()), default=0) for c in (case, base))
            reach = LONGEST_ANSWER if case.total(LONGEST_ANSWER) and base.total(LONGEST_ANSWER) else last
            mine, theirs = case.total(reach), base.total(reach)
            if mine is not None and theirs is not None:
                slower = "neither" if mine == theirs else own if mine < theirs else name
                rows.append((name, slower, f"at every length up to {reach:,}", "", ""))
    return Table("", ("rival", "slower", "how it is known", "from output tokens on", "seconds there"), rows, texts=3)


def memory_table(rows: Sequence[tuple[Case, Memory | None, float | None]], size: str | None, baseline: str) -> Table:
    """Counted bytes beside the measured peak.

    Args:
        rows: a case, what is counted for it, and its operations to the first token over the baseline's at `size`.
        size: of an image smaller than all that were measured; None leaves the operations out.
    """
    columns = (
        Column("model", lambda row: row[0].variant.title),
        Column("weights GB", lambda row: row[1] and row[1].weights, ".2f", GIGA),
        Column("KV MiB", lambda row: row[1] and row[1].cache, ",.1f", MEBI),
        Column("activations MiB", lambda row: row[1] and row[1].activations, ",.1f", MEBI),
        Column("counted GB", lambda row: row[1] and row[1].total, ".2f", GIGA),
        Column("measured peak GB", lambda row: row[0].longest.peak_memory_bytes, ".2f", GIGA),
        *([] if size is None else [Column(f"operations at {size} / {baseline}", lambda row: row[2], ratio_text)]),
    )
    return Table.of("Counted by the static tier, KV at the end of the longest answer", columns, rows)


def scaling_table(series: Sequence[Series]) -> Table:
    """Slopes beside those expected."""

    def slope(value: float) -> str:
        return f"{round(value, 2) + 0.0:.2f}"  # adding zero takes the sign from a rounded -0.0

    names = {**METRICS, "total": "total time"}
    columns = (
        _TITLE,
        Column("what / against", lambda one: f"{names[one.metric]} / {AXES[one.axis]}"),
        Column("at", lambda one: one.fixed),
        Column("values", lambda one: f"{len(one.values)}, {min(one.values):,} to {max(one.values):,}"),
        Column("slope", lambda one: one.slope, slope),
        Column("expected", lambda one: one.expected_slope, slope),
    )
    return Table.of("Slopes", columns, series, texts=3)


def loss_tables(found: Sequence[Loss], compared: Sequence[tuple[Case, Case]], baseline: str) -> list[Table]:
    """What each rival has less of, setting by setting; after a tally where rivals were measured at several settings.

    Args:
        compared: cases of all rivals, the baseline's beside them.
        baseline: how it is called.
    """
    settings = Counter(case.variant for case, _ in compared)
    rows: list[tuple[str, ...]] = []
    for loss in found:
        where = loss.rival.title, str(loss.condition)
        for pair in loss.pairs:
            name = f"total of {pair.output_tokens} tokens" if pair.metric == "total" else METRICS[pair.metric]
            numbers = quantity(pair.metric, pair.value), quantity(pair.metric, pair.base), ratio_text(pair.ratio)
            rows.append((*where, name, "samples overlap: may be chance" if pair.overlaps else "", *numbers))
        for crossing in loss.crossovers:
            how = "measured" if crossing.measured else "by ms/token, longer than was measured"
            rows.append((*where, f"answers from {math.ceil(crossing.tokens):,} tokens on", how, "", "", ""))
    heads = ("rival", "setting", "needs less of", "note", "rival's", f"{baseline}'s", "ratio")
    each = Table("Setting by setting", heads, rows, texts=4)
    if not found or max(settings.values()) == 1:
        return [each] if found else []
    tally: list[tuple[str, ...]] = []
    for rival in dict.fromkeys(loss.rival for loss in found):
        own = [loss for loss in found if loss.rival == rival]
        for metric, name in METRICS.items():
            ratios = [[pair.ratio for pair in loss.pairs if pair.metric == metric] for loss in own]
            lost = [min(several) for several in ratios if several]
            if lost:
                tally.append((rival.title, name, f"{len(lost)} of {settings[rival]}", ratio_text(min(lost))))
        lengths = [[math.ceil(crossing.tokens) for crossing in loss.crossovers] for loss in own if loss.crossovers]
        if lengths:
            ends = dict.fromkeys((min(map(min, lengths)), max(map(max, lengths))))
            reach = f"answers from {' to '.join(f'{end:,}' for end in ends)} tokens on"
            tally.append((rival.title, reach, f"{len(lengths)} of {settings[rival]}", ""))
    return [
        Table("At how many settings", ("rival", "needs less of", "at settings", "lowest ratio"), tally, texts=2),
        each,
    ]

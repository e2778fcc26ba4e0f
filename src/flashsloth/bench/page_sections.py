"""Sections of the report as Markdown, from cases, pairs, series and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from .comparison import TIMES, Case, Condition, Group, Pair, Variant, crossovers, is_rival, pairs, spread
from .losses import in_words, losses, quantity, ratio_text, sizes_won_and_lost, tally
from .results import Measurement
from .scaling import AXES, Series
from .tables import GIGA, MEBI, TERA, TableData
from .tokens import Memory

NOTHING = "–"
_MILLI = 1e3
_SPLIT = ("encode", "compress", "prefill")
_NAMES = {
    "time_to_first_token": "first token",
    "decode_per_token": "time a token",
    "total": "total time",
    "peak_memory_bytes": "peak memory",
}


def _capital(condition: Condition) -> str:
    text = str(condition)
    return text[0].upper() + text[1:]


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def introduction(groups: Sequence[Group], files: Sequence[str]) -> str:
    """Title, files, and what is never mixed."""
    text = (
        f"# Efficiency report\n\nFrom {', '.join(f'`{name}`' for name in files)}, written by `flashsloth bench run`."
    )
    if len(groups) > 1:
        lines = [f"{number}. {group.title}: {_origin(group)}" for number, group in enumerate(groups, 1)]
        text += (
            f" They hold {len(groups)} groups: times of different machines, dtypes, threads or versions of the code "
            "are never set against each other.\n\n" + "\n".join(lines)
        )
    return text


def _origin(group: Group) -> str:
    return f"{', '.join(group.files)}, commit {group.commit or 'not recorded'}"


def _by_condition(cases: Sequence[Case], first: Condition | None) -> list[tuple[Condition, list[Case]]]:
    """Cases by condition, that of the plots before the others."""
    conditions = dict.fromkeys(case.condition for case in cases)
    ordered = sorted(conditions, key=lambda condition: condition != first)
    return [(condition, [case for case in cases if case.condition == condition]) for condition in ordered]


def _folded(tables: Sequence[TableData]) -> list[str]:
    """The first table, and the others where a reader unfolds them, since there may be many."""
    texts = [table.markdown() for table in tables]
    if len(texts) <= 1:
        return texts
    head = f"<details><summary>{len(texts) - 1} more: at other settings</summary>"
    return [texts[0], head, *texts[1:], "</details>"]


def summary(shown: Sequence[Case], base: Case | None) -> list[str]:
    """The condition of the plots in three lines: first token, long answers, memory."""
    rivals = [case for case in shown if base is not None and is_rival(case.variant, base.variant)]
    if base is None or not rivals:
        return []
    name, lines = base.variant.title, []
    for metric, heading, ahead, behind in (
        ("time_to_first_token", "First token", "sooner than", "not sooner than"),
        ("decode_per_token", "Every token after it", "faster than", "not faster than"),
        ("peak_memory_bytes", "Peak memory", "less than", "not less than"),
    ):
        found = {case.variant.title: p.ratio for case in rivals for p in pairs(case, base) if p.metric == metric}
        won = ", ".join(f"{title} (which takes {ratio:.2f}x)" for title, ratio in found.items() if ratio > 1)
        lost = ", ".join(f"{title} ({ratio_text(ratio)}x)" for title, ratio in found.items() if ratio <= 1)
        parts = [f"{words} {titles}" for words, titles in ((ahead, won), (behind, lost)) if titles]
        if parts:
            lines.append(f"**{heading}**: {'; '.join(parts)}.")
    first = [
        f"{case.variant.title} at {math.ceil(crossing.tokens):,}"
        for case in rivals
        for crossing in crossovers(case, base)
        if crossing.baseline_slower_after
    ]
    if first:
        lines.append(f"**Long answers**: catching up after so many tokens: {', '.join(first)}.")
    return [f"## In short: {name}", f"{_capital(base.condition)}.", bullets(lines)]


def ratios(
    cases: Sequence[Case],
    baseline: Variant | None,
    name: str,
    lengths: Sequence[int],
    first: Condition | None = None,
) -> list[str]:
    """A table for each condition: first token, totals, ms/token and peak memory, with ratios to the baseline.

    Args:
        name: of the baseline where it was not measured.
        lengths: output tokens of the totals, beside those measured.
        first: the condition shown unfolded.
    """
    parts = ["## Ratios" if baseline is not None else "## Numbers"]
    if baseline is None:
        parts.append(f"`{name}` was not measured here, or only under load: there is nothing to take ratios to.")
    elif not any(is_rival(case.variant, baseline) for case in cases):
        parts.append(f"No other model than {baseline.title} was measured here: there is nothing to compare it with.")
    else:
        parts.append(
            f"In brackets: divided by {baseline.title}; above 1 it is slower or larger. ≈ marks a total that was not "
            "measured at that length but lies on the line between two that were, or is the last one + ms/token for "
            "every token more. Time a token and peak memory are those of the longest answer both have."
        )
    tables = []
    for condition, members in _by_condition(cases, first):
        base = next((case for case in members if case.variant == baseline), None)
        measured = {length for case in members for length in case.by_length if length > 1}
        columns = sorted(measured | {length for length in lengths if length > 1})
        heads = ("model", "first token", *(f"{n:,} tokens" for n in columns), "time a token", "peak memory")
        tables.append(TableData(_capital(condition), heads, [_ratio_row(case, base, columns) for case in members]))
    return [*parts, *_folded(tables)]


def _ratio_row(case: Case, base: Case | None, lengths: Sequence[int]) -> tuple[str, ...]:
    quiet = base is not None and not case.variant.under_load
    found = {(p.metric, p.output_tokens): p for p in pairs(case, base)} if base is not None and quiet else {}
    by_metric = {metric: pair for (metric, _), pair in found.items()}
    first = case.stage("time_to_first_token")
    cells = [_cell("time_to_first_token", by_metric, None if first is None else first.median)]
    for length in lengths:
        mine = case.total(length)
        theirs = base.total(length) if base is not None and quiet else None
        if mine is None:
            cells.append(NOTHING)
            continue
        exact = length in dict(case.knots()) and (theirs is None or base is None or length in dict(base.knots()))
        ratio = "" if not theirs else f" ({ratio_text(mine / theirs)})"
        cells.append(f"{'' if exact else '≈ '}{quantity('total', mine)}{ratio}")
    cells.append(_cell("decode_per_token", by_metric, case.per_token))
    cells.append(_cell("peak_memory_bytes", by_metric, case.longest.peak_memory_bytes))
    return case.variant.title, *cells


def _cell(metric: str, found: dict[str, Pair], value: float | None) -> str:
    if metric in found:
        return f"{quantity(metric, found[metric].value)} ({ratio_text(found[metric].ratio)})"
    return NOTHING if value is None else quantity(metric, value)


def stage_tables(cases: Sequence[Case], first: Condition | None = None) -> list[str]:
    """How the first token's time is split, for each condition; samples of all output lengths together."""
    tables = []
    for condition, members in _by_condition(cases, first):
        rows = []
        for case in members:
            whole = case.stage("time_to_first_token")
            if whole is None:
                continue
            cells = []
            for name in _SPLIT:
                stage = case.stage(name)
                share = "" if stage is None else f" ({_share(stage.median / whole.median)})"
                cells.append(NOTHING if stage is None else f"{stage.median * _MILLI:,.1f}{share}")
            before = case.stage("preprocess")
            tokens = case.longest.visual_tokens
            rows.append(
                (
                    case.variant.title,
                    NOTHING if tokens is None else f"{tokens:,}",
                    *cells,
                    f"{whole.median * _MILLI:,.1f}",
                    f"{spread(whole.samples):.0%} of {len(whole.samples)}",
                    NOTHING if before is None else f"{before.median * _MILLI:,.1f}",
                )
            )
        heads = (
            "model", "visual tokens", *(f"{TIMES[name]} ms" for name in _SPLIT), "first token ms", "spread",
            "preprocess ms, not included",
        )  # fmt: skip
        if rows:
            tables.append(TableData(f"Stages: {condition}", heads, rows))
    return _folded(tables)


def _share(value: float) -> str:
    return "<1%" if 0 < value < 0.005 else f"{value:.0%}"


def memory_table(rows: Sequence[tuple[str, Memory | None, int | None]], device: str) -> list[str]:
    """Counted bytes beside the measured peak."""
    cells: list[tuple[str, ...]] = []
    for name, memory, peak in rows:
        measured = NOTHING if peak is None else f"{peak / GIGA:.2f}"
        if memory is None:
            cells.append((name, *[NOTHING] * 4, measured))
            continue
        counted = f"{memory.weights / GIGA:.2f}", f"{memory.cache / MEBI:,.1f}", f"{memory.activations / MEBI:,.1f}"
        cells.append((name, *counted, f"{memory.total / GIGA:.2f}", measured))
    heads = ("model", "weights GB", "KV MiB", "activations MiB", "counted GB", "measured peak GB")
    title = "Counted by the static tier, KV at the end of the longest answer"
    what = (
        "memory that torch allocated on the accelerator"
        if device == "cuda"
        else "resident set of the process, with Python, its libraries and whatever loading took"
    )
    return [f"The measured peak is the {what}.", TableData(title, heads, cells).markdown()]


def note_axes(measurements: Sequence[Measurement], missing: list[str]) -> None:
    """Says along which axes nothing can be fitted."""
    for axis, name in AXES.items():
        values = sorted({getattr(m.settings, axis) for m in measurements})
        if len(values) < 2:
            option = f"--{axis.replace('_', '-')}"
            missing.append(
                f"Scaling with {name}: only {values[0]} was measured, so there is no slope to fit. Add values with "
                f"`flashsloth bench run {option} 1,4,16`."
            )


def scaling_table(series: Sequence[Series], left_out: int, has_roofline: bool) -> list[str]:
    """Slopes beside those expected."""
    rows: list[tuple[str, ...]] = [
        (
            one.variant.title,
            f"{_NAMES[one.metric]} / {AXES[one.axis]}",
            f"{len(one.values)}, {min(one.values):,} to {max(one.values):,}",
            _slope(one.slope),
            _slope(one.expected_slope),
            one.fixed,
        )
        for one in series
    ]
    how = (
        "operations at the matrix rate or bytes read at the bandwidth, whichever takes longer, both rates from the "
        "same file"
        if has_roofline
        else "operations to the first token (the file has no roofline, so nothing is expected of other times)"
    )
    text = (
        "Slopes on logarithmic axes: 1 is proportional, 0 constant. The expected ones are fitted in the same way to "
        f"what the static tier counts for the same settings: for times {how}; for memory weights, KV and activations. "
        f"{NOTHING}: it cannot say."
    )
    if left_out:
        text += f" {left_out} more lines, at other settings, are in the files and not shown."
    heads = ("model", "what / against", "values", "slope", "expected", "at")
    return [text, TableData("Slopes", heads, rows).markdown()]


def _slope(value: float | None) -> str:
    # adding zero takes the sign from a rounded -0.0
    return NOTHING if value is None else f"{round(value, 2) + 0.0:.2f}"


def loss_section(
    cases: Sequence[Case],
    baseline: Variant | None,
    name: str,
    small: tuple[str, list[tuple[str, float]]] | None,
) -> list[str]:
    """Every setting and metric at which a rival is ahead.

    Args:
        small: an image size that was not measured, and counted operations there by rival, over the baseline's.
    """
    title = name if baseline is None else baseline.title
    parts = [f"## Where {title} loses"]
    compared = [
        case
        for case in cases
        if baseline is not None
        and is_rival(case.variant, baseline)
        and any(other.variant == baseline and other.condition == case.condition for other in cases)
    ]
    if baseline is None or not compared:
        return [*parts, f"Cannot be told: no rival was measured under the same conditions as {title}."]
    found = losses(cases, baseline)
    if not found:
        parts.append("Nowhere in these files: no rival is faster or smaller at any setting that was measured.")
    else:
        parts.append(
            f"Everything measured of which a rival needs less, as ratio to {title}: "
            f"{_count(found, compared)}. What is not listed was won, a tie, or not measured for both."
        )
    for variant in dict.fromkeys(loss.rival for loss in found):
        mine = [loss for loss in found if loss.rival == variant]
        settings = sum(case.variant == variant for case in compared)
        lines = bullets([f"{_capital(loss.condition)}: {in_words(loss)}." for loss in mine])
        if settings > 1:
            lines = (
                f"{tally(mine, settings)}.\n\n<details><summary>Setting by setting</summary>\n\n{lines}\n\n</details>"
            )
        parts.append(f"**{variant.title}**\n\n{lines}")
    parts += _image_sizes(cases, baseline, small)
    unbeaten = [v.title for v in dict.fromkeys(c.variant for c in compared) if v not in {loss.rival for loss in found}]
    if found and unbeaten:
        parts.append(f"Against {', '.join(unbeaten)} it loses nowhere in these files.")
    return parts


def _count(found: Sequence, compared: Sequence[Case]) -> str:
    rivals = len({case.variant for case in compared})
    losing = len({loss.rival for loss in found})
    return f"{losing} of {rivals} rival{'s' * (rivals > 1)} {'is' if losing == 1 else 'are'} ahead somewhere"


def _image_sizes(
    cases: Sequence[Case], baseline: Variant, small: tuple[str, list[tuple[str, float]]] | None
) -> list[str]:
    lines = []
    for variant, sooner, later in sizes_won_and_lost(cases, baseline):
        if sooner:
            kept = f", not at {', '.join(later)}" if later else ""
            lines.append(f"{variant.title}: first token sooner at {', '.join(sooner)}{kept}.")
    if small is not None:
        size, counted = small
        fewer = [f"{title} {ratio_text(ratio)}x" for title, ratio in counted if ratio < 1]
        what = f"fewer operations to the first token: {', '.join(fewer)}" if fewer else "fewer operations: none"
        lines.append(f"{size} and smaller was not timed here. By count, not by clock, at {size} these need {what}.")
    return ["**By size of the image**", bullets(lines)] if lines else []


def machine_section(group: Group, cases: Sequence[Case]) -> list[str]:
    """Machine card, code, settings, repetitions and spread."""
    machine = group.machine
    flags = ", ".join(machine.cpu_flags) or "no flags recorded"
    versions = ", ".join(f"{name} {version}" for name, version in group.versions.items())
    lines = [
        f"**Machine**: {machine.cores} cores of {machine.cpu} ({flags}), {machine.memory_bytes / GIGA:.0f} GB, "
        f"{machine.system}",
        f"**Accelerator**: {_gpu(group)}",
        f"**Code**: commit {group.commit or 'not recorded'}; {versions}",
        f"**Run**: {group.device}, {group.dtype}, {group.threads} threads; file {', '.join(group.files)}",
        f"**Reached in the same run**: {_roofline(group)}",
        *_settings(group.measurements),
        *_repetitions(group.measurements, cases),
    ]
    return ["## Machine and settings", bullets(lines)]


def _gpu(group: Group) -> str:
    machine = group.machine
    if machine.gpu is None:
        return "none"
    memory = "" if machine.gpu_memory_bytes is None else f", {machine.gpu_memory_bytes / GIGA:.0f} GB"
    return f"{machine.gpu}{memory}"


def _roofline(group: Group) -> str:
    line = group.roofline
    if line is None:
        return "not recorded for this dtype"
    return (
        f"{line.matrix_flops_per_second / TERA:.3g} TFLOP/s in a matrix product of {'x'.join(map(str, line.shape))}, "
        f"{line.bandwidth_bytes_per_second / GIGA:.3g} GB/s reading"
    )


def _settings(measurements: Sequence[Measurement]) -> list[str]:
    names = {
        "images": "images a prompt",
        "batch": "batch",
        "text_tokens": "text tokens",
        "output_tokens": "output tokens",
    }
    plain = [asdict(m.settings) for m in measurements]
    sizes = list(dict.fromkeys(f"{values['width']}x{values['height']}" for values in plain))
    parts = [f"image sizes {', '.join(sizes)}"]
    parts += [f"{text} {', '.join(map(str, sorted({v[name] for v in plain})))}" for name, text in names.items()]
    return [f"**Settings**: {'; '.join(parts)}"]


def _repetitions(measurements: Sequence[Measurement], cases: Sequence[Case]) -> list[str]:
    counts = sorted({len(stage.samples) for m in measurements for stage in m.stages.values()})
    if not counts:
        return []
    repetitions = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    discarded = sum(m.discarded for m in measurements)
    lines = [
        f"**Repetitions**: {repetitions} of each case, medians reported; {discarded} more were thrown away because "
        "other processes took too much of the processor"
    ]
    spreads = {}
    for case in cases:
        stage = case.stage("time_to_first_token")
        if stage is not None and len(stage.samples) > 1:
            spreads[f"{case.variant.title}, {case.condition}"] = spread(stage.samples)
    if spreads:
        worst = max(spreads, key=lambda name: spreads[name])
        lines.append(
            f"**Spread** of the first token (highest − lowest) / median: up to {spreads[worst]:.0%} ({worst})"
        )
    loaded = list(dict.fromkeys(Variant.of(m).title for m in measurements if m.under_load))
    if loaded:
        lines.append(f"**Measured while the machine was busy**, shown but not compared: {', '.join(loaded)}")
    return lines


def missing_stages(cases: Sequence[Case]) -> list[str]:
    """One line a stage about the models that lack it."""
    found = []
    for stage in ("preprocess", *TIMES, "decode_per_token", "total"):
        lacking = list(dict.fromkeys(c.variant.title for c in cases if not _has(c, stage)))
        if lacking:
            found.append(f"{stage}: not measured for {', '.join(lacking)}.")
    return found


def _has(case: Case, stage: str) -> bool:
    return any(stage in m.stages for m in case.by_length.values())


def missing_section(missing: Sequence[str], group: Group) -> list[str]:
    """What the files lack, what failed, and what they hold twice."""
    lines = [*dict.fromkeys(missing)]
    lines += [f"Not measured: {line}" for line in group.failures]
    lines += [f"Measured twice: {line}." for line in group.repeated]
    return ["## What is missing", bullets(lines)] if lines else []

"""The report of `flashsloth bench report`: a page in Markdown for people, with its plots beside it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashsloth.checkpoints.files import write_whole

from . import page_sections, plots
from .comparison import Case, Condition, Group, Variant, baseline_of, crossovers, groups_of, is_rival
from .counted import Counted, count
from .losses import crossover_lines
from .results import Results, Roofline, Settings
from .scaling import scaling
from .tokens import DEFAULT_SIZES, Memory

PAGE = "report.md"
# an answer of a word, of a sentence, of a paragraph, of a page
DEFAULT_LENGTHS = (8, 32, 128, 512)

# from the name of a plot and what it shows to its path and the line that embeds it
Image = Callable[[str, str], tuple[Path, str]]


@dataclass(frozen=True)
class Choice:
    """What of a group is drawn, since a plot shows one condition.

    Attributes:
        shown: cases under `condition`, each with a first token.
        base: the baseline's among them, None where it was not measured there.
    """

    group: Group
    cases: list[Case]
    baseline: Variant | None
    condition: Condition
    shown: list[Case]
    base: Case | None
    style: plots.Style


def choose(group: Group, baseline: str) -> Choice:
    """The condition under which most models were measured, the baseline among them if it can be."""
    cases = group.cases()
    chosen = baseline_of(cases, baseline)
    timed = [case for case in cases if case.stage("time_to_first_token") is not None]
    with_base = {case.condition for case in timed if case.variant == chosen}
    counts = Counter(case.condition for case in timed if not with_base or case.condition in with_base)
    condition = max(counts, key=lambda found: counts[found], default=cases[0].condition)
    shown = [case for case in timed if case.condition == condition]
    base = next((case for case in shown if case.variant == chosen), None)
    variants = list(dict.fromkeys(case.variant for case in cases))
    return Choice(group, cases, chosen, condition, shown, base, plots.Style(variants, chosen))


def write_report(
    files: dict[str, Results], folder: Path, baseline: str = "flashsloth", lengths: Sequence[int] = DEFAULT_LENGTHS
) -> Path:
    """Writes the page and its plots into a folder, which is made.

    Args:
        files: results by the name of their file.
        baseline: model to which ratios are taken.
        lengths: output tokens for which the page states totals, beside those measured.

    Returns:
        path of the page.

    Raises:
        ValueError: the files have no measurement.
    """
    groups = groups_of(files)
    if not any(group.measurements for group in groups):
        failed = "; ".join(line for group in groups for line in group.failures)
        raise ValueError(
            f"{', '.join(files)}: no measurement to report{f' ({failed})' if failed else ''}. "
            "Measure with flashsloth bench run."
        )
    folder.mkdir(parents=True, exist_ok=True)
    several = len(groups) > 1
    parts = [page_sections.introduction(groups, list(files))]
    for number, group in enumerate(groups, 1):
        if several:
            parts.append(f"# {number}. {group.title}")
        if not group.measurements:
            parts.append(page_sections.bullets(group.failures))
            continue
        prefix = f"{number}-" if several else ""
        parts += _report_group(choose(group, baseline), folder, prefix, baseline, lengths)
    page = folder / PAGE
    write_whole(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def _report_group(choice: Choice, folder: Path, prefix: str, baseline: str, lengths: Sequence[int]) -> list[str]:
    missing = page_sections.missing_stages(choice.cases)

    def image(name: str, text: str) -> tuple[Path, str]:
        file = f"{prefix}{name}.png"
        return folder / file, f"![{text}]({file})"

    return [
        *page_sections.summary(choice.shown, choice.base),
        *page_sections.ratios(choice.cases, choice.baseline, baseline, lengths, choice.condition),
        *_first_token(choice, image, missing),
        *_totals(choice, image, lengths, missing),
        *_tokens(choice, image, missing),
        *_memory(choice, image),
        *_scaling(choice, image, missing),
        *page_sections.loss_section(choice.cases, choice.baseline, baseline, _small_images(choice)),
        *page_sections.machine_section(choice.group, choice.cases),
        *page_sections.missing_section(missing, choice.group),
    ]


def _caption(choice: Choice) -> str:
    return f"{choice.condition}; {choice.group.title}"


def _first_token(choice: Choice, image: Image, missing: list[str]) -> list[str]:
    if not choice.shown:
        missing.append("Time to the first token: not measured for any model, not drawn.")
        return []
    path, link = image("first-token", "Stages up to the first token")
    plots.draw_stages(choice.shown, _caption(choice), path)
    parts = ["## Time to the first token", link, *page_sections.stage_tables(choice.cases, choice.condition)]
    lines = _lines_by_size(choice)
    if lines:
        path, link = image("image-size", "Time to the first token against image size")
        workload = lines[0][0].condition
        images = f"{workload.images} image{'s' * (workload.images > 1)}"
        title = f"{images}, {workload.text_tokens} text tokens, batch {workload.batch}; {choice.group.title}"
        plots.draw_sizes(lines, choice.style, title, path)
        parts.append(link)
    else:
        sizes = ", ".join(dict.fromkeys(case.condition.size for case in choice.cases))
        missing.append(
            f"Time to the first token against image size: no model was measured at two sizes ({sizes} only), so there "
            "is no line to draw. Add sizes with `flashsloth bench run --sizes 384x384,768x768,1344x1344`."
        )
    return parts


def _lines_by_size(choice: Choice) -> list[list[Case]]:
    """Cases of each model at several sizes, all of the workload of which there are most."""
    found: dict[Condition, dict[Variant, list[Case]]] = {}
    for case in choice.cases:
        if case.stage("time_to_first_token") is not None:
            found.setdefault(case.condition.workload, {}).setdefault(case.variant, []).append(case)
    several = {
        workload: [cases for cases in lines.values() if len(cases) > 1] + [c for c in lines.values() if len(c) == 1]
        for workload, lines in found.items()
        if any(len(cases) > 1 for cases in lines.values())
    }
    return max(several.values(), key=lambda lines: sum(map(len, lines)), default=[])


def _totals(choice: Choice, image: Image, lengths: Sequence[int], missing: list[str]) -> list[str]:
    drawn = [case for case in choice.shown if len(case.knots()) > 1 or case.per_token is not None]
    for case in choice.shown:
        if case not in drawn:
            missing.append(f"{case.variant.title}: no answer longer than one token was measured; no total time drawn.")
    if not drawn:
        return []
    crossings = []
    if choice.base in drawn and choice.base is not None:
        rivals = [case for case in drawn if is_rival(case.variant, choice.base.variant)]
        crossings = [(case, crossing) for case in rivals for crossing in crossovers(case, choice.base)]
    measured = max(max(case.by_length) for case in drawn)
    last = max((crossing.tokens for _, crossing in crossings), default=0.0)
    longest = max(measured, *lengths, int(2 * last))
    path, link = image("total-time", "Total time against output length")
    plots.draw_totals(drawn, crossings, longest, choice.style, _caption(choice), path)
    known = sorted({length for case in drawn for length in case.by_length})
    parts = [
        "## Total time and the length of the answer",
        link,
        f"Measured at {', '.join(map(str, known))} output tokens; between them on straight lines, beyond the longest "
        "the last total + ms/token for every token more.",
    ]
    if choice.base is not None and choice.base in drawn:
        parts.append(page_sections.bullets(crossover_lines(drawn, choice.base)))
    return parts


def _tokens(choice: Choice, image: Image, missing: list[str]) -> list[str]:
    lines = _lines_by_size(choice)
    cases = [case for line in lines for case in line] or choice.shown
    known = [case for case in cases if case.longest.visual_tokens]
    missing += [f"{case.variant.title}: visual tokens unknown, not drawn." for case in cases if case not in known]
    if not known:
        return []
    path, link = image("visual-tokens", "Visual tokens against time to the first token")
    sizes = sorted({(c.condition.width * c.condition.height, c.condition.size) for c in known})
    title = _caption(choice)
    if len(sizes) > 1:
        title = f"images of {', '.join(size for _, size in sizes)}; the largest labelled; {choice.group.title}"
    plots.draw_tokens(known, choice.style, title, path)
    return ["## Visual tokens and time", link]


def _memory(choice: Choice, image: Image) -> list[str]:
    cases = choice.shown or [case for case in choice.cases if case.condition == choice.condition]
    rows: list[tuple[str, Memory | None, int | None]] = []
    for case in cases:
        counted = count(case.longest.settings)
        memory = None if counted is None else counted.memory
        if memory is not None and case.variant.quantization is not None:
            # the static tier knows nothing of fewer bits: what is held was added up when it was measured
            held = case.longest.parameter_bytes
            memory = None if held is None else dataclasses.replace(memory, weights=held)
        rows.append((case.variant.title, memory, case.longest.peak_memory_bytes))
    drawn = [row for row in rows if row[1] is not None or row[2] is not None]
    parts = ["## Memory"]
    if drawn:
        path, link = image("memory", "Weights, KV cache and activations")
        plots.draw_memory(drawn, _caption(choice), path)
        parts.append(link)
    return [*parts, *page_sections.memory_table(rows, choice.group.device)]


def _scaling(choice: Choice, image: Image, missing: list[str]) -> list[str]:
    roofline = choice.group.roofline
    found, left_out = scaling(
        choice.group.measurements, lambda settings, metric: _expected(settings, metric, roofline)
    )
    page_sections.note_axes(choice.group.measurements, missing)
    if not found:
        return []
    path, link = image("scaling", "Scaling with images, batch and output length")
    plots.draw_scaling(found, choice.style, path)
    return ["## Scaling", link, *page_sections.scaling_table(found, left_out, roofline is not None)]


def _expected(settings: Settings, metric: str, roofline: Roofline | None) -> float | None:
    counted = count(settings)
    if counted is None:
        return None
    if metric == "peak_memory_bytes":
        return None if settings.quantization is not None else float(counted.memory.total)
    if metric == "time_to_first_token":
        return counted.first_token(roofline)
    return counted.per_token(roofline) if metric == "decode_per_token" else counted.total(roofline)


def _small_images(choice: Choice) -> tuple[str, list[tuple[str, float]]] | None:
    """Operations to the first token at a small size that was not measured, as ratios to the baseline."""
    width, height = min(DEFAULT_SIZES, key=lambda size: size[0] * size[1])
    if choice.base is None or any(c.condition.width * c.condition.height <= width * height for c in choice.cases):
        return None

    def counted(case: Case) -> Counted | None:
        return count(dataclasses.replace(case.longest.settings, width=width, height=height))

    base = counted(choice.base)
    if base is None:
        return None
    ratios = []
    for case in choice.shown:
        found = counted(case) if is_rival(case.variant, choice.base.variant) else None
        if found is not None:
            ratios.append((case.variant.title, found.first_token_flops / base.first_token_flops))
    return f"{width}x{height}", ratios

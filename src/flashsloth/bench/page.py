"""The report of `flashsloth bench report`: a page in Markdown for people, with its plots beside it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashsloth.reports.page import write_page
from flashsloth.reports.table import GIGA, TERA, Table

from . import page_tables, plots
from .comparison import TIMES, Case, Condition, Group, Variant, baseline_of, crossovers, groups_of, losses, rivals_of
from .counted import Memory, count
from .results import Results, Roofline, Settings
from .scaling import AXES, scaling
from .tables import spread
from .tokens import DEFAULT_SIZES

PAGE, TEMPLATE = "report.md", Path(__file__).with_name("page.md.jinja")
# an answer of a word, of a sentence, of a paragraph, of a page
DEFAULT_LENGTHS = (8, 32, 128, 512)


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
        failed = "; ".join(f"{what}: {why}" for group in groups for what, why in group.failures)
        raise ValueError(
            f"{', '.join(files)}: no measurement to report{f' ({failed})' if failed else ''}. "
            "Measure with flashsloth bench run."
        )
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, group in enumerate(groups, 1):
        prefix = f"{number}-" if len(groups) > 1 else ""
        missing: list[tuple[str, str]] = []
        part = (
            _Part(group, baseline, folder, prefix, missing).values(lengths) if group.measurements else {"ratios": []}
        )
        rows = [*dict.fromkeys(missing), *group.failures, *group.repeated]
        parts.append({**part, "group": group, "missing": Table("", ("what", "why"), rows, texts=2)})
    write_page(folder / PAGE, TEMPLATE, files=list(files), parts=parts)
    return folder / PAGE


class _Part:
    """The plots of a group, and what its part of the page says.

    Plots show one condition: that under which most models were measured, the baseline among them if it can be.

    Args:
        missing: gets what cannot be shown, and why.
    """

    def __init__(self, group: Group, baseline: str, folder: Path, prefix: str, missing: list[tuple[str, str]]) -> None:
        self.group, self.folder, self.prefix, self.missing = group, folder, prefix, missing
        self.cases = cases = group.cases()
        self.baseline = baseline_of(cases, baseline)
        self.name = baseline if self.baseline is None else self.baseline.title
        timed = [case for case in cases if case.stage("time_to_first_token") is not None]
        with_base = {case.condition for case in timed if case.variant == self.baseline}
        counts = Counter(case.condition for case in timed if not with_base or case.condition in with_base)
        self.condition = max(counts, key=lambda found: counts[found], default=cases[0].condition)
        self.shown = [case for case in timed if case.condition == self.condition]
        self.base = next((case for case in self.shown if case.variant == self.baseline), None)
        self.style = plots.Style(list(dict.fromkeys(case.variant for case in cases)), self.baseline)
        self.caption = f"{self.condition}; {group.title}"
        self.plots: dict[str, str] = {}

    def path(self, plot: str) -> Path:
        """Where a plot is saved, which is noted for the page."""
        self.plots[plot] = f"{self.prefix}{plot}.png"
        return self.folder / self.plots[plot]

    def values(self, lengths: Sequence[int]) -> dict[str, Any]:
        """Draws all plots; everything that the template says about the group."""
        for stage in ("preprocess", *TIMES, "decode_per_token", "total"):
            lacking = [c.variant.title for c in self.cases if all(stage not in m.stages for m in c.by_length.values())]
            if lacking:
                self.missing.append((stage, f"not measured for {', '.join(dict.fromkeys(lacking))}"))
        compared = rivals_of(self.cases, self.baseline)
        found = [] if self.baseline is None else losses(self.cases, self.baseline)
        rivals = list(dict.fromkeys(case.variant for case, _ in compared))
        beaten = {loss.rival for loss in found}
        return {
            "baseline": self.name,
            "measured": self.baseline is not None,
            "has_rivals": any(self.baseline and c.variant.is_rival_of(self.baseline) for c in self.cases),
            "ratios": page_tables.ratio_tables(self.cases, self.baseline, lengths, self.condition),
            **self.first_token(),
            **self.totals(lengths),
            **self.memory(),
            **self.scaling(),
            "losses": page_tables.loss_tables(found, compared, self.name),
            "compared": rivals,
            "unbeaten": [variant.title for variant in rivals if variant not in beaten],
            "facts": Table("", ("of", "is"), self.facts(), texts=2),
            "plots": self.plots,
        }

    def first_token(self) -> dict[str, Any]:
        if not self.shown:
            self.missing.append(("Time to the first token", "not measured for any model, not drawn"))
            return {"stages": []}
        plots.draw_stages(self.shown, self.caption, self.path("first-token"))
        lines = self.lines_by_size()
        if lines:
            workload = lines[0][0].condition
            images = f"{workload.images} image{'s' * (workload.images > 1)}"
            title = f"{images}, {workload.text_tokens} text tokens, batch {workload.batch}; {self.group.title}"
            plots.draw_sizes(lines, self.style, title, self.path("image-size"))
        else:
            sizes = ", ".join(dict.fromkeys(case.condition.size for case in self.cases))
            self.missing.append((
                "Time to the first token against image size",
                f"no model was measured at two sizes ({sizes} only). Add sizes with `flashsloth bench run --sizes "
                "384x384,768x768,1344x1344`",
            ))  # fmt: skip
        cases = [case for line in lines for case in line] or self.shown
        known = [case for case in cases if case.longest.visual_tokens]
        self.missing += [(c.variant.title, "visual tokens unknown, not drawn") for c in cases if c not in known]
        if known:
            sizes = ", ".join(size for _, size in sorted({(c.condition.pixels, c.condition.size) for c in known}))
            title = f"images of {sizes}; {self.group.title}" if ", " in sizes else self.caption
            plots.draw_tokens(known, self.style, title, self.path("visual-tokens"))
        return {"stages": page_tables.stage_tables(self.cases, self.condition)}

    def lines_by_size(self) -> list[list[Case]]:
        """Cases of each model at several sizes, all of the workload of which there are most."""
        found: dict[Condition, dict[Variant, list[Case]]] = {}
        for case in self.cases:
            if case.stage("time_to_first_token") is not None:
                found.setdefault(case.condition.workload, {}).setdefault(case.variant, []).append(case)
        several = [list(lines.values()) for lines in found.values() if max(map(len, lines.values())) > 1]
        most = max(several, key=lambda lines: sum(map(len, lines)), default=[])
        return sorted(most, key=lambda cases: len(cases) == 1)

    def totals(self, lengths: Sequence[int]) -> dict[str, Any]:
        drawn = [case for case in self.shown if len(case.knots()) > 1 or case.per_token is not None]
        self.missing += [
            (case.variant.title, "no answer longer than one token was measured; no total time drawn")
            for case in self.shown
            if case not in drawn
        ]
        if not drawn:
            return {}
        rivals = rivals_of(drawn, self.baseline)
        crossings = [(case, crossing) for case, base in rivals for crossing in crossovers(case, base)]
        measured = sorted({length for case in drawn for length in case.by_length})
        longest = max(*measured, *lengths, *(int(2 * crossing.tokens) for _, crossing in crossings))
        plots.draw_totals(drawn, crossings, longest, self.style, self.caption, self.path("total-time"))
        return {"lengths": measured, "crossovers": page_tables.crossover_table(rivals)}

    def memory(self) -> dict[str, Any]:
        width, height = min(DEFAULT_SIZES, key=lambda size: size[0] * size[1])
        smaller = all(case.condition.pixels > width * height for case in self.cases)

        def operations(case: Case) -> int | None:
            counted = count(dataclasses.replace(case.longest.settings, width=width, height=height))
            return None if counted is None else counted.first_token_flops

        base = operations(self.base) if smaller and self.base is not None else None
        rows: list[tuple[Case, Memory | None, float | None]] = []
        for case in self.shown or [case for case in self.cases if case.condition == self.condition]:
            counted = count(case.longest.settings)
            memory = None if counted is None else counted.memory
            if memory is not None and case.variant.quantization is not None:
                # the static tier knows nothing of fewer bits: what is held was added up when it was measured
                held = case.longest.parameter_bytes
                memory = None if held is None else dataclasses.replace(memory, weights=held)
            own = operations(case) if base else None
            rows.append((case, memory, own / base if base and own else None))
        bars = [(case.variant.title, memory, case.longest.peak_memory_bytes) for case, memory, _ in rows]
        bars = [bar for bar in bars if bar[1] is not None or bar[2] is not None]
        if bars:
            plots.draw_memory(bars, self.caption, self.path("memory"))
        size = f"{width}x{height}" if base else None
        return {"memory": page_tables.memory_table(rows, size, self.name), "small": size}

    def scaling(self) -> dict[str, Any]:
        for axis, name in AXES.items():
            values = {getattr(m.settings, axis) for m in self.group.measurements}
            if len(values) < 2:
                option = f"--{axis.replace('_', '-')}"
                self.missing.append((
                    f"Scaling with {name}",
                    f"only {values.pop()} was measured, so there is no slope to fit. Add values with "
                    f"`flashsloth bench run {option} 1,4,16`",
                ))  # fmt: skip
        roofline = self.group.roofline
        found, left_out = scaling(
            self.group.measurements, lambda settings, metric: _expected(settings, metric, roofline)
        )
        if found:
            plots.draw_scaling(found, self.style, self.path("scaling"))
        return {"slopes": page_tables.scaling_table(found), "left_out": left_out}

    def facts(self) -> list[tuple[str, str]]:
        """Machine card, code, settings, repetitions and spread."""
        group, machine, line = self.group, self.group.machine, self.group.roofline
        settings, measured = [m.settings for m in group.measurements], group.measurements
        memory = f", {machine.gpu_memory_bytes / GIGA:.0f} GB" if machine.gpu_memory_bytes else ""
        rows = [
            ("machine", f"{machine.cores} cores of {machine.cpu}, {machine.memory_bytes / GIGA:.0f} GB"),
            ("flags", ", ".join(machine.cpu_flags) or "not recorded"),
            ("system", machine.system),
            ("accelerator", f"{machine.gpu}{memory}" if machine.gpu else "none"),
            ("commit", group.commit or "not recorded"),
            ("versions", ", ".join(f"{name} {version}" for name, version in group.versions.items())),
            ("run", f"{group.device}, {group.dtype}, {group.threads} threads; {', '.join(group.files)}"),
            ("matrix product", f"{line.matrix_flops_per_second / TERA:.3g} TFLOP/s, {'x'.join(map(str, line.shape))}")
            if line
            else ("matrix product", "not recorded for this dtype"),
            ("reading", f"{line.bandwidth_bytes_per_second / GIGA:.3g} GB/s" if line else "not recorded"),
            ("image sizes", ", ".join(dict.fromkeys(f"{s.width}x{s.height}" for s in settings))),
        ]
        for name, text in {**AXES, "text_tokens": "text tokens"}.items():
            rows.append((text, ", ".join(map(str, sorted({getattr(s, name) for s in settings})))))
        counts = sorted({len(stage.samples) for m in measured for stage in m.stages.values()})
        if counts:
            rows.append(
                ("repetitions, of which medians are reported", " to ".join(map(str, sorted({counts[0], counts[-1]}))))
            )
            rows.append(
                ("repetitions that other processes disturbed", f"{sum(m.discarded for m in measured)}, repeated")
            )
        stages = [(case, case.stage("time_to_first_token")) for case in self.cases]
        spreads = [(spread(s.samples), f"{c.variant.title}, {c.condition}") for c, s in stages if s and s.samples[1:]]
        if spreads:
            worst, where = max(spreads)
            rows.append(("largest spread of a first token", f"{worst:.0%} ({where})"))
        loaded = dict.fromkeys(case.variant.title for case in self.cases if case.variant.under_load)
        if loaded:
            rows.append(("measured while the machine was busy, not compared", ", ".join(loaded)))
        return rows


def _expected(settings: Settings, metric: str, roofline: Roofline | None) -> float | None:
    counted = count(settings)
    if counted is None:
        return None
    if metric == "peak_memory_bytes":
        return None if settings.quantization is not None else float(counted.memory.total)
    if metric == "time_to_first_token":
        return counted.first_token(roofline)
    return counted.per_token(roofline) if metric == "decode_per_token" else counted.total(roofline)

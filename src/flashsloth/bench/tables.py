"""Tables of what `bench tokens` counts and of what `bench run` measures, and the pages they are written to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flashsloth.reports.table import GIGA, KIBI, MEBI, MEGA, TERA, Column, Table

from .counted import PARTS
from .results import Measurement, Results
from .stock import find_entry
from .tokens import ImageCost, ModelCost

BASELINE = "flashsloth"
STAGE_COLUMNS = ("preprocess", "encode", "compress", "prefill")
SHARES = {"encode": "encoder of peak", "prefill": "prefill of peak", "decode_per_token": "decode of bandwidth"}
_PART_HEADINGS = dict(zip(PARTS, ("vision M", "connector M", "EmbQ M", "LLM M", "head M"), strict=True))


def _published(cost: ModelCost) -> str | None:
    if cost.published_parameters is None:
        return None
    difference = cost.total_parameters - cost.published_parameters
    return f"{difference:+,}" if difference else "exact"


def _part(name: str, cost: ModelCost) -> int | None:
    return cost.parameters[name] or None


def _tokens(cost: ModelCost, image: ImageCost) -> str:
    others = ", ".join(map(str, cost.visual_token_choices[1:]))
    return f"{image.one.image.tokens} or {others}" if others else str(image.one.image.tokens)


_MODEL_COLUMNS = (
    Column("model", lambda cost: cost.title),
    Column("built", lambda cost: cost.origin),
    *(Column(heading, partial(_part, name), ",.1f", MEGA) for name, heading in _PART_HEADINGS.items()),
    Column("parameters", lambda cost: cost.total_parameters, ","),
    Column("published", _published),
    Column("KV KiB/token", lambda cost: cost.cache_bytes_per_token, ",.0f", KIBI),
    Column("decode reads GB", lambda cost: cost.decode_bytes, ".2f", GIGA),
)


def token_tables(costs: Sequence[ModelCost], text_tokens: int, dtype: str, batch: int) -> list[Table]:
    """Parameters and the cost of one more token; then for each image size tokens, operations (tera to the first token,
    giga per token after it) and memory."""
    found = [Table.of(f"Parameters, and the cost of one more token in {dtype}", _MODEL_COLUMNS, costs)]
    prompts = "" if batch == 1 else f", batch of {batch}"
    for index, first in enumerate(costs[0].images):
        base = next((cost.images[index].one.first_token_flops for cost in costs if cost.name == BASELINE), None)
        ratio = Column("/ FlashSloth", lambda pair: pair[1].one.first_token_flops, ".2f", base)
        columns = (
            Column("model", lambda pair: pair[0].title),
            Column("views", lambda pair: pair[1].one.image.views),
            Column("patches", lambda pair: pair[1].one.image.patches),
            Column("tokens", lambda pair: _tokens(*pair)),
            Column("vision T", lambda pair: pair[1].one.flops["encode"], ".2f", TERA),
            Column("compressor T", lambda pair: pair[1].one.flops["compress"], ".2f", TERA),
            Column("prefill T", lambda pair: pair[1].one.flops["prefill"], ".2f", TERA),
            Column("total TFLOP", lambda pair: pair[1].one.first_token_flops, ".2f", TERA),
            *([] if base is None else [ratio]),
            Column("decode G", lambda pair: pair[1].one.decode_flops, ".2f", GIGA),
            Column("weights GB", lambda pair: pair[1].memory.weights, ".2f", GIGA),
            Column("KV MiB", lambda pair: pair[1].memory.cache, ",.0f", MEBI),
            Column("activations MiB", lambda pair: pair[1].memory.activations, ",.0f", MEBI),
        )
        title = f"An image of {first.width}x{first.height} and {text_tokens} text tokens, {dtype}{prompts}"
        found.append(Table.of(title, columns, [(cost, cost.images[index]) for cost in costs]))
    return found


def token_notes(costs: Sequence[ModelCost]) -> list[str]:
    """One line per model about which something is assumed."""
    return [f"{cost.title}: {cost.notes}" for cost in costs if cost.notes]


def bullets(lines: Sequence[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def token_markdown(costs: Sequence[ModelCost], text_tokens: int, dtype: str, batch: int) -> str:
    """The tables, then what is assumed."""
    parts = [*map(str, token_tables(costs, text_tokens, dtype, batch)), bullets(token_notes(costs))]
    return "\n\n".join(filter(None, parts)) + "\n"


def label(measurement: Measurement) -> str:
    """Model and whatever is not the default. A model that is not known here, of another version, keeps its name."""
    settings = measurement.settings
    entry = find_entry(settings.model, settings.assembly)
    # where our own models are packed by default
    plain = entry is not None and entry.origin == "own" and settings.device == "cpu" and not settings.compile
    extras = [
        "stock parts" if entry is None and settings.assembly == "stock" else None,
        settings.attention if settings.attention != "sdpa" else None,
        "compiled" if settings.compile else None,
        settings.quantization,
        None if settings.weights is None else f"weights of {Path(settings.weights).name}",
        "torch kernels" if plain and settings.kernels == "torch" else None,
        "other load" if measurement.under_load else None,
    ]
    found = ", ".join(extra for extra in extras if extra)
    title = settings.model if entry is None else entry.title
    return title + (f" ({found})" if found else "")


def spread(samples: Sequence[float]) -> float:
    """From the lowest to the highest sample, as a share of the median."""
    return (max(samples) - min(samples)) / statistics.median(samples)


def milliseconds(seconds: float) -> str:
    """With one decimal."""
    return f"{seconds * 1e3:,.1f}"


def measured_tables(results: Results) -> list[Table]:
    """One table per image size, images a prompt, batch, dtype and length of the answer."""
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for measurement in results.measurements:
        if measurement.error is None:
            s = measurement.settings
            key = (s.width, s.height, s.images, s.batch, s.text_tokens, s.output_tokens, s.dtype)
            groups.setdefault(key, []).append(measurement)
    return [_measured_table(members) for members in groups.values()]


def _measured_table(members: Sequence[Measurement]) -> Table:
    s = members[0].settings
    plain = [
        m for m in members
        if (m.settings.model, m.settings.assembly) == (BASELINE, "own")
        and not (m.settings.compile or m.settings.quantization)
    ]  # fmt: skip

    def median(stage: str) -> Column:
        return Column(f"{stage} ms", lambda m: m.median(stage), milliseconds)

    def ratio(stage: str) -> Column:
        base = plain[0].median(stage) if plain else None
        return Column("/ FlashSloth", lambda m: m.median(stage) if base else None, ".2f", base)

    columns = (
        Column("model", label),
        Column("visual tokens", lambda m: m.visual_tokens),
        *map(median, STAGE_COLUMNS),
        Column("first token ms", lambda m: m.median("time_to_first_token"), milliseconds),
        ratio("time_to_first_token"),
        Column("spread", lambda m: spread(m.stages["time_to_first_token"].samples), ".0%"),
        Column("ms/token", lambda m: m.median("decode_per_token"), milliseconds),
        ratio("decode_per_token"),
        Column(f"total s, {s.output_tokens} tokens", lambda m: m.median("total"), ".2f"),
        *(Column(heading, partial(_share, stage), ".0%") for stage, heading in SHARES.items()),
        Column("weights GB", lambda m: m.parameter_bytes, ".2f", GIGA),
        Column("KV MiB", lambda m: m.cache_bytes, ",.0f", MEBI),
        Column("peak GB", lambda m: m.peak_memory_bytes, ".2f", GIGA),
    )
    prompts = f"{s.images} image{'s' * (s.images > 1)} of {s.width}x{s.height} and {s.text_tokens} text tokens"
    return Table.of(f"{prompts}, batch {s.batch}, {s.dtype}", columns, members)


def _share(stage: str, measurement: Measurement) -> float | None:
    return measurement.share_of_roofline.get(stage)


def machine_line(results: Results) -> str:
    """The machine and the versions, in one line."""
    machine = results.machine
    where = machine.gpu or f"{machine.cores} cores of {machine.cpu} ({', '.join(machine.cpu_flags)})"
    rates = "; ".join(
        f"{roofline.dtype}: {roofline.matrix_flops_per_second / TERA:.2f} TFLOP/s, "
        f"{roofline.bandwidth_bytes_per_second / GIGA:.1f} GB/s"
        for roofline in results.rooflines
    )
    made_by = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    commit = f", commit {results.commit}" if results.commit else ""
    return f"{where}, {machine.memory_bytes / GIGA:.0f} GB. Same-run rooflines: {rates}. {made_by}{commit}."


def failures(results: Results) -> list[str]:
    """One line for each thing without numbers."""
    return [f"{m.settings.model}: {m.error}" for m in results.measurements if m.error is not None]


def measured_markdown(results: Results) -> str:
    """Everything, as a page."""
    failed = bullets([f"not measured: {line}" for line in failures(results)])
    return "\n\n".join(filter(None, [machine_line(results), *map(str, measured_tables(results)), failed])) + "\n"

"""Tables of the measured tier."""

from __future__ import annotations

import statistics
from pathlib import Path

from .models import MODELS
from .results import Measurement, Results
from .stock import STOCK
from .tables import BASELINE, GIGA, MEBI, TERA, TableData

_MILLI = 1e3
STAGE_COLUMNS = ("preprocess", "encode", "compress", "prefill")
SHARES = ("encode", "prefill", "decode_per_token")


def label(measurement: Measurement) -> str:
    """Model and whatever is not the default. A model that is not known here, of another version, keeps its name."""
    settings = measurement.settings
    entry = (STOCK if settings.assembly == "stock" else MODELS).get(settings.model)
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


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * _MILLI:,.1f}"


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or not base else f"{value / base:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _spread(measurement: Measurement) -> str:
    samples = measurement.stages["time_to_first_token"].samples
    return _percent((max(samples) - min(samples)) / statistics.median(samples))


def _is_plain(measurement: Measurement) -> bool:
    settings = measurement.settings
    return (settings.model, settings.assembly) == (BASELINE, "own") and not (settings.compile or settings.quantization)


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


def measured_tables(results: Results) -> list[TableData]:
    """One table per image size, images a prompt, batch, dtype and length of the answer."""
    groups: dict[tuple, list[Measurement]] = {}
    for measurement in results.measurements:
        if measurement.error is None:
            s = measurement.settings
            key = (s.width, s.height, s.images, s.batch, s.text_tokens, s.output_tokens, s.dtype)
            groups.setdefault(key, []).append(measurement)
    found = []
    for (width, height, images, batch, text, output, dtype), members in groups.items():
        base = next((m for m in members if _is_plain(m)), None)
        rows = [
            (
                label(m),
                f"{m.visual_tokens}",
                *(_milliseconds(m.median(stage)) for stage in STAGE_COLUMNS),
                _milliseconds(m.median("time_to_first_token")),
                _ratio(m.median("time_to_first_token"), None if base is None else base.median("time_to_first_token")),
                _spread(m),
                _milliseconds(m.median("decode_per_token")),
                _ratio(m.median("decode_per_token"), None if base is None else base.median("decode_per_token")),
                f"{m.median('total') or 0:.2f}",
                *(_percent(m.share_of_roofline.get(stage)) for stage in SHARES),
                f"{(m.parameter_bytes or 0) / GIGA:.2f}",
                f"{(m.cache_bytes or 0) / MEBI:,.0f}",
                f"{(m.peak_memory_bytes or 0) / GIGA:.2f}",
            )
            for m in members
        ]
        columns = (
            "model", "visual tokens", *(f"{stage} ms" for stage in STAGE_COLUMNS), "first token ms", "/ FlashSloth",
            "spread", "ms/token", "/ FlashSloth", f"total s, {output} tokens", "encoder of peak", "prefill of peak",
            "decode of bandwidth", "weights GB", "KV MiB", "peak GB",
        )  # fmt: skip
        prompts = f"{images} image{'s' * (images > 1)} of {width}x{height} and {text} text tokens"
        found.append(TableData(f"{prompts}, batch {batch}, {dtype}", columns, rows))
    return found


def failures(results: Results) -> list[str]:
    """One line for each thing without numbers."""
    return [f"{m.settings.model}: {m.error}" for m in results.measurements if m.error is not None]


def measured_markdown(results: Results) -> str:
    """Everything, as a page."""
    parts = [machine_line(results), *(table.markdown() for table in measured_tables(results))]
    if failed := failures(results):
        parts.append("\n".join(f"- not measured: {line}" for line in failed))
    return "\n\n".join(parts) + "\n"

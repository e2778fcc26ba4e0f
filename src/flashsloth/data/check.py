"""`flashsloth data check`: everything that can be known about a recipe's data before a GPU is paid for."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader

from .broken import MAX_PLACE, MAX_REASON, BrokenSamples
from .collator import Collator
from .dataset import TEMPLATE_WITHOUT_ANSWERS, build_collator, build_source
from .inspection import Inspection, Inspector, inspect_record
from .recipe import MixtureData, RecipeSettings, StageSettings, is_streamed
from .sampler import ModalityLengthSampler
from .streams import RecordStream
from .text_files import printable

if TYPE_CHECKING:
    from ..model.processing_flashsloth import FlashSlothProcessor

# Rendered samples cannot be broken; a few tell their lengths.
RENDERED_SAMPLES = 256
HISTOGRAM_BINS = 10

OnProgress = Callable[[str, int, int | None], None]
"""Called with the name of a source, records checked so far, and how many there will be (None: unknown)."""


@dataclass(frozen=True)
class Finding:
    """A defect with its place."""

    source: str
    kind: str
    place: str
    message: str


@dataclass
class SourceReport:
    """What was found in one source.

    Attributes:
        size: samples, None for a stream.
        checked: records that were read.
        broken: records with a defect that training would skip.
        images: how many records have how many images.
    """

    name: str
    kind: str
    size: int | None = None
    checked: int = 0
    broken: int = 0
    images: Counter[int] = field(default_factory=Counter)


@dataclass
class StageSourceReport:
    """Lengths of the records of one source in one stage, in tokens; one entry a usable record."""

    text_tokens: list[int] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    turns: int = 0
    dropped_turns: int = 0
    shortened: int = 0

    def add(self, length: int, visual: int, turns: int, kept_turns: int, is_shorter: bool) -> None:
        self.text_tokens.append(length - visual)
        self.visual_tokens.append(visual)
        self.turns += turns
        self.dropped_turns += turns - kept_turns
        self.shortened += is_shorter

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each record, text and images."""
        return np.array(self.text_tokens, dtype=np.int64) + np.array(self.visual_tokens, dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        return {
            "samples": len(self.text_tokens),
            "text_tokens": summarize_lengths(np.array(self.text_tokens)),
            "visual_tokens": summarize_lengths(np.array(self.visual_tokens)),
            "tokens": summarize_lengths(self.lengths),
            "shortened_samples": self.shortened,
            "dropped_turns_share": self.dropped_turns / self.turns if self.turns else 0.0,
        }


@dataclass
class StageReport:
    """What a stage will learn from.

    Attributes:
        samples_per_epoch: None for a stream.
        steps: optimiser steps; None where only the clock ends the stage.
        epochs: how often the data is gone through; None where that is not known.
    """

    name: str
    data: str
    max_length: int
    samples_per_epoch: int | None
    steps: int | None
    epochs: float | None
    sources: dict[str, StageSourceReport]


@dataclass
class Report:
    """Result of `check_recipe`."""

    sources: list[SourceReport]
    stages: list[StageReport]
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "defects": [vars(finding) for finding in self.findings],
            "sources": {
                source.name: {
                    "kind": source.kind,
                    "samples": source.size,
                    "checked": source.checked,
                    "broken": source.broken,
                    "broken_share": source.broken / source.checked if source.checked else 0.0,
                    "images_per_sample": {str(count): number for count, number in sorted(source.images.items())},
                }
                for source in self.sources
            },
            "stages": {
                stage.name: {
                    "data": stage.data,
                    "max_length": stage.max_length,
                    "samples_per_epoch": stage.samples_per_epoch,
                    "steps": stage.steps,
                    "epochs": stage.epochs,
                    "sources": {name: lengths.to_dict() for name, lengths in stage.sources.items()},
                }
                for stage in self.stages
            },
        }


def summarize_lengths(values: np.ndarray) -> dict[str, Any]:
    """Mean, median, 95th percentile, largest and a histogram (counts between `bins`) of numbers of tokens."""
    if not len(values):
        return {"mean": None, "median": None, "p95": None, "max": None, "bins": [], "counts": []}
    counts, bins = np.histogram(values, bins=min(HISTOGRAM_BINS, int(np.ptp(values)) + 1))
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
        "bins": [float(edge) for edge in bins],
        "counts": [int(count) for count in counts],
    }


def check_recipe(
    recipe: RecipeSettings,
    processor: "FlashSlothProcessor",
    image_size: int,
    limit: int | None = None,
    workers: int = 0,
    processes: int = 1,
    on_progress: OnProgress | None = None,
) -> Report:
    """Read the data of all stages as training would, and report instead of stopping.

    Args:
        image_size: width and height of rendered images, in pixels.
        limit: records of each source to read, spread evenly over it (the first ones of a stream).
        workers: processes that read; a stream is read by one.
        processes: processes of the training run, for its number of steps.
    """
    users = {name: [stage for stage in recipe.stages if name in _parts(recipe, stage)] for name in recipe.data}
    collators = {stage.name: build_collator(recipe, stage, processor) for stage in recipe.stages}
    lengths = {stage.name: {name: StageSourceReport() for name in _parts(recipe, stage)} for stage in recipe.stages}
    reports: list[SourceReport] = []
    findings: list[Finding] = []
    for stage in recipe.stages:
        if not collators[stage.name].marks_answers():  # said once, and not of every sample
            findings.append(_finding(stage.data, "no label", f"stage {stage.name}", TEMPLATE_WITHOUT_ANSWERS))
            del collators[stage.name]
    sources: dict[str, Any] = {}
    for name, stages in users.items():
        if not stages or isinstance(recipe.data[name], MixtureData):
            continue
        report = SourceReport(name, recipe.data[name].kind)
        reports.append(report)
        turns = max((stage.turns or 1 for stage in stages), default=1)
        try:
            sources[name] = build_source(recipe.data[name], name, recipe.seed, image_size, turns)
            report.size = None if isinstance(sources[name], RecordStream) else len(sources[name])
            places: dict[str, str] = {}
            indices = _choose(sources[name], limit)
            expected = limit if indices is None else len(indices)
            if isinstance(sources[name], RecordStream):
                sources[name].broken = DamagedShards(name, findings)
            used = {stage.name: collators[stage.name] for stage in stages if stage.name in collators}
            for inspection in _inspect(sources[name], used, indices, limit, workers):
                _add(inspection, report, lengths, processor.num_image_tokens)
                findings += _findings(name, inspection, places)
                if on_progress is not None:
                    on_progress(name, report.checked, expected)
            if not report.checked:
                findings.append(_finding(name, "unreadable source", f"data.{name}", "it holds no samples"))
        except (ValueError, OSError) as error:
            findings.append(_finding(name, "unreadable source", f"data.{name}", error))
    stage_reports = [
        _stage_report(recipe, stage, sources, lengths[stage.name], processor.num_image_tokens, processes)
        for stage in recipe.stages
    ]
    for stage, prepared in zip(recipe.stages, stage_reports, strict=True):
        samples = prepared.samples_per_epoch
        if samples is not None and samples < stage.batch_size * processes:
            message = f"{samples} samples fill no batch of {stage.batch_size} for each of {processes} processes"
            findings.append(_finding(stage.data, "too few samples", f"stage {stage.name}", message))
    return Report(reports, stage_reports, findings)


def _finding(source: str, kind: str, place: object, message: object) -> Finding:
    return Finding(source, kind, printable(place, MAX_PLACE), printable(message, MAX_REASON))


def _parts(recipe: RecipeSettings, stage: StageSettings) -> list[str]:
    source = recipe.data[stage.data]
    return list(source.sources) if isinstance(source, MixtureData) else [stage.data]


class DamagedShards(BrokenSamples):
    """Takes a stream's report of a shard that cannot be read to its end, without a limit."""

    def __init__(self, source: str, findings: "list[Finding]") -> None:
        super().__init__(0)
        self.source, self.findings = source, findings

    def add(self, place: str, reason: object) -> None:
        """One more finding."""
        finding = _finding(self.source, "damaged shard", place, reason)
        if finding not in self.findings[-2:]:  # reading on after the damage reports it again
            self.findings.append(finding)


def _choose(source: Any, limit: int | None) -> np.ndarray | None:
    """Indices of the records to read, spread evenly; None for a stream."""
    if isinstance(source, RecordStream):
        return None
    if limit is None:
        limit = RENDERED_SAMPLES if source.is_independent else len(source)
    return np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(np.int64)


def _inspect(
    source: Any, collators: dict[str, Collator], indices: np.ndarray | None, limit: int | None, workers: int
) -> Iterator[Inspection]:
    if indices is None:
        for record in itertools.islice(source.one_pass(), limit):
            yield inspect_record(record, collators)
        return
    yield from DataLoader(
        Inspector(source, indices, collators), batch_size=None, num_workers=workers, collate_fn=_same
    )


def _same(value: Any) -> Any:
    return value


def _add(
    inspection: Inspection, report: SourceReport, lengths: dict[str, dict[str, StageSourceReport]], image_tokens: int
) -> None:
    report.checked += 1
    report.broken += bool(inspection.defects)
    report.images[inspection.num_images] += 1
    if inspection.defects:
        return
    for stage, measure in inspection.measures.items():
        visual = measure.kept_images * image_tokens
        shorter = measure.kept_length < measure.length
        lengths[stage][report.name].add(measure.kept_length, visual, measure.turns, measure.kept_turns, shorter)


def _findings(source: str, inspection: Inspection, places: dict[str, str]) -> Iterator[Finding]:
    for defect in inspection.defects:
        yield _finding(source, defect.kind, inspection.place, defect.message)
    if inspection.identifier is not None:
        first = places.setdefault(inspection.identifier, inspection.place)
        if first != inspection.place:
            yield _finding(source, "duplicate id", inspection.place, f"the id is also that of {first}")


def _stage_report(
    recipe: RecipeSettings,
    stage: StageSettings,
    sources: dict[str, Any],
    lengths: dict[str, StageSourceReport],
    image_tokens: int,
    processes: int,
) -> StageReport:
    source = recipe.data[stage.data]
    samples: int | None = None
    if not is_streamed(source, recipe.data) and all(name in sources for name in lengths):
        samples = sum(len(sources[name]) for name in lengths)
        if isinstance(source, MixtureData) and source.size is not None:
            samples = source.size
        elif stage.group_by != "none" and not isinstance(source, MixtureData):
            batches = stage.gradient_accumulation * processes
            sizes = sources[stage.data].sizes()
            try:
                samples = len(ModalityLengthSampler(sizes, image_tokens, stage.batch_size, batches, recipe.seed))
            except ValueError:
                samples = 0  # neither samples with images nor those without fill a batch
    steps = None
    if samples is not None:
        batches = samples // stage.batch_size // processes
        steps = max(math.ceil(batches / stage.gradient_accumulation), 1)  # as the Trainer counts them
    if stage.max_steps is not None:
        epochs = None if steps is None else stage.max_steps / steps
        return StageReport(stage.name, stage.data, stage.max_length, samples, stage.max_steps, epochs, lengths)
    total = None if steps is None or stage.epochs is None else math.ceil(stage.epochs * steps)
    return StageReport(stage.name, stage.data, stage.max_length, samples, total, stage.epochs, lengths)

"""Every benchmark with every variant, one after the other; what fails is a row that says why, and the others go on."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.files import write_whole
from ..checkpoints.fingerprint import fingerprint
from .adapter import FlashSlothAdapter
from .benchmarks import PUBLISHED_MODELS, Benchmark
from .constant import ConstantAnswers
from .harness import load_task, quieten, revision_of, task_index
from .judge import use_judge
from .sample_images import thumbnails
from .scoring import Result, failed, frequent_answers, run_task
from .variants import FREQUENT, Variant
from .verdicts import published_model, verdict

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
SAMPLES = "samples"
FORMAT = 1
GIT = ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate, and how.

    Attributes:
        model: packaged model, folder or hub id.
        suite: name of the suite, shown in the rows.
        benchmarks: what is asked.
        variants: the model as it is first, then what it is compared with.
        device, dtype, batch_size, visual_tokens, quantization: as in the adapter.
        limit: questions a task; None for all.
        data: folder of the data; None takes the hub.
        own: how the sets of this project are drawn: `images`, `seed`, `turns`, `photos`.
        judge_url, judge_model: as in `judge.use_judge`.
        shown: samples of each kind, right and wrong, in the page.
    """

    model: str
    suite: str
    benchmarks: Sequence[Benchmark]
    variants: Sequence[Variant] = (Variant(),)
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 32
    visual_tokens: int | None = None
    quantization: str | None = None
    limit: int | None = None
    data: Path | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    judge_url: str | None = None
    judge_model: str = ""
    shown: int = 12


def run_suite(
    settings: EvalSettings, folder: Path, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any] | None:
    """Evaluate and write `results.json` and `samples/`; None on processes other than the first.

    Killed at any time, the same call goes on where this one was: finished tasks are read, answers are not asked twice.

    Args:
        folder: of results and responses.
        progress: called with (what is asked, questions done, questions).

    Raises:
        ValueError: an unknown model, or one that cannot be loaded as asked.
        OSError: results cannot be written.
    """
    quieten()
    folder.mkdir(parents=True, exist_ok=True)
    weights = fingerprint(settings.model)
    index = task_index(settings.benchmarks)
    no_judge = use_judge(settings.judge_url, settings.judge_model) if _needs_judge(settings) else ""
    rows: list[dict[str, Any]] = []
    said: set[str] = set()
    is_first = True
    for variant in settings.variants:
        model = _model(settings, variant, folder)
        is_first = model.rank == 0
        for benchmark, result in _results(settings, variant, model, index, folder, weights, no_judge, progress):
            if is_first:
                row = _row(settings, benchmark, variant, model, weights, result)
                line = f"{benchmark.title}: {row['reason']}"
                if row["reason"] and line not in said:
                    logger.warning("%s", line)
                    said.add(line)
                rows.append(row)
                _write_results(folder, settings, weights, rows)
        if isinstance(model, FlashSlothAdapter):
            model.close()
    return _write_results(folder, settings, weights, rows) if is_first else None


def _needs_judge(settings: EvalSettings) -> bool:
    return any(benchmark.judged for benchmark in settings.benchmarks)


def _model(settings: EvalSettings, variant: Variant, folder: Path) -> FlashSlothAdapter | ConstantAnswers:
    if variant.control == FREQUENT:
        return ConstantAnswers()
    options = {
        "device": settings.device, "dtype": settings.dtype, "visual_tokens": settings.visual_tokens,
        "quantization": settings.quantization, **variant.options,
    }  # fmt: skip
    return FlashSlothAdapter(settings.model, batch_size=settings.batch_size, cache=folder / "responses", **options)


def _results(
    settings: EvalSettings,
    variant: Variant,
    model: FlashSlothAdapter | ConstantAnswers,
    index: Any,
    folder: Path,
    weights: str,
    no_judge: str,
    progress: Callable[[str, int, int], None] | None,
) -> Iterator[tuple[Benchmark, Result | None]]:
    for benchmark in settings.benchmarks:
        label = f"{benchmark.title} {variant.name}".strip()
        if isinstance(model, FlashSlothAdapter) and progress is not None:
            model.progress = lambda done, total, label=label: progress(label, done, total)
        try:
            task = load_task(index, benchmark, settings.data, settings.own)
            decisive = {
                "weights": weights, "model": getattr(model, "settings", None), "control": variant.control,
                "limit": settings.limit, "revision": revision_of(task), "format": FORMAT, "shown": settings.shown,
                "judge": [settings.judge_url, settings.judge_model, no_judge] if benchmark.judged else None,
            }  # fmt: skip
            place = folder / SAMPLES / variant.folder
            result = _finished(place, benchmark.task, decisive)
            if result is None:
                if isinstance(model, ConstantAnswers):
                    model.answers[task.config.task] = frequent_answers(task)
                result = run_task(model, benchmark, task, settings.limit, not no_judge, folder)
                if result is not None:
                    if not variant.name:
                        thumbnails(task, result.samples, settings.shown)
                    _keep(place, benchmark.task, decisive, result)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # anything of a task's own code: it must not end the others
            logger.debug("%s", label, exc_info=error)
            result = failed(error)
        yield benchmark, result


def _finished(place: Path, task: str, decisive: Mapping[str, Any]) -> Result | None:
    """What an earlier run finished with the same model, data and options."""
    try:
        kept = json.loads((place / f"{task}.json").read_bytes())
    except (OSError, ValueError):
        return None
    if kept["decisive"] != json.loads(json.dumps(decisive)):
        return None
    return Result(kept["row"], kept["samples"])


def _keep(place: Path, task: str, decisive: Mapping[str, Any], result: Result) -> None:
    place.mkdir(parents=True, exist_ok=True)
    content = {"decisive": dict(decisive), "row": result.row, "samples": result.samples}
    write_whole(place / f"{task}.json", json.dumps(content, ensure_ascii=True, default=str, indent=1) + "\n")


def _row(
    settings: EvalSettings,
    benchmark: Benchmark,
    variant: Variant,
    model: FlashSlothAdapter | ConstantAnswers,
    weights: str,
    result: Result | None,
) -> dict[str, Any]:
    used = getattr(model, "settings", {})
    like = published_model(used.get("visual_tokens", 0), PUBLISHED_MODELS)
    row = {
        "suite": settings.suite,
        "benchmark": benchmark.title,
        "task": benchmark.task,
        "split": benchmark.split,
        "variant": variant.name,
        "control": variant.control,
        "published_model": like,
        "published": benchmark.published.get(like) if like else None,
        "published_all": dict(benchmark.published),
        "tolerance": benchmark.tolerance,
        "note": benchmark.note,
        "model": settings.model,
        "weights": weights,
        "dtype": used.get("dtype"),
        "quantization": used.get("quantization"),
        "limit": settings.limit,
        "commit": commit(),
        "harness": f"lmms-eval {version('lmms-eval')}",
        **(result.row if result is not None else {}),
    }
    row.setdefault("metric", " + ".join(benchmark.metrics))
    for name in ("score", "version", "data_revision", "visual_tokens", "seconds_a_sample", "samples", "prompt"):
        row.setdefault(name, None)
    return {**row, "verdict": verdict(row)}


def commit() -> str:
    """Of the source, where it is a clone; else the version of the package."""
    try:
        found = subprocess.run(GIT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return version("flashsloth")
    return found.stdout.strip()[:12]


def _write_results(
    folder: Path, settings: EvalSettings, weights: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    results = {
        "format": FORMAT,
        "model": settings.model,
        "weights": weights,
        "suite": settings.suite,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "rows": list(rows),
    }
    write_whole(folder / RESULTS_FILE, json.dumps(results, indent=1, default=str) + "\n")
    return results

"""One task through lmms-eval's own code, from requests to its metric, as a row of the report and its samples."""

from __future__ import annotations

import contextlib
import io
import math
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .adapter import FlashSlothAdapter
from .benchmarks import Benchmark
from .constant import ConstantAnswers
from .harness import BYPASS, cause_of, evaluate_task, revision_of
from .verdicts import DONE, FAILED, INCOMPLETE, NOT_JUDGED

CIRCULAR = 1_000_000  # MMBench numbers the same question with turned options by adding this to its index


@dataclass
class Result:
    """What came of one benchmark with one variant of the model; `row` holds plain values."""

    row: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)


def run_task(
    model: FlashSlothAdapter | ConstantAnswers,
    benchmark: Benchmark,
    task: Any,
    limit: int | None,
    judged: bool,
    folder: Path,
) -> Result | None:
    """Ask, score and collect; None on processes other than the first.

    Args:
        task: of `harness.load_task`.
        limit: questions, None for all.
        judged: whether a judge answers; without one a task that needs it keeps its predictions, without a score.
        folder: where lmms-eval puts files for submission.
    """
    name = task.config.task
    bypass = benchmark.judged and not judged
    if bypass:
        task.override_metric(BYPASS)
    model.task_dict[name] = task.dataset
    started = time.perf_counter()
    arguments = Namespace(process_with_media=False, output_path=str(folder), reasoning_tags=None)
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate_task(model, name, task, limit, arguments)
    if isinstance(model, FlashSlothAdapter):
        model.gather()
    if found is None:
        return None
    seconds = time.perf_counter() - started
    failures = getattr(model, "failures", {}).get(name, {})
    responses = getattr(model, "responses", {}).get(name, {})
    samples = [_sample(task, benchmark, each, failures, responses, bypass) for each in found["samples"][name]]
    samples.sort(key=lambda each: each["id"])
    asked = [responses[each["id"]] for each in samples if each["id"] in responses]
    row = {
        "samples": len(samples),
        "unreadable": len(failures),
        "version": found["versions"].get(name),
        "data_revision": revision_of(task),
        "prompt": samples[0]["question"] if samples else "",
        "visual_tokens": _mean([response.visual_tokens for response in asked]),
        "seconds_a_sample": _mean([response.seconds for response in asked]),
        "harness_seconds": max(0.0, seconds - model.seconds),
        "details": {} if bypass else _numbers(found["results"][name]) | _by_kind(samples),
        "metric": " + ".join(benchmark.metrics) or next(iter(_numbers(found["results"][name])), ""),
    }
    if bypass:
        return Result({**row, "status": NOT_JUDGED, "reason": "no judge: give --judge-url"}, samples)
    row["score"] = _score(benchmark, found["results"][name])
    unjudged = sum(each["judge_failed"] for each in samples)
    if unjudged:
        reason = f"the judge gave no answer for {unjudged} of {len(samples)} samples"
        return Result({**row, "score": None, "status": NOT_JUDGED, "reason": reason}, samples)
    if row["score"] is None:
        return Result({**row, "status": FAILED, "reason": f"lmms-eval gave no {row['metric']}"}, samples)
    if failures:
        reason = f"{len(failures)} of {len(samples)} samples could not be asked: {next(iter(failures.values()))}"
        return Result({**row, "status": INCOMPLETE, "reason": reason}, samples)
    return Result({**row, "status": DONE, "reason": ""}, samples)


def failed(error: BaseException) -> Result:
    """A row that says in one line why there is no score."""
    return Result({"status": FAILED, "reason": cause_of(error), "score": None})


def _score(benchmark: Benchmark, results: Mapping[str, Any]) -> float | None:
    numbers = _numbers(results)
    wanted = benchmark.metrics or tuple(numbers)[:1]
    parts = [numbers.get(metric) for metric in wanted]
    if benchmark.judged and parts == [None] and results:
        return 0.0  # MathVista's code gives nothing where no answer is right
    if not parts or any(part is None for part in parts):
        return None
    return float(sum(part for part in parts if part is not None)) * benchmark.scale


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Scores without the names of filters, and without standard errors."""
    return {
        key.split(",")[0]: float(value)
        for key, value in results.items()
        if "," in key and "_stderr" not in key and isinstance(value, (int, float)) and not math.isnan(value)
    }


def _by_kind(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each kind of question, in percent, where the set names kinds."""
    kinds: dict[str, list[float]] = {}
    for each in samples:
        if each["kind"] is not None and each["score"] is not None:
            kinds.setdefault(str(each["kind"]), []).append(each["score"])
    return {kind: 100 * sum(scores) / len(scores) for kind, scores in sorted(kinds.items())}


def _sample(
    task: Any,
    benchmark: Benchmark,
    logged: Mapping[str, Any],
    failures: Mapping[Any, str],
    responses: Mapping[Any, Any],
    bypass: bool,
) -> dict[str, Any]:
    doc, number = logged["doc"], logged["doc_id"]
    metric = benchmark.sample_metric if benchmark.metrics else next(iter(task.aggregation()), "")
    values = [logged[name] for name in dict.fromkeys((metric, *benchmark.metrics)) if name in logged]
    value = values[0] if values else None
    response = responses.get(number)
    return {
        "id": number,
        "question": task.doc_to_text(doc),
        "prediction": _first(logged["filtered_resps"]),
        "gold": logged["target"],
        "score": None if bypass or value is None else sample_score(task, benchmark, metric, value),
        "kind": next((doc[name] for name in ("kind", "category", "data_type", "type") if name in doc), None),
        "held_out": doc.get("held_out"),
        "visual_tokens": getattr(response, "visual_tokens", 0),
        "error": failures.get(number),
        "shown": False,
        "thumbnail": None,
        "judge_failed": not bypass and benchmark.judged and _judge_failed(value, _first(logged["filtered_resps"])),
    }


def _first(values: Any) -> Any:
    while isinstance(values, list) and values:
        values = values[0]
    return values


def _judge_failed(value: Any, prediction: Any) -> bool:
    """Whether a sample that a judge must score has none: their code then counts it as wrong."""
    if not isinstance(value, Mapping):
        return False
    if "eval_model" in value:
        return not value["eval_model"]
    return value.get("extraction") == "" and bool(prediction)


def sample_score(task: Any, benchmark: Benchmark, metric: str, value: Any) -> float | None:
    """The score of one sample, 0 to 1, as the task's metric has it."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Mapping):
        return None
    for name in ("score", "true_false"):
        if name in value:
            return float(value[name])
    aggregate = task.aggregation()[metric]
    item = {**value, "index": value["index"] % CIRCULAR} if "index" in value else value
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            found = aggregate([item], args=None) if _takes_arguments(aggregate) else aggregate([item])
        except (ValueError, KeyError, ZeroDivisionError, AssertionError):  # a metric that needs several samples
            return None
    return None if found is None else float(found) * benchmark.scale / 100


def _takes_arguments(function: Any) -> bool:
    return "args" in function.__code__.co_varnames[: function.__code__.co_argcount]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def frequent_answers(task: Any) -> list[str]:
    """For each question the answer that is most frequent in its set, or in training where the task knows that."""
    if hasattr(task, "frequent_answers"):
        return task.frequent_answers()
    golds = [_listed(task.doc_to_target(doc)) for doc in task.eval_docs_no_media]
    counts = Counter(answer for gold in golds for answer in gold)
    return [counts.most_common(1)[0][0]] * len(golds)


def _listed(gold: Any) -> list[str]:
    return [str(each) for each in gold] if isinstance(gold, (list, tuple)) else [str(gold)]

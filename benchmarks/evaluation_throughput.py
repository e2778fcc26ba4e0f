"""Questions a second through lmms-eval's plugin, beside a loop that asks one at a time; see `--help`."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import machine
from transformers.utils import logging as transformers_logging

from flashsloth.evaluate.adapter import FlashSlothAdapter
from flashsloth.evaluate.benchmarks import BENCHMARKS
from flashsloth.evaluate.harness import evaluate_task, load_task, quieten, task_index
from flashsloth.inference import load

TASK = "flashsloth_scenes"
NEW_TOKENS = 16


def main(
    model: Annotated[str, typer.Option(help="Packaged model or folder.")] = "nano",
    images: Annotated[int, typer.Option(help="Images of the mixture, a quarter of which are scenes.", min=8)] = 240,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    runs: Annotated[int, typer.Option(help="Repetitions, taken in turns; the median counts.", min=1)] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """The same questions, one by one with `generate` and through the harness, in turns in one process."""
    transformers_logging.disable_progress_bar()
    quieten()
    benchmark = BENCHMARKS[TASK]
    session = load(model)
    found: dict[str, list[float]] = {"loop": [], "plugin": [], "harness": []}
    questions = 0
    for _ in range(runs):
        task = load_task(task_index([benchmark]), benchmark, None, {"images": images})
        docs = list(task.dataset["test"])
        questions = len(docs)
        session.ask(docs[0]["image"], docs[0]["question"], max_new_tokens=NEW_TOKENS)
        started = time.perf_counter()
        loop = [session.ask(doc["image"], doc["question"], max_new_tokens=NEW_TOKENS).text for doc in docs]
        found["loop"].append(time.perf_counter() - started)

        adapter = FlashSlothAdapter(session=session, batch_size=batch_size)
        adapter.task_dict[TASK] = task.dataset
        started = time.perf_counter()
        results = evaluate_task(adapter, TASK, task, None, harness_arguments())
        found["plugin"].append(time.perf_counter() - started)
        found["harness"].append(found["plugin"][-1] - adapter.seconds)
        given = [sample["filtered_resps"][0] for sample in results["samples"][TASK]]
        assert given == loop, "the plugin answers otherwise than the loop"
    rates = {name: questions / statistics.median(seconds) for name, seconds in found.items() if name != "harness"}
    report: dict[str, Any] = {
        "machine": machine(), "model": model, "questions": questions, "batch_size": batch_size, "runs": runs,
        "questions_per_second": rates, "times_as_fast": rates["plugin"] / rates["loop"],
        "harness_share": statistics.median(found["harness"]) / statistics.median(found["plugin"]),
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def harness_arguments() -> Any:
    """What lmms-eval reads of its own command line."""
    from argparse import Namespace

    return Namespace(process_with_media=False, output_path=None, reasoning_tags=None)


if __name__ == "__main__":
    typer.run(main)

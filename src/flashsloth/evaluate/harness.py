"""Tasks of lmms-eval with the data of a folder, or of the hub."""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import ImageFile

from .benchmarks import BENCHMARKS, Benchmark
from .manifest import MODEL_NAME

try:
    from lmms_eval import evaluator, tasks
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config
    from loguru import logger as harness_log
    from tenacity import RetryError
    from tqdm import tqdm
except ImportError as error:
    from .harness_hint import HINT

    raise ImportError(HINT) from error

# lmms-eval lets Pillow fill in what is missing of damaged images, for the whole process
ImageFile.LOAD_TRUNCATED_IMAGES = False

SEED = 0
FOR_SUBMISSION = "submission"  # metrics that only write files for a server
BYPASS = "bypass"  # lmms-eval's metric of tasks that are answered, not scored
TASK_FOLDER = Path(__file__).parent / "tasks"


def quieten() -> None:
    """Keep lmms-eval's own log and bars for itself."""
    harness_log.disable("lmms_eval")
    harness_log.remove()

    def without_bar(*args: Any, **options: Any) -> Any:
        return tqdm(*args, **{**options, "disable": True})

    evaluator.tqdm = without_bar


def task_index(rows: Sequence[Benchmark]) -> TaskManager:
    """The tasks of lmms-eval and of this project, by name; all of them, which takes a while, for others' names."""
    if not all(row.task in BENCHMARKS for row in rows):
        return TaskManager(include_path=str(TASK_FOLDER), model_name=MODEL_NAME)
    theirs = Path(tasks.__file__).parent
    folders = {str(theirs / row.task.split("_")[0]) for row in rows if row.dataset is not None}
    return TaskManager(include_path=[*sorted(folders), str(TASK_FOLDER)], include_defaults=False)


def load_task(index: TaskManager, row: Benchmark, data: Path | None, own: Mapping[str, Any]) -> Any:
    """A task with its data.

    Args:
        index: of all tasks.
        data: folder with a folder `row.folder` as `datasets` saves it; None takes the hub.
        own: `metadata` of the sets that this project draws.

    Raises:
        ValueError: an unknown name, a missing or damaged folder, a set that the hub does not give.
    """
    if index.task_index.get(row.task, {}).get("type") not in ("task", "python_task"):
        near = difflib.get_close_matches(row.task, index.all_subtasks, 3)
        raise ValueError(f"unknown task {row.task!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    config = {**load_yaml_config(index.task_index[row.task]["yaml_path"], mode="full"), **row.overrides}
    scored = [each for each in config.get("metric_list", ()) if each["metric"] != FOR_SUBMISSION]
    config["metric_list"] = scored or None
    if "class" in config:
        config["metadata"] = {**config.get("metadata", {}), **own}
        return _made(row, config["class"], config)
    if data is not None:
        folder = data / row.folder
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; `flashsloth eval fetch {data} --tasks {row.task}` makes it")
        config |= {"dataset_path": str(folder), "dataset_name": None, "dataset_kwargs": {"load_from_disk": True}}
    with _second_set(config.get("process_docs"), row, data):
        return _made(row, ConfigurableMessagesTask, config, model_name=MODEL_NAME)


def evaluate_task(model: Any, name: str, task: Any, limit: int | None, arguments: Any) -> dict[str, Any] | None:
    """What lmms-eval's `evaluate` returns for one task; None on processes other than the first."""
    random.seed(SEED)  # MMMU's own rule guesses where an answer names no option
    return evaluator.evaluate(
        model,
        {name: task},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        cli_args=arguments,
        process_docs_parallel=1,  # threads would change the order of such guesses
    )


def cause_of(error: BaseException) -> str:
    """One line; retries are looked through."""
    while isinstance(error, RetryError):
        error = error.last_attempt.exception() or error.__cause__ or ValueError("retries failed")
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"


def _made(row: Benchmark, kind: Any, config: dict[str, Any], **options: Any) -> Any:
    try:
        return kind(config=config, **options)
    except RetryError as error:
        raise ValueError(f"the data of {row.task} cannot be loaded: {cause_of(error)}") from error


@contextmanager
def _second_set(process: Any, row: Benchmark, data: Path | None) -> Iterator[None]:
    """Inside, a task that loads a second set by itself finds it in the folder."""
    if data is None or process is None or not row.also:
        yield
        return
    import datasets

    names = process.__globals__
    original = names["load_dataset"]

    def from_disk(path: str, name: str | None = None, split: str | None = None, **_: Any) -> Any:
        folder = data / f"{row.folder}-{name}"
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; `flashsloth eval fetch {data} --tasks {row.task}` makes it")
        return datasets.load_from_disk(str(folder))[split]

    names["load_dataset"] = from_disk
    try:
        yield
    finally:
        names["load_dataset"] = original


def revision_of(task: Any) -> str:
    """Identifies the data that a task asks about: changes where a set does."""
    docs = task.eval_docs_no_media
    fingerprint = getattr(docs, "_fingerprint", None)
    if fingerprint is None:
        fingerprint = hashlib.sha256(repr(list(docs)).encode()).hexdigest()
    return fingerprint[:12]


def fetch(row: Benchmark, folder: Path) -> Path:
    """Load the data of a benchmark from the hub and save it as `load_task` wants it; done before is done.

    Raises:
        ValueError: a set that is drawn, or that the hub does not give.
    """
    import datasets

    if row.dataset is None:
        raise ValueError(f"{row.title} is drawn anew at every run; there is nothing to fetch")
    name, configuration = row.dataset
    target = folder / row.folder
    for part, where in [(configuration, target), *((each, folder / f"{row.folder}-{each}") for each in row.also)]:
        if where.exists():
            continue
        staging = where.with_name(f"incomplete-{where.name}")
        try:
            data = datasets.load_dataset(name, part, split={row.split: row.split})
        except Exception as error:  # of the hub, the network, the reader: all say why
            raise ValueError(f"{row.title}: {name} cannot be loaded: {' '.join(str(error).split())}") from error
        datasets.DatasetDict(data).save_to_disk(str(staging))
        staging.rename(where)
    return target


def describe(row: Benchmark) -> dict[str, Any]:
    """A benchmark as plain values."""
    return {name: value for name, value in asdict(row).items() if name != "overrides"}

"""Ask all records of an input and write the answers, on this machine or on a Ray cluster."""

import contextlib
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..checkpoints.fingerprint import fingerprint
from ..inference import DEFAULT_MAX_NEW_TOKENS, AnswerForm, FlashSloth, compile_form, load, select_device
from ..inference.batches import BatchPreparation, PreparedBatch, Record, answer, plan_batches, prepare
from ..kernels.packed_layers import keep_freed_memory
from .output import AnswerFile
from .records import input_of, local_path

logger = logging.getLogger(__name__)

STREAMS_OF_A_CPU = 2
RAY_HINT = "a cluster needs Ray: pip install 'flashsloth[ray]'"
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class RunSettings:
    """How to ask.

    Attributes:
        model: packaged model, folder or hub id.
        device, dtype: as in `flashsloth.inference.load`.
        batch_size: records asked at once.
        workers: processes that decode and resize images ahead of the model; 0 does it in between. None is 0 on a CPU
            with no more threads than streams, else 1.
        streams: batches answered side by side, each by its share of torch's threads; None is 2 on a CPU with several
            threads where nothing is compiled, else 1.
        max_new_tokens: longest answer; default that of the model.
        visual_tokens: of every image; default the model's own.
        retry_errors: ask again what failed in an earlier run.
        retry_changed: ask again records whose question or image is another one than when they were answered.
        quantization, compile, share_equal_views: as in `flashsloth.inference.load`.
        schema, choices, regex, confidence: form of every answer, as in `flashsloth.inference.AnswerForm`; an answer
            that is cut before it is complete is an error of its record.
        ray_workers: model copies on the Ray cluster (`RAY_ADDRESS`, else one started here); 0 does without Ray.

    Raises:
        ValueError: streams together with ray_workers; a form that `AnswerForm` refuses.
    """

    model: str = "nano"
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 32
    workers: int | None = None
    streams: int | None = None
    max_new_tokens: int | None = None
    visual_tokens: int | None = None
    retry_errors: bool = False
    retry_changed: bool = False
    ray_workers: int = 0
    quantization: str | None = None
    compile: bool = False
    share_equal_views: bool = False
    schema: Mapping[str, Any] | None = None
    choices: Sequence[str] | None = None
    regex: str | None = None
    confidence: bool = False

    def __post_init__(self) -> None:
        if self.ray_workers and self.streams not in (None, 1):
            raise ValueError(
                f"streams {self.streams} contradicts ray_workers {self.ray_workers}: on Ray every copy of the model "
                "answers one batch at a time; leave streams out, or ask for more copies"
            )
        AnswerForm(self.schema, self.choices, self.regex, self.confidence)

    @property
    def form(self) -> AnswerForm:
        """What every answer must look like."""
        return AnswerForm(self.schema, self.choices, self.regex, self.confidence)

    def load(self) -> FlashSloth:
        """The model, as these settings say. On a CPU the process then keeps the memory that it frees."""
        session = load(
            self.model,
            self.device,
            self.dtype,
            quantization=self.quantization,
            compile=self.compile,
            share_equal_views=self.share_equal_views,
        )
        if session.device.type == "cpu":
            keep_freed_memory()  # now that weights in another layout are gone
        return session


@dataclass(frozen=True)
class RunSummary:
    """What a run did: records answered and failed in it, skipped as done before, and its seconds without loading."""

    answered: int
    failed: int
    skipped: int
    seconds: float


def run_records(
    records: Sequence[Record],
    output: Path,
    settings: RunSettings,
    progress: Callable[[int, int], None] | None = None,
) -> RunSummary:
    """Ask every record that `output` does not answer yet.

    Args:
        output: JSONL file with `id`, `question` and `answer`, or `id` and `error`, a line a record, in the order they
            were finished; `input` identifies question and images. Killed at any time, the next call goes on where
            this one was.
        progress: called with (records finished, all of them).

    Raises:
        ValueError: an output begun with other settings or weights, one that answers another question or image under
            the id of a record, or one that another run is writing; a bad model, device or dtype.
        OSError: the disk is full; what was written stays and the run can be continued.
        KeyboardInterrupt: interrupted; says how to go on. What was written stays.
    """
    decisive = {
        "model": settings.model,
        "weights": fingerprint(settings.model),
        "dtype": _number_format(settings),
        "max_new_tokens": settings.max_new_tokens,
        "quantization": settings.quantization,
        "visual_tokens": settings.visual_tokens,
        **settings.form.to_dict(),
    }
    with AnswerFile(output, decisive) as answers:
        _forget_what_is_asked_again(answers, records, settings)
        pending = [record for record in records if record.id not in answers.done]
        asked = {record.id: record for record in pending}
        skipped, failed_before = len(records) - len(pending), len(answers.errors)
        finished = skipped
        started = time.perf_counter()
        try:
            if pending:
                batches = (_ray_lines if settings.ray_workers else _local_lines)(pending, settings)
                next(batches)  # the model is loaded
                started = time.perf_counter()
                for lines in batches:
                    answers.add([{**line, "input": input_of(asked[line["id"]])} for line in lines])
                    finished += len(lines)
                    if progress is not None:
                        progress(finished, len(records))
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"{finished} of {len(records)} records are done; the same command goes on with the others"
            ) from error
        failed = len(answers.errors) - failed_before
        return RunSummary(len(pending) - failed, failed, skipped, time.perf_counter() - started)


def _number_format(settings: RunSettings) -> str:
    """The dtype; what "auto" is on this machine's CPU, since the same file may be gone on with on another device."""
    known_here = not settings.ray_workers or settings.device != "auto"
    on_cpu = settings.dtype == "auto" and known_here and select_device(settings.device).type == "cpu"
    return "float32" if on_cpu else settings.dtype


def _forget_what_is_asked_again(answers: AnswerFile, records: Sequence[Record], settings: RunSettings) -> None:
    again = set(answers.errors) if settings.retry_errors else set()
    before = [record for record in records if record.id in answers.done]
    if others := len(answers.done) - len(before):
        logger.warning("%d of the records in %s are not in the input; they stay", others, answers.path)
    changed = {record.id for record in before if answers.done[record.id] != input_of(record)}
    answered = sorted(changed - answers.errors.keys())
    if answered and not settings.retry_changed:
        raise ValueError(
            f"{answers.path} answers another question or image under the id {answered[0]!r:.200}"
            f"{f' and {len(answered) - 1} more' if len(answered) > 1 else ''} (another folder, other rows, or a file "
            "that was changed since); give another output file, or --retry-changed to ask these anew"
        )
    if again | changed:
        answers.forget(again | changed)


def _limits(session: FlashSloth, settings: RunSettings) -> tuple[int, int]:
    """(longest prompt, longest answer) in tokens."""
    default = session.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    new_tokens = settings.max_new_tokens or default
    return session.config.text_config.max_position_embeddings - new_tokens, new_tokens


def _local_lines(records: Sequence[Record], settings: RunSettings) -> Iterator[Lines]:
    """An empty list when the model is loaded, then the lines of each batch."""
    session = settings.load()
    longest_prompt, new_tokens = _limits(session, settings)
    session.image_tokens(1, settings.visual_tokens)
    if not settings.form.is_free:
        compile_form(settings.form, session.processor, session.model.generation_config)  # refused before a record is
    batches = plan_batches(records, settings.batch_size)
    on_cpu, threads = session.device.type == "cpu", torch.get_num_threads()
    streams, workers = settings.streams, settings.workers
    if streams is None:
        streams = STREAMS_OF_A_CPU if on_cpu and threads > 1 and not settings.compile else 1
    if workers is None:
        workers = 0 if on_cpu and streams >= threads else 1
    loader = DataLoader(
        BatchPreparation(records, batches, session.processor, longest_prompt, settings.visual_tokens),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn" if workers and session.device.type == "cuda" else None,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_leave_interrupts_to_the_parent if workers else None,
    )
    yield []
    with _threads_of_a_stream(streams, workers if on_cpu else 0):
        if streams == 1:
            for batch in loader:
                yield answer(session, batch, new_tokens, settings.form)
        else:
            yield from _side_by_side(
                session, loader, streams, lambda batch: answer(session, batch, new_tokens, settings.form)
            )


@contextlib.contextmanager
def _threads_of_a_stream(streams: int, workers: int) -> Iterator[None]:
    """Torch's threads shared among the streams, less those whose cores the workers take.

    Threads of one layer wait for each other without giving up their cores: where a worker has taken the core of one,
    all of them stand still for as long as the system lets it run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads // streams, math.ceil((threads - workers) / streams))))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _side_by_side(
    session: FlashSloth, batches: Iterable[PreparedBatch], streams: int, ask: Callable[[PreparedBatch], Lines]
) -> Iterator[Lines]:
    """Lines of each batch as it is finished, `streams` at a time.

    One batch leaves cores idle, since much of its work is too small to be split over them.
    """
    stopped = threading.Event()

    def stop(*_: Any) -> None:
        if stopped.is_set():
            raise InterruptedError("the run was stopped")

    # an interrupt reaches the main thread only; without this, it would wait for long answers that nobody reads
    hook = session.model.register_forward_pre_hook(stop) if session.compile_config is None else None
    pool = ThreadPoolExecutor(streams)
    try:
        asked: set[Future[Lines]] = set()
        for batch in batches:
            asked.add(pool.submit(ask, batch))
            if len(asked) > streams:  # one waits its turn, so that no stream waits for the data
                done, asked = wait(asked, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(asked))
    except BaseException:
        # the hook stays: an interrupt in the middle of `submit` leaves a thread of which the pool does not know
        stopped.set()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
    if hook is not None:
        hook.remove()


class RayWorker:
    """A copy of the model on the cluster; called by Ray Data with a column of records."""

    def __init__(self, settings: RunSettings) -> None:
        self.session = settings.load()
        self.visual_tokens, self.form = settings.visual_tokens, settings.form
        self.longest_prompt, self.new_tokens = _limits(self.session, settings)

    def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
        batch = prepare(list(columns["record"]), self.session.processor, self.longest_prompt, self.visual_tokens)
        # as text: Arrow would give all rows of a block the same fields
        return {"line": [json.dumps(row) for row in answer(self.session, batch, self.new_tokens, self.form)]}


def _ray_lines(records: Sequence[Record], settings: RunSettings) -> Iterator[Lines]:
    try:
        import ray
    except ImportError as error:
        raise ImportError(RAY_HINT) from error
    order = [index for batch in plan_batches(records, settings.batch_size) for index in batch]
    # images go by value, since a path of this machine means nothing on another
    items = [{"record": _with_bytes(records[index])} for index in order]
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    on_gpu = settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    data = ray.data.from_items(items).map_batches(
        RayWorker,
        fn_constructor_args=(settings,),
        batch_size=settings.batch_size,
        compute=ray.data.ActorPoolStrategy(size=settings.ray_workers),
        num_gpus=1 if on_gpu else 0,
        zero_copy_batch=False,
    )
    yield []
    for rows in data.iter_batches(batch_size=settings.batch_size):
        yield [json.loads(line) for line in rows["line"]]


def _with_bytes(record: Record) -> Record:
    return Record(record.id, tuple(map(_content, record.images)), record.question)


def _content(image: Any) -> Any:
    """The bytes of a file of this machine; addresses, and what cannot be read, go along as they are."""
    path = local_path(image)
    if path is None:
        return image
    try:
        return Path(path).read_bytes() if Path(path).is_file() else image
    except (OSError, ValueError):  # the copy of the model says what is wrong with it
        return image

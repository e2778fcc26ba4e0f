"""The model as lmms-eval wants it: requests in, answers out, in the batches of `flashsloth run`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ImageFile

from ..checkpoints.fingerprint import fingerprint
from ..inference import FlashSloth, load
from ..inference.batches import Record, answer, plan_batches, prepare
from ..model.image_decoding import shorten
from .ablations import replaced_compressor, zeroed_embedded_query
from .response_cache import Response, ResponseCache

try:
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
except ImportError as error:
    from .harness_hint import HINT

    raise ImportError(HINT) from error

# lmms-eval lets Pillow fill in what is missing of damaged images, for the whole process
ImageFile.LOAD_TRUNCATED_IMAGES = False

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 128
# asked together, neighbours in length in one batch; more would hold more pictures in memory
WAITING_BATCHES = 4
FALSE_WORDS = ("false", "0", "no", "none", "")
# how a task may ask for what is done anyway: greedy answers
GREEDY = {"do_sample": (False, None), "num_beams": (1, None)}


@dataclass(frozen=True)
class _Asked:
    """A request that has been read."""

    record: Record
    new_tokens: int
    stops: tuple[str, ...]
    key: str


class FlashSlothAdapter(lmms):
    """What `lmms-eval --model flashsloth` runs. Greedy; images stand before the text.

    Args:
        pretrained: packaged model, folder or hub id.
        device: as in `flashsloth.inference.load`, as the next three; "none" is none.
        dtype: see there.
        quantization: see there.
        kernels: see there.
        batch_size: requests asked at once; neighbours in length share a batch.
        visual_tokens: of every image; default the model's own.
        max_new_tokens: longest answer of tasks that say nothing.
        compressor: another compressor in place of the trained one.
        zero_embedded_query: the embedded query module adds nothing.
        control: "text-only" asks without images, "shuffled-image" with those of another record of the task.
        cache: folder of responses; a run with the same model, options and data goes on where one was killed.
        session: a loaded model instead of `pretrained` and its options.
        progress: called with (requests done, requests) of one task.

    Raises:
        ValueError: an unknown control, and what `load` refuses.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "nano",
        device: str | None = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        kernels: str = "auto",
        batch_size: int | str | None = 32,
        visual_tokens: int | str | None = None,
        max_new_tokens: int | str = DEFAULT_NEW_TOKENS,
        compressor: str | None = None,
        zero_embedded_query: bool | str = False,
        control: str | None = None,
        cache: str | Path | None = None,
        session: FlashSloth | None = None,
        progress: Callable[[int, int], None] | None = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            logger.warning("max_batch_size is ignored: batches have batch_size records")
        quantization, compressor, control = (_given(each) for each in (quantization, compressor, control))
        if control not in (None, *CONTROLS):
            raise ValueError(f"unknown control {control!r}; known are {', '.join(CONTROLS)}")
        self.accelerator = Accelerator(cpu=_on_cpu(device))
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        target = (
            str(self.accelerator.device) if device in (None, "auto") and self._world_size > 1 else device or "auto"
        )
        self.session = session or load(pretrained, target, dtype, quantization, kernels=kernels)
        self.batch_size, self.max_new_tokens = int(batch_size or 32), int(max_new_tokens)
        self.visual_tokens = None if _given(visual_tokens) is None else int(str(visual_tokens))
        self.session.image_tokens(1, self.visual_tokens)
        self.control, self.progress = control, progress
        self._stack = ExitStack()
        if compressor is not None:
            self._stack.enter_context(replaced_compressor(self.session.model, compressor))
        zeroed = str(zero_embedded_query).lower() not in FALSE_WORDS
        if zeroed:
            self._stack.enter_context(zeroed_embedded_query(self.session.model))
        self.settings = {
            "weights": fingerprint(pretrained) if session is None else session.name,
            "dtype": str(self.session.model.dtype).removeprefix("torch."),
            "quantization": quantization,
            "compressor": compressor,
            "zero_embedded_query": zeroed,
            "visual_tokens": self.visual_tokens or self.session.config.num_image_tokens,
        }
        self.cache = ResponseCache(None if cache is None else Path(cache), self.settings, self._rank)
        self.failures: dict[str, dict[Any, str]] = {}
        self.responses: dict[str, dict[Any, Response]] = {}
        self._warned: set[str] = set()
        self.seconds = 0.0  # with reading, preparing and answering; the rest of a run is the harness's

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval counts requests on it."""
        return self.session.device

    def gather(self) -> None:
        """Bring what all processes noted together, in each of them."""
        if self._world_size > 1:
            for noted in (self.failures, self.responses):
                for each in gather_object([{task: dict(found) for task, found in noted.items()}]):
                    for task, found in each.items():
                        noted.setdefault(task, {}).update(found)

    def close(self) -> None:
        """Undo ablations of a session that is used on."""
        self._stack.close()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Greedy answers, cut before the first of a task's stop texts.

        A record whose images cannot be read is answered with nothing, and noted in `failures`: a report must say so.
        """
        started = time.perf_counter()
        answers: dict[int, str] = {}
        waiting: list[tuple[int, _Asked]] = []
        for number, request in enumerate(requests):
            asked = self._read(request)
            if asked is None:
                answers[number] = ""
                continue
            known = self.cache.get(asked.key)
            if known is None:
                waiting.append((number, asked))
            else:
                answers[number] = self._note(request, asked, known)
            if len(waiting) >= self.batch_size * WAITING_BATCHES:
                self._answer(requests, waiting, answers)
        self._answer(requests, waiting, answers)
        self.seconds = time.perf_counter() - started
        return [GenerationResult(answers[number], TokenCounts()) for number in range(len(requests))]

    def _answer(self, requests: Sequence[Instance], waiting: list, answers: dict[int, str]) -> None:
        """Ask what is waiting, and empty it."""
        for new_tokens in sorted({asked.new_tokens for _, asked in waiting}):
            group = [(number, asked) for number, asked in waiting if asked.new_tokens == new_tokens]
            for batch in plan_batches([asked.record for _, asked in group], self.batch_size):
                rows = [group[index] for index in batch]
                found = []
                for (number, asked), response in zip(rows, self._ask(rows, new_tokens), strict=True):
                    if isinstance(response, Response):
                        found.append((asked.key, response))
                        answers[number] = self._note(requests[number], asked, response)
                    else:
                        answers[number] = self._fail(requests[number], response)
                self.cache.add(found)
                if self.progress is not None:
                    self.progress(len(answers), len(requests))
        waiting.clear()

    def _ask(self, rows: Sequence[tuple[int, _Asked]], new_tokens: int) -> Iterator[Response | str]:
        """A response of each row, or what is wrong with it."""
        started = time.perf_counter()
        records = [Record(str(row), asked.record.images, asked.record.question) for row, (_, asked) in enumerate(rows)]
        limit = self.session.config.text_config.max_position_embeddings - new_tokens
        prepared = prepare(records, self.session.processor, limit, self.visual_tokens)
        lines = {line["id"]: line for line in answer(self.session, prepared, new_tokens)}
        seconds = (time.perf_counter() - started) / len(rows)
        for record in records:
            line = lines[record.id]
            tokens = len(record.images) * (self.visual_tokens or self.session.config.num_image_tokens)
            yield line["error"] if "error" in line else Response(line["answer"], tokens, seconds)

    def _note(self, request: Instance, asked: _Asked, response: Response) -> str:
        self.responses.setdefault(request.task_name, {})[request.doc_id] = response
        return min((response.text.split(stop)[0] for stop in asked.stops), key=len, default=response.text)

    def _fail(self, request: Instance, message: str) -> str:
        self.failures.setdefault(request.task_name, {})[request.doc_id] = message
        return ""

    def _read(self, request: Instance) -> _Asked | None:
        _, doc_to_messages, options, doc_id, task, split = request.args
        try:
            docs = self.task_dict[task][split]
            images, question = read_messages(doc_to_messages(docs[doc_id]))
            if self.control == "text-only":
                images = []
            elif self.control == "shuffled-image":
                images = self._images_of_another(doc_to_messages, docs, doc_id, images)
            new_tokens, stops = self._limits(options, task)
            record = Record("", tuple(images), question)
            return _Asked(record, new_tokens, stops, self.cache.key(record, {"max_new_tokens": new_tokens}))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken files
            self._fail(request, shorten(" ".join(str(error).split()), 300))
            return None

    def _images_of_another(self, doc_to_messages: Callable, docs: Any, doc_id: int, own: Sequence[Any]) -> list[Any]:
        """The images of a record half the set away, or of the first after it that shows something else."""
        shown = [_bytes_of(image) for image in own]
        for step in range(1, len(docs)):
            other, _ = read_messages(doc_to_messages(docs[(doc_id + len(docs) // 2 + step - 1) % len(docs)]))
            if other and [_bytes_of(image) for image in other] != shown:
                return list(other)
        raise ValueError("all records of the task show the same image; there is none to shuffle in")

    def _warn(self, text: str) -> None:
        """Once, however many requests say the same."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    def _limits(self, options: dict[str, Any], task: str) -> tuple[int, tuple[str, ...]]:
        for name, harmless in GREEDY.items():
            if options.get(name) not in harmless:
                self._warn(f"{task} asks for {name}={options[name]!r}; answers are greedy")
        stops = options.get("until") or ()
        wanted = int(options.get("max_new_tokens") or self.max_new_tokens)
        longest = self.session.config.text_config.max_position_embeddings // 2
        if wanted > longest:
            self._warn(
                f"{task} asks for {wanted} new tokens; answers end after {longest}, half of the model's context"
            )
        return min(wanted, longest), (stops,) if isinstance(stops, str) else tuple(stops)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: no task of the suites scores by likelihood."""
        raise NotImplementedError("flashsloth answers in text; use a task of the type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: no task of the suites has several rounds."""
        raise NotImplementedError("flashsloth answers one round; use a task of the type generate_until")


CONTROLS = ("text-only", "shuffled-image")


def read_messages(messages: Sequence[dict[str, Any]]) -> tuple[list[Any], str]:
    """Images and text of a question; images move to its start, where the model was taught to expect them.

    Raises:
        ValueError: other roles than one user turn, sound or video.
    """
    if [message["role"] for message in messages] != ["user"]:
        raise ValueError("a question must be one turn of the user; system prompts and examples are not supported")
    content = messages[0]["content"]
    if isinstance(content, str):
        return [], content
    others = {part["type"] for part in content} - {"image", "text"}
    if others:
        raise ValueError(f"a question holds {', '.join(sorted(others))}; the model takes images and text")
    images = [part["url"] for part in content if part["type"] == "image"]
    return images, "\n".join(part["text"] for part in content if part["type"] == "text")


def _bytes_of(image: Any) -> Any:
    return image.tobytes() if hasattr(image, "tobytes") else image


def _given(value: Any) -> Any:
    return None if value is None or str(value).lower() == "none" else value


def _on_cpu(device: str | None) -> bool:
    return device is not None and device.startswith("cpu")

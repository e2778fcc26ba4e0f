"""Turns about a list of images: one encoding, one cache, and the time of every stage.

Shape suffixes: B rows, I images, V views, C channels, H W pixels, P un-pooled patches, N visual tokens, T tokens,
E width of the encoder, D width of the language model.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BatchFeature,
    Cache,
    DynamicCache,
    StaticCache,
    StoppingCriteria,
    TextStreamer,
)

from ..kernels.compilation import enlarge, keep_first, room_for, static_cache
from ..model.backbones import CACHE_ARGUMENT
from ..model.compressors import ImageFeatures
from .answer import Answer, Timings
from .guide import Guide
from .runtime import Runtime
from .structured import FORM_FIELDS, AnswerForm

DEFAULT_MAX_NEW_TOKENS = 128
# the first comes with the prompt, the second compiles, CUDA graphs are recorded with those after it
WARM_UP_TOKENS = 4
# what a turn gives to `generate` itself
OWN_ARGUMENTS = {
    "inputs",
    "input_ids",
    "image_features",
    "streamer",
    "past_key_values",
    "cache",
    "return_dict_in_generate",
}


class _Clock(StoppingCriteria):
    """Notes when the first new token is there; stops generation when asked to, or after `most_tokens`."""

    def __init__(self, synchronize: Callable[[], None], most_tokens: int | None = None) -> None:
        self.synchronize = synchronize
        self.most_tokens = most_tokens
        self.tokens = 0
        self.first_token: float | None = None
        self.stopped = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.first_token is None:
            self.synchronize()
            self.first_token = time.perf_counter()
        self.tokens += 1
        if self.tokens == self.most_tokens:
            self.stopped.set()
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), dtype=torch.bool, device=input_ids.device)


class _Queue:
    """Turns of one conversation, one after the other in the order in which they were asked, from whatever thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: collections.deque[object] = collections.deque()
        self._running: int | None = None  # thread of the turn at the head

    def join(self) -> object:
        """A place at the end; it must be entered by the thread that runs the turn."""
        with self._condition:
            if self._running == threading.get_ident():
                raise ValueError(
                    "a conversation cannot be asked from within one of its own answers; ask when it is done"
                )
            place = object()
            self._waiting.append(place)
            return place

    @contextlib.contextmanager
    def turn(self, place: object | None = None) -> Iterator[None]:
        """Waits for its turn and holds it."""
        place = self.join() if place is None else place
        try:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting[0] is place)
                self._running = threading.get_ident()
            yield
        finally:
            with self._condition:
                if self._waiting[0] is place:
                    self._running = None
                self._waiting.remove(place)
                self._condition.notify_all()


class _CallbackStreamer(TextStreamer):
    """Hands over text as soon as it can no longer change."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


class Conversation:
    """Turns about a list of images; see `FlashSloth.conversation`.

    Asked from several threads, it answers one question after the other, in their order.
    """

    def __init__(
        self,
        session: Runtime,
        images: Any,
        system: str | None = None,
        visual_tokens: int | Sequence[int] | None = None,
    ) -> None:
        self.session = session
        self.images: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        self.system = system
        self._image_tokens = session.image_tokens(len(self.images), visual_tokens)
        self.messages: list[dict[str, Any]] = []
        self._queue = _Queue()
        self._features: ImageFeatures | None = None
        self._cache: Cache | None = None
        self._cached_ids: list[int] = []
        self._cache_room = 0  # of a static cache
        # A cut inside a turn could part a question from its query tokens: the cache is cut after the last prompt or
        # before the first question.
        self._prompt_length = 0
        self._first_question: int | None = None
        # What the images took; part of the next answer's time.
        self._image_timings = Timings()

    def encode(self) -> None:
        """Load and encode the images, once; done by the first question otherwise.

        Raises:
            ValueError, OSError: a bad image.
        """
        with self._queue.turn():
            self._encode()

    @torch.inference_mode()
    def _encode(self) -> None:
        if self._features is not None or not self.images:
            return
        session, base = self.session, self.session.model.model
        started = time.perf_counter()
        pixels_IVCHW = session.processor.image_processor(self.images, return_tensors="pt")["pixel_values"]
        prepared = time.perf_counter()
        features_IPE = session.encode_views(pixels_IVCHW)
        session.synchronize()
        encoded = time.perf_counter()
        counts = None if self._image_tokens is None else torch.tensor(self._image_tokens)
        self._features = base.compress_images(features_IPE, counts)
        session.synchronize()
        compressed = time.perf_counter()
        self._image_timings = Timings(
            preprocess=prepared - started, encode=encoded - prepared, compress=compressed - encoded
        )

    def reset(self) -> None:
        """Forget the turns. The images stay encoded, and their tokens stay in the cache for the next question."""
        with self._queue.turn():
            self.messages = []

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int | None = None,
        on_text: Callable[[str], None] | None = None,
        schema: Mapping[str, Any] | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        confidence: bool = False,
        **generation: Any,
    ) -> Answer:
        """Ask the next question; arguments and errors as in `FlashSloth.ask`."""
        form = AnswerForm(schema, choices, regex, confidence)
        with self._queue.turn():
            return self._ask(question, max_new_tokens, on_text, form, generation, _Clock(self.session.synchronize))

    def warm_up(self, max_new_tokens: int | None = None) -> None:
        """Ask for a few tokens and forget them; see `FlashSloth.warm_up`."""
        least = {"min_new_tokens": min(WARM_UP_TOKENS, max_new_tokens or WARM_UP_TOKENS)}
        clock = _Clock(self.session.synchronize, most_tokens=WARM_UP_TOKENS)
        with self._queue.turn():
            messages = self.messages
            self._ask("?", max_new_tokens, None, AnswerForm(), least, clock)
            self.messages = messages

    def stream(self, question: str, **options: Any) -> AnswerStream:
        """Like `ask`, but returns at once an iterator over pieces of the answer's text."""
        return AnswerStream(self, question, **options)

    @torch.inference_mode()
    def _ask(
        self,
        question: str,
        max_new_tokens: int | None,
        on_text: Callable[[str], None] | None,
        form: AnswerForm,
        generation: dict[str, Any],
        clock: _Clock,
    ) -> Answer:
        if not question.strip():
            raise ValueError("the question is empty")
        session, config = self.session, self.session.config
        generation, criteria, processors = _own_arguments(generation)
        self._encode()
        started = time.perf_counter()
        messages = [*self.messages, self._user_message(question)]
        inputs = self._prepare(messages)
        prompt_tokens = inputs["input_ids"].shape[1]
        limit = self._answer_limit(prompt_tokens, max_new_tokens)
        session.synchronize()
        before = self._image_timings
        timings = replace(before, preprocess=before.preprocess + time.perf_counter() - started)
        if session.compile_config is not None:
            generation = {"compile_config": session.compile_config, **generation}
        # without one, `generate` compares the configuration with a new default one, as costly as some tokens of nano
        generation_config = copy.deepcopy(generation.pop("generation_config", session.model.generation_config))
        generation = generation_config.update(max_new_tokens=limit, return_dict_in_generate=True, **generation)
        guide = Guide(session, form, generation_config, generation)
        rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        cache, reused = self._take_cache(inputs["input_ids"][0].tolist(), prompt_tokens + limit, rows)
        streamer = None if on_text is None else _CallbackStreamer(session.processor.tokenizer, on_text)

        started = time.perf_counter()
        output = session.generate(
            **inputs,
            image_features=self._features,
            generation_config=generation_config,
            logits_processor=guide.logits_processors(processors),
            stopping_criteria=guide.stopping_criteria([*criteria, clock]),
            streamer=streamer,
            **{CACHE_ARGUMENT: cache},
            **generation,
        )
        session.synchronize()
        finished = time.perf_counter()
        first_token = finished if clock.first_token is None else clock.first_token
        timings = replace(timings, prefill=first_token - started, decode=finished - first_token)

        answers_BT = output.sequences[:, prompt_tokens:]
        if not clock.stopped.is_set() and (problem := next(filter(None, guide.problems(rows)), None)):
            raise ValueError(problem)
        text, *others = texts = guide.texts(answers_BT)
        confidence, *_ = guide.confidences(answers_BT, texts, dict(inputs), self._features)
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        beams = (generation_config.num_beams or 1) > 1
        self._cache = _first_row(output.get(CACHE_ARGUMENT), rows, prompt_tokens if beams else None)
        cached = 0 if self._cache is None else int(self._cache.get_seq_length())
        self._cached_ids = output.sequences[0, :cached].tolist()
        self._prompt_length = prompt_tokens
        self._first_question = _first_marked(inputs.get("question_ids"))
        self._image_timings = Timings()
        return Answer(
            text=text,
            visual_tokens=sum(self._image_tokens or [len(self.images) * config.num_image_tokens]),
            uncompressed_tokens=len(self.images) * config.num_views * config.num_patches_per_view,
            prompt_tokens=prompt_tokens,
            reused_tokens=reused,
            new_tokens=guide.lengths(answers_BT)[0],
            timings=timings,
            others=tuple(others),
            confidence=confidence,
        )

    def _user_message(self, question: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not self.messages:
            content = [{"type": "image", "image": image} for image in self.images] + content
        return {"role": "user", "content": content}

    def _prepare(self, messages: list[dict[str, Any]]) -> BatchFeature:
        """Model inputs of the whole conversation without pixels, on the device."""
        system = (
            [] if self.system is None else [{"role": "system", "content": [{"type": "text", "text": self.system}]}]
        )
        inputs = self.session.processor.apply_chat_template(
            [*system, *messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={
                "return_tensors": "pt",
                "return_pixel_values": False,
                "visual_tokens": self._image_tokens,
            },
        )
        return inputs.to(self.session.device)

    def _answer_limit(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        context = self.session.config.text_config.max_position_embeddings
        room = context - prompt_tokens
        if room < 1:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens, but {self.session.name} has a context of {context}; "
                "shorten the question, or start a new conversation"
            )
        limit = max_new_tokens or self.session.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        if limit > room:
            if max_new_tokens is not None:
                warnings.warn(
                    f"max_new_tokens {max_new_tokens} lowered to {room}: the context ends there", stacklevel=4
                )
            return room
        return limit

    def _take_cache(self, ids: Sequence[int], tokens: int, rows: int) -> tuple[Cache, int]:
        """The cache, cut to what it shares with the new prompt, with room for so many tokens and rows; what it shares.

        It is given away: should generation fail half-way, the next turn starts from an empty one.
        """
        config = self.session.config.text_config
        cache, self._cache = self._cache, None
        pairs = enumerate(zip(self._cached_ids, ids, strict=False))
        # The last token of the prompt has to run to give the first of the answer.
        longest = min(len(self._cached_ids), len(ids) - 1)
        shared = min(longest, next((index for index, (old, new) in pairs if old != new), longest))
        if shared < self._prompt_length and self._first_question is not None:
            shared = min(shared, self._first_question)
        # A sliding window has forgotten what a shorter prefix would need.
        cut = cache is not None and shared < len(self._cached_ids)
        if cache is None or shared == 0 or (cut and any(cache.is_sliding)):
            return self._empty_cache(tokens), 0
        if not isinstance(cache, StaticCache):
            if cut:
                cache.crop(shared - len(self._cached_ids))
            if rows > 1:
                cache.batch_repeat_interleave(rows)
            return cache, shared
        if rows > 1:  # its rows are fixed
            return self._empty_cache(tokens), 0
        if tokens > self._cache_room and any(cache.is_sliding):
            return self._empty_cache(tokens), 0
        if cut:
            keep_first(cache, shared)
        if tokens > self._cache_room:
            cache, self._cache_room = enlarge(cache, config, tokens), room_for(tokens)
        return cache, shared

    def _empty_cache(self, tokens: int) -> Cache:
        config = self.session.config.text_config
        if self.session.compile_config is None:
            return DynamicCache(config=config)
        self._cache_room = room_for(tokens)
        return static_cache(config, tokens)


def _first_marked(question_ids_BT: Tensor | None) -> int | None:
    """Index of the first token of the first question; None where a prompt marks none."""
    marked = [] if question_ids_BT is None else question_ids_BT[0].nonzero().flatten().tolist()
    return marked[0] if marked else None


def _own_arguments(generation: dict[str, Any]) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Arguments of `generate` that a turn leaves to the caller, and the caller's criteria and logits processors.

    Raises:
        ValueError: an argument that the conversation gives itself.
    """
    if taken := sorted(OWN_ARGUMENTS & generation.keys()):
        raise ValueError(
            f"{', '.join(taken)} cannot be given here: a conversation sets it; use model.generate instead"
        )
    others = dict(generation)
    return others, others.pop("stopping_criteria", None) or [], others.pop("logits_processor", None) or []


def _first_row(cache: Cache | None, rows: int, shared_tokens: int | None) -> Cache | None:
    """The row of a cache that belongs to the first answer, cut to what all rows share where rows were exchanged.

    None where it cannot be told apart: a cache of fixed size, or a sliding window that has to be cut.
    """
    if cache is None or rows == 1:
        return cache
    if isinstance(cache, StaticCache) or (shared_tokens is not None and any(cache.is_sliding)):
        return None
    cache.batch_select_indices(torch.tensor([0]))
    if shared_tokens is not None:
        cache.crop(shared_tokens - int(cache.get_seq_length()))
    return cache


class AnswerStream:
    """Iterator over pieces of text; `answer` holds the whole answer at its end. Read again, it gives them again."""

    def __init__(
        self, conversation: Conversation, question: str, *, max_new_tokens: int | None = None, **generation: Any
    ) -> None:
        form = AnswerForm(**{name: generation.pop(name) for name in FORM_FIELDS & generation.keys()})
        self.answer: Answer | None = None
        self._error: BaseException | None = None
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._read: list[str] = []
        self._ended = False
        self._clock = _Clock(conversation.session.synchronize)
        place = conversation._queue.join()

        def run() -> None:
            try:
                with conversation._queue.turn(place):
                    self.answer = conversation._ask(
                        question, max_new_tokens, self._pieces.put, form, generation, self._clock
                    )
            except BaseException as error:  # handed to the thread that reads
                self._error = error
            finally:
                self._pieces.put(None)

        self._thread = threading.Thread(target=run, name="flashsloth-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        yield from self._read
        try:
            while not self._ended and (piece := self._pieces.get()) is not None:
                self._read.append(piece)
                yield piece
            self._pieces.put(None)  # for another reader
        finally:
            # Left early, the model must not go on in the background.
            self._ended = True
            self._clock.stopped.set()
            self._thread.join()
        if self._error is not None:
            raise self._error

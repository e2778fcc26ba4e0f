"""An exported folder, loaded and ready to be asked.

model = flashsloth_edge.load("nano-onnx")
answer = model.ask("photo.jpg", "What is in the picture?")
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .engines import Engine, open_engine, select_tokens
from .generation import Sampling, generate
from .manifest import TOKENIZER_NAME, Manifest, read_manifest
from .pixels import Pixels
from .prompts import Prompts, Turns
from .shared.answer import Answer, Timings
from .streaming import AnswerStream, TextPieces

DEFAULT_MAX_NEW_TOKENS = 128


def load(folder: str | os.PathLike[str], threads: int | None = None) -> EdgeModel:
    """An exported model, ready to be asked.

    Args:
        folder: written by `flashsloth export`.
        threads: of the engine; default the processors that this process may use.

    Raises:
        OSError: no such folder, or a file of it is missing.
        ValueError: a folder of another version, or a broken one.
        ImportError: its engine is not installed.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    return EdgeModel(manifest, open_engine(path, manifest, threads), path / TOKENIZER_NAME, os.fspath(folder))


class EdgeModel:
    """A loaded model that answers."""

    def __init__(self, manifest: Manifest, engine: Engine, tokenizer_file: Path, name: str = "model") -> None:
        self.manifest, self.engine, self.name = manifest, engine, name
        sizes = manifest.sizes
        self.pixels = Pixels(manifest.images, sizes)
        self.prompts = Prompts(tokenizer_file, manifest.prompt, sizes.query_tokens, sizes.visual_tokens)

    def ask(
        self,
        images: Any,
        question: str,
        *,
        max_new_tokens: int | None = None,
        system: str | None = None,
        visual_tokens: int | Sequence[int] | None = None,
        on_text: Callable[[str], None] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answer one question about one or several images.

        Args:
            images: path, URL, data URL, bytes, PIL or numpy image, or a list of these (an empty one for text only).
            question: the user's text.
            max_new_tokens: longest answer; default that of the model, else 128.
            system: system prompt; default that of the model's chat template.
            visual_tokens: tokens of every image, or one number for each, of `manifest.sizes.visual_token_choices`.
            on_text: called with each piece of text as soon as it can no longer change.
            sampling: fields of `Sampling`; default the model's own.

        Raises:
            ValueError, OSError: a bad image, an empty question, a number of visual tokens that the graphs cannot make,
                a prompt longer than the context, or an option that does not exist.
        """
        conversation = self.conversation(images, system, visual_tokens)
        return conversation.ask(question, max_new_tokens=max_new_tokens, on_text=on_text, **sampling)

    def stream(self, images: Any, question: str, **options: Any) -> AnswerStream:
        """Like `ask`, but returns at once an iterator over pieces of the answer's text."""
        own = {name: options.pop(name, None) for name in ("system", "visual_tokens")}
        return self.conversation(images, **own).stream(question, **options)

    def conversation(
        self, images: Any, system: str | None = None, visual_tokens: int | Sequence[int] | None = None
    ) -> Conversation:
        """Several turns about the same images, which are encoded once; the cache of earlier turns is used again."""
        return Conversation(self, images, system, visual_tokens)

    def ask_batch(
        self,
        rows: Sequence[tuple[Any, str]],
        *,
        max_new_tokens: int | None = None,
        system: str | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Answers of several (images, question) at once, as `ask` gives them alone.

        Raises:
            ValueError, OSError: as `ask`; the message names the row.
        """
        images = [as_list(row) for row, _ in rows]
        counts = [self.image_tokens(len(own), None) for own in images]
        turns = [Turns([question], own, system) for (_, question), own in zip(rows, counts, strict=True)]
        prompt = self.prompts.encode(turns)
        flat = [image for own in images for image in own]
        limit = self.answer_limit(prompt["input_ids"].shape[1], max_new_tokens)
        described = self.engine.no_images
        if flat:
            described = select_tokens(self.engine.encode(self.pixels(flat)), [n for own in counts for n in own])
        settings = self.manifest.generation
        cache = self.engine.empty_cache(len(rows))
        options = Sampling.of(settings, sampling)
        generated = generate(self.engine, settings, prompt, described, cache, limit, options)
        return [self.prompts.decode(ids).strip() for ids in generated.ids]

    def image_tokens(self, images: int, visual_tokens: int | Sequence[int] | None) -> list[int]:
        """Visual tokens of each image.

        Raises:
            ValueError: a number that the graphs cannot make, or a list that does not fit the images.
        """
        sizes = self.manifest.sizes
        if visual_tokens is None or isinstance(visual_tokens, int):
            visual_tokens = [sizes.visual_tokens if visual_tokens is None else visual_tokens] * images
        if len(visual_tokens) != images:
            raise ValueError(f"visual_tokens names {len(visual_tokens)} images, but there are {images}")
        for count in visual_tokens:
            if count not in sizes.visual_token_choices:
                choices = ", ".join(map(str, sizes.visual_token_choices))
                raise ValueError(
                    f"visual_tokens is {count!r:.80}; an image of this exported model can be {choices} visual tokens"
                )
        return list(visual_tokens)

    def answer_limit(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """Most new tokens of an answer, which the context may lower with a warning."""
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        context = self.manifest.sizes.context
        room = context - prompt_tokens
        if room < 1:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens, but {self.name} has a context of {context}; shorten the "
                "question, or start a new conversation"
            )
        limit = max_new_tokens or self.manifest.generation.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        if limit > room and max_new_tokens is not None:
            warnings.warn(f"max_new_tokens {max_new_tokens} lowered to {room}: the context ends there", stacklevel=4)
        return min(limit, room)


class Conversation:
    """Turns about a list of images; asked from several threads, it answers one question after the other."""

    def __init__(
        self, model: EdgeModel, images: Any, system: str | None, visual_tokens: int | Sequence[int] | None
    ) -> None:
        self.model, self.system = model, system
        self.images = as_list(images)
        self.image_tokens = model.image_tokens(len(self.images), visual_tokens)
        self.texts: list[str] = []  # question, answer, question, ...
        self._lock = threading.Lock()
        self._images: Any = None
        self._image_timings = Timings()
        self._cache: Any = None
        self._cached_ids: list[int] = []
        # A cut inside a turn could part a question from its query tokens: the cache is cut after the last prompt or
        # before the first question.
        self._prompt_length = 0
        self._first_question: int | None = None

    def reset(self) -> None:
        """Forget the turns. The images stay encoded, and their tokens stay in the cache for the next question."""
        with self._lock:
            self.texts = []

    def encode(self) -> None:
        """Load and encode the images, once; done by the first question otherwise."""
        with self._lock:
            self._encode()

    def stream(self, question: str, **options: Any) -> AnswerStream:
        """Like `ask`, but returns at once an iterator over pieces of the answer's text."""
        return AnswerStream(lambda on_text, stopped: self._ask(question, on_text, stopped, **options))

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """Ask the next question; arguments and errors as in `EdgeModel.ask`."""
        return self._ask(question, on_text, None, **options)

    def _encode(self) -> None:
        if self._images is not None:
            return
        if not self.images:
            self._images = self.model.engine.no_images
            return
        started = time.perf_counter()
        pixels_IVCHW = self.model.pixels(self.images)
        prepared = time.perf_counter()
        encoded = self.model.engine.encode(pixels_IVCHW)
        finished = time.perf_counter()
        self._images = select_tokens(encoded, self.image_tokens)
        self._image_timings = Timings(
            preprocess=prepared - started, encode=finished - prepared, compress=time.perf_counter() - finished
        )

    def _ask(
        self,
        question: str,
        on_text: Callable[[str], None] | None,
        stopped: threading.Event | None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Answer:
        if not question.strip():
            raise ValueError("the question is empty")
        model, settings = self.model, self.model.manifest.generation
        sampling = Sampling.of(settings, options)
        with self._lock:
            self._encode()
            images, before = self._images, self._image_timings
            started = time.perf_counter()
            prompt = model.prompts.encode([Turns([*self.texts, question], self.image_tokens, self.system)])
            ids = prompt["input_ids"][0].tolist()
            limit = model.answer_limit(len(ids), max_new_tokens)
            cache = self._take_cache(ids)
            reused = cache.length
            preprocess = before.preprocess + time.perf_counter() - started
            pieces = None if on_text is None else TextPieces(model.prompts.decode, on_text)

            def on_tokens(tokens: list[int]) -> bool:
                if pieces is not None and tokens[0] not in settings.eos_token_ids:
                    pieces.add(tokens[0])
                return stopped is None or not stopped.is_set()

            generated = generate(model.engine, settings, prompt, images, cache, limit, sampling, on_tokens)
            if pieces is not None:
                pieces.end()
            new_ids = generated.ids[0]
            text = model.prompts.decode(new_ids).strip()
            self.texts = [*self.texts, question, text]
            self._cache, self._cached_ids = generated.cache, [*ids, *new_ids][: generated.cache.length]
            self._prompt_length, self._first_question = len(ids), first_marked(prompt["question_ids"])
            self._image_timings = Timings()
        sizes = model.manifest.sizes
        return Answer(
            text=text,
            visual_tokens=sum(self.image_tokens),
            uncompressed_tokens=len(self.images) * sizes.patches,
            prompt_tokens=len(ids),
            reused_tokens=reused,
            new_tokens=len(new_ids),
            timings=Timings(
                preprocess=preprocess,
                encode=before.encode,
                compress=before.compress,
                prefill=generated.prefill,
                decode=generated.decode,
            ),
        )

    def _take_cache(self, ids: list[int]) -> Any:
        """The cache, cut to what it shares with the new prompt. It is given away, should the answer fail half-way."""
        cache, self._cache = self._cache, None
        pairs = enumerate(zip(self._cached_ids, ids, strict=False))
        # the last token of the prompt has to run to give the first of the answer
        longest = min(len(self._cached_ids), len(ids) - 1)
        shared = min(longest, next((index for index, (old, new) in pairs if old != new), longest))
        if shared < self._prompt_length and self._first_question is not None:
            shared = min(shared, self._first_question)
        if cache is None or shared == 0:
            return self.model.engine.empty_cache(1)
        return self.model.engine.cut(cache, shared)


def as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def first_marked(question_ids_BT: np.ndarray) -> int | None:
    """Index of the first token of the first question; None where a prompt marks none."""
    marked = np.flatnonzero(question_ids_BT[0])
    return int(marked[0]) if len(marked) else None

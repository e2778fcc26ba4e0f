"""From a request to what the model reads: done in the thread of whoever asks, beside the running model.

Shape suffixes: T tokens, I images, V views, C channels, H W pixels.
"""

import hashlib
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..inference.conversation import DEFAULT_MAX_NEW_TOKENS
from ..inference.session import FlashSloth
from .requests import Request, Sampling

DIGEST_BYTES = 16
# Everything that the keys and values of a token depend on besides the tokens before it: the token, the turn whose
# question it belongs to, and the image it stands for.
RECORD = np.dtype([("token", "<i8"), ("turn", "<i8"), ("image", f"V{DIGEST_BYTES}")])


@dataclass
class Prompt:
    """One row, ready for the model.

    Attributes:
        inputs: arrays without batch axis, for the processor's `pad`; no pixels.
        images: hash of the pixels of each image.
        counts: visual tokens of each image; None where all are the model's default.
        pixels: (V, C, H, W) of each image; emptied once they are encoded.
        key: of the prefix cache.
        whole: (first, end) of what the cache must not be cut inside: images, and turns from question to queries.
        last_question: the cache must not reach beyond it, so that the embedded query module runs.
        limit: tokens of the answer at most.
        visual_tokens: of all images.
        seconds: of the preparation.
    """

    inputs: dict[str, np.ndarray]
    images: list[bytes]
    counts: list[int] | None
    pixels: dict[bytes, Tensor]
    key: bytes
    whole: list[tuple[int, int]]
    last_question: int
    limit: int
    visual_tokens: int
    seconds: float
    ids: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def cut(self, shared: int) -> int:
        """How many of the first `shared` tokens may come from the cache."""
        cut = min(shared, self.last_question)
        for first, end in sorted(self.whole, reverse=True):
            if first < cut < end:
                cut = first
        return cut


class Preparation:
    """Makes prompts of requests, from several threads at once.

    Args:
        session: its processor is used, not its model.
        max_tokens: of a prompt and its answer together.
    """

    def __init__(self, session: FlashSloth, max_tokens: int) -> None:
        self.session = session
        self.max_tokens = min(max_tokens, session.config.text_config.max_position_embeddings)
        # a tokenizer's settings are changed and read by every call
        self._tokenizing = threading.Lock()

    def __call__(self, request: Request) -> Prompt:
        """Raises:
        ValueError, OSError: a request that cannot be answered as it asks.
        """
        started = time.perf_counter()
        check_sampling(request.sampling)
        images = list(request.images)
        counts = self.session.image_tokens(len(images), request.visual_tokens)
        inputs = self._tokens(request.messages, images, counts)
        tokens = len(inputs["input_ids"])
        room = self.max_tokens - tokens
        if room < 1:
            raise ValueError(
                f"the prompt has {tokens} tokens, but {self.session.name} has room for {self.max_tokens}, answer "
                "included; shorten the text, send fewer images, or start a new conversation"
            )
        default = self.session.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        config = self.session.config
        own_counts = [config.num_image_tokens] * len(images) if counts is None else counts
        pixels = self._pixels(images)
        hashes = [_digest(memoryview(np.ascontiguousarray(image.numpy())).cast("B")) for image in pixels]
        return Prompt(
            inputs=inputs,
            images=hashes,
            counts=counts,
            pixels=dict(zip(hashes, pixels, strict=True)),
            key=_key(inputs, hashes, own_counts),
            whole=_whole(inputs, own_counts, config.num_query_tokens),
            last_question=_last_question(inputs),
            limit=min(room, default if request.sampling.max_tokens is None else request.sampling.max_tokens),
            visual_tokens=sum(own_counts),
            seconds=time.perf_counter() - started,
            ids=inputs["input_ids"].tolist(),
        )

    def _tokens(self, messages: Any, images: list[Any], counts: list[int] | None) -> dict[str, np.ndarray]:
        with self._tokenizing:
            batch = self.session.processor.apply_chat_template(
                messages,
                images=images,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={
                    "return_tensors": "np",
                    "return_pixel_values": False,
                    "return_attention_mask": True,
                    "visual_tokens": counts,
                },
            )
        return {name: value[0] for name, value in batch.items() if name != "image_token_counts"}

    def _pixels(self, images: list[Any]) -> list[Tensor]:
        if not images:
            return []
        return list(self.session.processor.image_processor(images, return_tensors="pt")["pixel_values"])


def check_sampling(sampling: Sampling) -> None:
    """Raises:
    ValueError: a setting that means nothing.
    """
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise ValueError(f"max_tokens is {sampling.max_tokens}; it must be at least 1")
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"temperature is {sampling.temperature}; it must be 0, for the likeliest tokens, or more")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}; it must be more than 0 and at most 1")
    if sampling.top_logprobs is not None and sampling.top_logprobs < 0:
        raise ValueError(f"top_logprobs is {sampling.top_logprobs}; it must be at least 0")
    if not all(isinstance(text, str) and text for text in sampling.stop):
        raise ValueError("stop has an empty text; every answer would end with it")


def answer_key(prompt: Prompt, tokens: Sequence[int]) -> bytes:
    """The key of a prompt with tokens of its answer behind it."""
    records_T = np.zeros(len(tokens), dtype=RECORD)
    records_T["token"] = tokens
    return prompt.key + records_T.tobytes()


def _key(inputs: dict[str, np.ndarray], hashes: list[bytes], counts: list[int]) -> bytes:
    records_T = np.zeros(len(inputs["input_ids"]), dtype=RECORD)
    records_T["token"] = inputs["input_ids"]
    if "question_ids" in inputs:
        records_T["turn"] = inputs["question_ids"]
    for first, image, count in zip(inputs.get("image_positions", ()), hashes, counts, strict=True):
        # the first visual token of few is another than the first of many
        records_T["image"][first : first + count] = np.void(_digest(image + str(count).encode()))
    return records_T.tobytes()


def _whole(inputs: dict[str, np.ndarray], counts: list[int], num_queries: int) -> list[tuple[int, int]]:
    images = zip(inputs.get("image_positions", ()), counts, strict=True)
    return [(int(first), int(first) + count) for first, count in images] + [
        (first, end + num_queries) for first, end in _turns(inputs)
    ]


def _turns(inputs: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """Where the question of each turn begins, and its first query token."""
    turns = []
    for turn, query in enumerate(inputs.get("query_positions", ()), start=1):
        marked = np.flatnonzero(inputs["question_ids"] == turn)
        turns.append((int(marked[0]) if len(marked) else int(query), int(query)))
    return turns


def _last_question(inputs: dict[str, np.ndarray]) -> int:
    """Without queries, the last token of the prompt has to run to give the first of the answer."""
    turns = _turns(inputs)
    return turns[-1][0] if turns else len(inputs["input_ids"]) - 1


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()

"""From a chat or a text with placeholders to what vLLM's engine takes: tokens, and items of two modalities.

An image's item stands where its visual tokens do. A turn's item stands where its query tokens do, and brings what the
embedded query module reads: which of the tokens before it are the question, and the pixels of all images before it,
since the cache may hold their visual tokens, but never their un-pooled features.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.inputs.engine import MultiModalInput, mm_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)

from flashsloth import FlashSlothConfig

from . import IMAGE, TURN

DIGEST_BYTES = 16


@dataclass
class EncodedPrompt:
    """A prompt as the processor encodes it, without pixels.

    Attributes:
        ids: tokens, placeholders expanded.
        images: in reading order.
        image_positions: first visual token of each.
        image_tokens: visual tokens of each.
        query_positions: first query token of each turn.
        question_ids: number of the turn whose question a token belongs to, from 1; 0 for none.
    """

    ids: list[int]
    images: list[Any]
    image_positions: list[int]
    image_tokens: list[int]
    query_positions: list[int]
    question_ids: np.ndarray


def encoded_prompt(batch: Any, images: Sequence[Any], config: FlashSlothConfig) -> EncodedPrompt:
    """From the processor's output for one row, as arrays."""

    def positions(name: str) -> list[int]:
        return [int(position) for position in batch[name][0] if position >= 0] if name in batch else []

    ids_T = np.asarray(batch["input_ids"][0])
    starts = positions("image_positions")
    counts = batch.get("image_token_counts")
    return EncodedPrompt(
        ids=ids_T.tolist(),
        images=list(images),
        image_positions=starts,
        image_tokens=[config.num_image_tokens] * len(starts) if counts is None else [int(count) for count in counts],
        query_positions=positions("query_positions"),
        question_ids=np.asarray(batch["question_ids"][0]) if "question_ids" in batch else np.zeros_like(ids_T),
    )


def longest_question(prompt: EncodedPrompt) -> int:
    """Tokens from a question's first to the one before its queries, at most."""
    return max((len(prompt_question(prompt, turn)) for turn in range(len(prompt.query_positions))), default=0)


def prompt_question(prompt: EncodedPrompt, turn: int) -> np.ndarray:
    """Which of the tokens before a turn's queries are its question: bool, from its first token on."""
    query = prompt.query_positions[turn]
    is_question = prompt.question_ids[:query] == turn + 1
    return is_question[int(is_question.argmax()) :] if is_question.any() else is_question[:0]


def engine_input(prompt: EncodedPrompt, pixel_values: Tensor | None, config: FlashSlothConfig) -> MultiModalInput:
    """What vLLM's engine takes.

    Args:
        pixel_values: (I, V, C, H, W) of the prompt's images; None without.
    """
    shape = (0, config.num_views, 3, config.image_height, config.image_width)
    pixels_IVCHW = torch.zeros(shape) if pixel_values is None else pixel_values
    digests = [_digest(image.numpy().tobytes()) for image in pixels_IVCHW]
    digests_I2 = torch.from_numpy(np.frombuffer(b"".join(digests), dtype="<i8").reshape(-1, 2).copy())
    items: dict[str, list[MultiModalKwargsItem]] = {}
    hashes: dict[str, list[str]] = {}
    places: dict[str, list[PlaceholderRange]] = {}

    def add(modality: str, item: dict[str, Tensor], digest: bytes, position: int, length: int) -> None:
        # small tensors stay on the CPU, where the scheduler and the embedding read them
        elements = {
            name: MultiModalFieldElem(
                data=data, field=MultiModalBatchedField(keep_on_cpu=not data.is_floating_point())
            )
            for name, data in item.items()
        }
        items.setdefault(modality, []).append(MultiModalKwargsItem(elements))
        hashes.setdefault(modality, []).append(f"flashsloth-{modality}-{digest.hex()}")
        places.setdefault(modality, []).append(PlaceholderRange(offset=position, length=length))

    for image, (position, count) in enumerate(zip(prompt.image_positions, prompt.image_tokens, strict=True)):
        item = {
            "pixel_values": pixels_IVCHW[image],
            "image_digest": digests_I2[image],
            "visual_tokens": torch.tensor(count),
        }
        add(IMAGE, item, _digest(digests[image] + str(count).encode()), position, count)
    for turn, position in enumerate(prompt.query_positions):
        seen = sum(start < position for start in prompt.image_positions)
        is_question_T = prompt_question(prompt, turn)
        item = {
            "image_pixels": pixels_IVCHW[:seen],
            "image_digests": digests_I2[:seen],
            "is_question": torch.from_numpy(is_question_T.copy()),
        }
        digest = _digest(b"".join(digests[:seen]) + b"|" + is_question_T.tobytes())
        add(TURN, item, digest, position, config.num_query_tokens)
    return mm_input(prompt.ids, MultiModalKwargsItems(items), hashes, places)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()

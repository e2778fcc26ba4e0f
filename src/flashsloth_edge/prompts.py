"""From turns of a conversation to token ids and the places of images, queries and questions.

Shape suffixes: B rows, T tokens, K images of a row, G query groups of a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .manifest import PromptLayout
from .shared.chat_text import Kind, PromptText, mark_questions
from .shared.prompt_encoding import (
    Expansion,
    Features,
    encode_pieces,
    fit_to_length,
    naming_row,
    pad_features,
    tokenize_pieces,
)


@dataclass(frozen=True)
class Turns:
    """A conversation: questions and answers in turn, a question last.

    Attributes:
        texts: question, answer, question, ...
        images: visual tokens of each image of the first turn.
        system: system prompt; None for the default one.
    """

    texts: Sequence[str]
    images: Sequence[int] = ()
    system: str | None = None


class _Encodings:
    """What `tokenize_pieces` takes from a tokenizer's answer."""

    def __init__(self, encodings: list[Any]) -> None:
        self.encodings = encodings


class Prompts:
    """Writes prompts and reads answers.

    Args:
        tokenizer_file: tokenizer.json.
        layout: of the manifest.
        sizes: query tokens of a turn, visual tokens of an image by default.
    """

    def __init__(self, tokenizer_file: Path, layout: PromptLayout, query_tokens: int, visual_tokens: int) -> None:
        self.layout, self.query_tokens, self.visual_tokens = layout, query_tokens, visual_tokens
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # special tokens that a user types are text
        special = {
            token["content"]: (token["lstrip"], token["rstrip"])
            for token in json.loads(tokenizer_file.read_text(encoding="utf-8")).get("added_tokens", ())
            if token["special"]
        }
        self._special_ids = {token: self.tokenizer.token_to_id(token) for token in special}
        self.text = PromptText(layout.image_token, layout.query_token, layout.question_marker, special)

    def render(self, turns: Turns) -> str:
        """The prompt as text, with placeholders."""
        layout = self.layout
        texts = [self.text.escape(text.strip() if layout.strips else text) for text in turns.texts]
        without_images = not turns.images
        system = None if turns.system is None else turns.system.strip() if layout.strips else turns.system
        if system is not None and not layout.takes_system:
            raise ValueError("the chat template of this model takes no system prompt; leave system out")
        if system is None:
            prompt = layout.default_opening[without_images]
        elif not system:
            prompt = layout.empty_opening[without_images]
        else:
            prompt = layout.system_start + self.text.escape(system) + layout.system_end[without_images]
        if turns.images:
            prompt += layout.image_separator.join([layout.image] * len(turns.images)) + layout.image_end
        prompt += texts[0]
        for index, text in enumerate(texts[1:], start=1):
            prompt += (layout.question_to_answer if index % 2 else layout.answer_to_question) + text
        return prompt + layout.question_end

    def encode(self, rows: Sequence[Turns]) -> Features:
        """A batch, padded on the left; arrays as `FlashSlothProcessor` makes them, positions present in any case.

        Raises:
            ValueError: an empty question, or a prompt that is too long.
        """
        pieces = [self.text.split(self.render(turns)) for turns in rows]
        if self.query_tokens:
            for row in pieces:
                mark_questions(row, self.layout.user_header)
        tokenize_pieces(pieces, self._tokenize, self.layout.opens_texts)
        used = {piece.text for row in pieces for piece in row if piece.kind is Kind.TOKEN}
        expansion = Expansion(
            image_token_id=self.layout.image_token_id,
            num_image_tokens=self.visual_tokens,
            query_token_id=self.layout.query_token_id,
            num_query_tokens=self.query_tokens,
            token_ids={token: self._special_ids[token] for token in used},
            prefix_ids=self.layout.prefix_ids,
        )
        encoded = []
        for number, (row, turns) in enumerate(zip(pieces, rows, strict=True)):
            with naming_row(number, len(rows)):
                features = encode_pieces(row, expansion, list(turns.images))
                if self.layout.limit is not None:
                    name = "the tokenizer's model_max_length"
                    features = fit_to_length(features, self.layout.limit, False, "left", expansion, name)
            del features["labels"]
            encoded.append(features)
        batch = pad_features(encoded, 0, None, None, "left")
        for name in ("image_positions", "query_positions"):
            batch.setdefault(name, np.zeros((len(rows), 0), dtype=np.int64))
        batch.setdefault("question_ids", np.zeros_like(batch["input_ids"]))
        batch.setdefault("image_token_counts", np.zeros(0, dtype=np.int64))
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _tokenize(self, texts: list[str], **_: Any) -> _Encodings:
        return _Encodings(self.tokenizer.encode_batch(texts, add_special_tokens=False))

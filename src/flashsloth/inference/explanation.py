"""Where an answer comes from: what the model attended to, laid over the images.

Shape suffixes: as in `attention`; H W rows and columns of a picture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .attention import AttentionMaps, attention_maps
from .maps import Rectangle, spread
from .runtime import Runtime

# name -> what it shows, the most telling first
LAYERS = {
    "embq": "what this question took from the image (EmbQ)",
    "sap": "what the image offers (SAP)",
    "decoder": "where the language model looked while it answered",
}


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        text: without blanks around it.
        tokens: places of its tokens in the text.
    """

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Explanation:
    """An answer with the attention that it came with.

    Attributes:
        question, answer: texts.
        images: as the model saw them, before they were resized.
        rectangles: of each image, what each view shows of it (`FlashSlothImageProcessor.view_rectangles`).
        cells: (rows, columns) of the finest grid over an image.
        maps: raw weights.
        question_words, answer_words: words, with the places of their tokens in `maps`.
        visual_tokens: of all images.
    """

    question: str
    answer: str
    images: tuple[Image.Image, ...]
    rectangles: tuple[tuple[Rectangle, ...], ...]
    cells: tuple[int, int]
    maps: AttentionMaps
    question_words: tuple[Word, ...]
    answer_words: tuple[Word, ...]
    visual_tokens: int

    @cached_property
    def probability(self) -> float:
        """Of the whole answer and its end, at temperature 1."""
        return float(np.exp(self.maps.log_probabilities_A.sum(dtype=np.float64)))

    @property
    def layers(self) -> dict[str, str]:
        """Those of `LAYERS` that this model has."""
        missing = {
            "embq": self.maps.image_HQIVRC is None,
            "sap": self.maps.pooling_IVRC is None,
            "decoder": False,
        }
        return {name: text for name, text in LAYERS.items() if not missing[name]}

    def on_grid(
        self,
        layer: str = "embq",
        *,
        query: int | None = None,
        head: int | None = None,
        word: int | None = None,
    ) -> np.ndarray:
        """A layer on the grid of every view of every image: (images, views, rows, columns) float32.

        Args:
            layer: "embq", "sap" or "decoder".
            query, head: of EmbQ, one instead of the mean of all. Of the decoder's attention they are not known.
            word: of EmbQ, a word of the question: its queries weigh as much as they attended to it. Of the decoder,
                a word of the answer.

        Raises:
            ValueError: the model has no such layer, or the layer no such part.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer!r} is not there; this model has {', '.join(self.layers)}")
        if layer != "embq" and (query is not None or head is not None):
            raise ValueError(f"query and head are parts of the layer 'embq', not of {layer!r}")
        if layer == "sap":
            if word is not None:
                raise ValueError("SAP does not see the question, so it has no map of a word")
            assert self.maps.pooling_IVRC is not None
            return self.maps.pooling_IVRC
        if layer == "decoder":
            chosen = slice(None) if word is None else list(_part(self.answer_words, word, "answer word").tokens)
            return self.maps.decoder_AIVRC[chosen].mean(axis=0)
        maps_HQIVRC = self.maps.image_HQIVRC
        assert maps_HQIVRC is not None
        if head is not None:
            maps_HQIVRC = _part(maps_HQIVRC, head, "head")[None]
        if query is not None:
            return _part(maps_HQIVRC.swapaxes(0, 1), query, "query").mean(axis=0)
        maps_QIVRC = maps_HQIVRC.mean(axis=0)
        if word is None:
            return maps_QIVRC.mean(axis=0)
        if self.maps.question_HQT is None:
            raise ValueError("this model's queries do not read the question, so there is no map of a word")
        tokens = list(_part(self.question_words, word, "question word").tokens)
        weights_Q = self.maps.question_HQT.mean(axis=0)[:, tokens].sum(axis=-1)
        return np.tensordot(weights_Q / weights_Q.sum(), maps_QIVRC, axes=1)

    def over_image(
        self, layer: str = "embq", image: int = 0, shape: tuple[int, int] | None = None, **part: int | None
    ) -> np.ndarray:
        """A layer over one image in the image's own geometry, squashing, padding and tiling undone.

        Args:
            image: which.
            shape: (H, W); default `cells`.
            part: as in `on_grid`.

        Returns:
            (H, W) float64 amounts. What went to the padding is left out; SAP's are divided by the number of windows.
        """
        size = _part(self.images, image, "image").size
        grid_VRC = self.on_grid(layer, **part)[image]
        if layer == "sap":
            grid_VRC = grid_VRC / self.on_grid(layer).sum()
        return spread(grid_VRC, self.rectangles[image], size, shape or self.cells)

    def word_weights(self, query: int | None = None, head: int | None = None) -> list[float]:
        """How much of EmbQ's attention each word of the question got, of one query or head or the mean; sums to 1."""
        if self.maps.question_HQT is None:
            return []
        weights_HQT = self.maps.question_HQT
        if head is not None:
            weights_HQT = _part(weights_HQT, head, "head")[None]
        if query is not None:
            weights_HQT = _part(weights_HQT.swapaxes(0, 1), query, "query")[:, None]
        weights_T = weights_HQT.mean(axis=(0, 1))
        return [float(weights_T[list(word.tokens)].sum()) for word in self.question_words]

    def save(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write a picture (.png), a page to look around in (.html), or the arrays (.npz); see `explanation_files`.

        Raises:
            ValueError: another ending.
        """
        from .explanation_files import save

        return save(self, path, **options)


def _part(parts: Any, index: int, what: str) -> Any:
    if not 0 <= index < len(parts):
        raise ValueError(f"{what} {index} is not there; there are {len(parts)}, counted from 0")
    return parts[index]


def words_of(tokenizer: Any, ids: Sequence[int]) -> tuple[Word, ...]:
    """The words that tokens make; a token belongs to the word in which it begins, a special token to none."""
    words: list[list[int]] = []
    for place, token in enumerate(ids):
        if token in tokenizer.all_special_ids:
            continue
        piece = tokenizer.decode(ids[place : place + 1], skip_special_tokens=True)
        if not words or piece[:1].isspace():
            words.append([])
        words[-1].append(place)
    texts = [tokenizer.decode([ids[place] for place in word], skip_special_tokens=True).strip() for word in words]
    return tuple(Word(text, tuple(word)) for text, word in zip(texts, words, strict=True) if text)


@torch.inference_mode()
def explain_answer(
    session: Runtime,
    images: Sequence[Any],
    messages: Sequence[dict[str, Any]],
    answer: str,
    visual_tokens: int | Sequence[int] | None = None,
) -> Explanation:
    """What the model attends to when it gives an answer, whoever gave it.

    Args:
        images: as in `FlashSloth.ask`; at least one.
        messages: chat up to the question, as `apply_chat_template` takes it, `{"type": "image"}` parts without source.
        answer: text.
        visual_tokens: as in `FlashSloth.ask`.

    Raises:
        ValueError, OSError: a bad image, none at all, or a prompt that does not fit the context.
    """
    if not images:
        raise ValueError("there is nothing to explain without an image")
    processor, config = session.processor, session.config
    counts = session.image_tokens(len(images), visual_tokens)
    loader = processor.image_processor
    loaded = [loader.fetch_images(image) for image in images]
    pixels_IVCHW = loader(loaded, return_tensors="pt")["pixel_values"]
    features_IPE = session.encode_views(pixels_IVCHW)

    def encode(chat: Sequence[dict[str, Any]], asks: bool) -> Any:
        options = {"return_tensors": "pt", "return_pixel_values": False, "visual_tokens": counts}
        return processor.apply_chat_template(
            list(chat), add_generation_prompt=asks, tokenize=True, return_dict=True, processor_kwargs=options
        ).to(session.device)

    prompt_1T = encode(messages, True)["input_ids"]
    answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    inputs = encode([*messages, answered], False)
    ids_1T, prompt_tokens = inputs["input_ids"], prompt_1T.shape[1]
    if ids_1T.shape[1] <= prompt_tokens or not torch.equal(ids_1T[:, :prompt_tokens], prompt_1T):
        raise ValueError(
            f"the chat template of {session.name} writes an answered question otherwise than an open one, so that the "
            "answer cannot be told from the prompt; give it add_generation_prompt"
        )
    if ids_1T.shape[1] > (context := config.text_config.max_position_embeddings):
        raise ValueError(f"question and answer have {ids_1T.shape[1]} tokens, {session.name} a context of {context}")
    with session.readable_model() as model:
        maps = attention_maps(model, features_IPE, counts, dict(inputs), prompt_tokens)
    tiles = config.view_grid or (1, 1)
    return Explanation(
        question=processor.tokenizer.decode(maps.question_ids).strip(),
        answer=answer,
        images=tuple(loaded),
        rectangles=tuple(tuple(loader.view_rectangles(image.size)) for image in loaded),
        cells=(config.grid_height * tiles[0], config.grid_width * tiles[1]),
        maps=maps,
        question_words=words_of(processor.tokenizer, maps.question_ids),
        answer_words=words_of(processor.tokenizer, maps.answer_ids),
        visual_tokens=sum(counts or [config.num_image_tokens] * len(loaded)),
    )

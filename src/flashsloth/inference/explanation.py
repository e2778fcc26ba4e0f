"""Where an answer comes from: what the model attended to, laid over the images.

Shape suffixes: as in `attention`; H W rows and columns of a picture.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from ..checkpoints.files import replace_file, write_whole
from .attention import AttentionMaps
from .heat import HEAT_STOPS, fit, lay_over, panels
from .maps import Rectangle, spread

# name -> what it shows, the most telling first
LAYERS = {
    "embq": "what this question took from the image (EmbQ)",
    "sap": "what the image offers (SAP)",
    "decoder": "where the language model looked while it answered",
}

TEMPLATE = Path(__file__).with_name("explanation.html.jinja")
ENDINGS = (".png", ".html", ".npz")
PARTS = ("query", "head")
LARGEST_SIDE = 1024  # pixels of an image within a page
LEVELS = 1000  # of a map within a page


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
            query: of EmbQ, one instead of the mean of all.
            head: of EmbQ, as `query`.
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

    def save(
        self, path: str | os.PathLike[str], *, per: str | None = None, layers: Sequence[str] | None = None
    ) -> Path:
        """Write the explanation; the file appears whole or not at all.

        Args:
            path: its ending decides: a picture (.png), a page to look around in (.html), or arrays (.npz).
            per: "query" or "head": in a picture, EmbQ's attention of each besides the mean; "head" adds the heads to
                a page, too. Arrays always hold all.
            layers: which to show, in this order; default all that the model has.

        Raises:
            ValueError: an unknown ending, layer or part.
            OSError: the file cannot be written.
        """
        path = Path(path)
        check_endings([path])
        if per is not None and per not in PARTS:
            raise ValueError(f"per is {per!r}; use {' or '.join(PARTS)}")
        chosen = self._chosen(layers)
        match path.suffix.lower():
            case ".png":
                picture = self.draw(per, chosen)
                replace_file(path, lambda staging: picture.save(staging, format="PNG"))
            case ".html":
                write_whole(path, self.page(chosen, heads=per == "head"))
            case _:
                replace_file(path, self._write_arrays)
        return path

    def _chosen(self, layers: Sequence[str] | None) -> list[str]:
        for layer in layers or ():
            if layer not in self.layers:
                raise ValueError(f"there is no layer {layer!r}; this model has {', '.join(self.layers)}")
        return list(self.layers if layers is None else layers)

    def draw(self, per: str | None = None, layers: Sequence[str] | None = None) -> Image.Image:
        """A picture: a row for each image, with the layers side by side; as `save`."""
        rows: list[tuple[str, list[tuple[str, Image.Image]]]] = []
        for number, image in enumerate(self.images):
            small = fit(image)
            shown = [("image", small)]
            for layer in self._chosen(layers):
                shown.append((f"{layer}: {self.layers[layer]}", lay_over(small, self.over_image(layer, number))))
            headline = f"{self.question}  {self.answer}" if number == 0 else f"image {number + 1}"
            rows.append((headline, shown))
            if per is not None and self.maps.image_HQIVRC is not None:
                count = self.maps.image_HQIVRC.shape[PARTS.index(per) ^ 1]
                parts = [
                    (f"{per} {part}", lay_over(small, self.over_image("embq", number, None, **{per: part})))
                    for part in range(count)
                ]
                width = len(shown)
                rows += [(f"EmbQ, per {per}", parts[first : first + width]) for first in range(0, count, width)]
        return panels(rows)

    def page(self, layers: Sequence[str] | None = None, heads: bool = False) -> str:
        """A page of HTML that needs nothing else: layers to switch, words to point at."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATE.parent), undefined=jinja2.StrictUndefined, autoescape=True,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        template = environment.get_template(TEMPLATE.name)
        return template.render(data=self.page_data(layers, heads), layers=self._chosen(layers))

    def page_data(self, layers: Sequence[str] | None = None, heads: bool = False) -> dict[str, Any]:
        """What the page draws, as plain values."""
        layers = self._chosen(layers)
        maps = self.maps
        queries = 0 if maps.image_HQIVRC is None else maps.image_HQIVRC.shape[1]
        images = []
        for number, image in enumerate(self.images):
            own: dict[str, Any] = {layer: _levels(self.over_image(layer, number)) for layer in layers}
            if "embq" in layers:
                own["queries"] = [_levels(self.over_image("embq", number, query=query)) for query in range(queries)]
                own["words"] = [
                    _levels(self.over_image("embq", number, word=word))
                    for word in range(len(self.question_words) if maps.question_HQT is not None else 0)
                ]
                if heads and maps.image_HQIVRC is not None:
                    every = range(maps.image_HQIVRC.shape[0])
                    own["heads"] = [_levels(self.over_image("embq", number, head=head)) for head in every]
            if "decoder" in layers:
                words = range(len(self.answer_words))
                own["answer"] = [_levels(self.over_image("decoder", number, word=word)) for word in words]
            images.append({"source": _data_url(image), "width": image.width, "height": image.height, "maps": own})
        return {
            "question": self.question,
            "answer": self.answer,
            "question_words": [word.text for word in self.question_words],
            "question_weights": self.word_weights(),
            "answer_words": [word.text for word in self.answer_words],
            "layers": {layer: self.layers[layer] for layer in layers},
            "visual_tokens": self.visual_tokens,
            "probability": self.probability,
            "stops": HEAT_STOPS,
            "levels": LEVELS,
            "cells": self.cells,
            "images": images,
        }

    def _write_arrays(self, path: Path) -> None:
        maps = self.maps
        arrays: dict[str, Any] = {
            "sap_weights": maps.pooling_IVRC,
            "embq_image_attention": maps.image_HQIVRC,
            "embq_question_attention": maps.question_HQT,
            "decoder_attention": maps.decoder_LHAN,
            "decoder_on_grid": maps.decoder_AIVRC,
            "log_probabilities": maps.log_probabilities_A,
            "question_ids": np.array(maps.question_ids),
            "answer_ids": np.array(maps.answer_ids),
            "question_words": np.array([word.text for word in self.question_words]),
            "question": np.array(self.question),
            "answer": np.array(self.answer),
            "view_rectangles": np.array(self.rectangles),
            "image_sizes": np.array([image.size for image in self.images]),
        }
        for layer in self.layers:
            for number in range(len(self.images)):
                arrays[f"{layer}_over_image_{number}"] = self.over_image(layer, number)
        with path.open("wb") as file:
            np.savez_compressed(file, **{name: array for name, array in arrays.items() if array is not None})


def _part(parts: Any, index: int, what: str) -> Any:
    if not 0 <= index < len(parts):
        raise ValueError(f"{what} {index} is not there; there are {len(parts)}, counted from 0")
    return parts[index]


def check_endings(paths: Iterable[Path]) -> None:
    """Refuse files that cannot be written, before anything is done for them.

    Raises:
        ValueError: another ending than .png, .html or .npz.
        OSError: no such folder.
    """
    for path in paths:
        if path.suffix.lower() not in ENDINGS:
            raise ValueError(f"{path}: explanations are written as {', '.join(ENDINGS)}; give one of these endings")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")


def _levels(map_HW: np.ndarray) -> list[int]:
    most = float(map_HW.max())
    return (map_HW / (most if most > 0 else 1) * LEVELS).round().astype(int).flatten().tolist()


def _data_url(image: Image.Image) -> str:
    if max(image.size) > LARGEST_SIDE:
        image = fit(image, LARGEST_SIDE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if image.width * image.height <= LARGEST_SIDE**2 // 16 else "JPEG", quality=88)
    kind = "png" if buffer.getvalue()[:4] == b"\x89PNG" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


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

"""Explanations as files: a picture, a page to look around in, or arrays."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from ..checkpoints.files import replace_file, write_whole
from .explanation import Explanation
from .heat import HEAT_STOPS, fit, lay_over, panels

TEMPLATE = Path(__file__).with_name("explanation.html.jinja")
ENDINGS = (".png", ".html", ".npz")
PARTS = ("query", "head")
LARGEST_SIDE = 1024  # pixels of an image within a page
LEVELS = 1000  # of a map within a page


def save(
    explanation: Explanation, path: str | os.PathLike[str], per: str | None = None, layers: list[str] | None = None
) -> Path:
    """Write an explanation; the file appears whole or not at all.

    Args:
        path: its ending decides: .png, .html or .npz.
        per: "query" or "head": in a picture, EmbQ's attention of each besides the mean; "head" adds the heads to a
            page, too. Arrays always hold all.
        layers: which to show, in this order; default all that the model has.

    Raises:
        ValueError: an unknown ending, layer or part.
    """
    path = Path(path)
    if per is not None and per not in PARTS:
        raise ValueError(f"per is {per!r}; use {' or '.join(PARTS)}")
    layers = list(explanation.layers) if layers is None else layers
    for layer in layers:
        if layer not in explanation.layers:
            raise ValueError(f"there is no layer {layer!r}; this model has {', '.join(explanation.layers)}")
    check_endings([path])
    match path.suffix.lower():
        case ".png":
            picture = draw(explanation, per, layers)
            replace_file(path, lambda staging: picture.save(staging, format="PNG"))
        case ".html":
            write_whole(path, page(explanation, layers, heads=per == "head"))
        case _:
            replace_file(path, lambda staging: _write_arrays(explanation, staging))
    return path


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


def draw(explanation: Explanation, per: str | None = None, layers: list[str] | None = None) -> Image.Image:
    """A picture: a row for each image, with the layers side by side; as `save`."""
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = []
    for number, image in enumerate(explanation.images):
        small = fit(image)
        shown = [("image", small)]
        for layer in layers or explanation.layers:
            shown.append(
                (f"{layer}: {explanation.layers[layer]}", lay_over(small, explanation.over_image(layer, number)))
            )
        headline = f"{explanation.question}  {explanation.answer}" if number == 0 else f"image {number + 1}"
        rows.append((headline, shown))
        if per is not None and explanation.maps.image_HQIVRC is not None:
            count = explanation.maps.image_HQIVRC.shape[PARTS.index(per) ^ 1]
            parts = [
                (f"{per} {part}", lay_over(small, explanation.over_image("embq", number, **{per: part})))
                for part in range(count)
            ]
            width = len(shown)
            rows += [(f"EmbQ, per {per}", parts[first : first + width]) for first in range(0, count, width)]
    return panels(rows)


def page(explanation: Explanation, layers: list[str] | None = None, heads: bool = False) -> str:
    """A page of HTML that needs nothing else: layers to switch, words to point at."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent), undefined=jinja2.StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template(TEMPLATE.name)
    return template.render(data=page_data(explanation, layers, heads), layers=layers or list(explanation.layers))


def page_data(explanation: Explanation, layers: list[str] | None = None, heads: bool = False) -> dict[str, Any]:
    """What the page draws, as plain values."""
    layers = layers or list(explanation.layers)
    maps = explanation.maps
    queries = 0 if maps.image_HQIVRC is None else maps.image_HQIVRC.shape[1]
    images = []
    for number, image in enumerate(explanation.images):
        own: dict[str, Any] = {layer: _levels(explanation.over_image(layer, number)) for layer in layers}
        if "embq" in layers:
            own["queries"] = [_levels(explanation.over_image("embq", number, query=query)) for query in range(queries)]
            own["words"] = [
                _levels(explanation.over_image("embq", number, word=word))
                for word in range(len(explanation.question_words) if maps.question_HQT is not None else 0)
            ]
            if heads and maps.image_HQIVRC is not None:
                every = range(maps.image_HQIVRC.shape[0])
                own["heads"] = [_levels(explanation.over_image("embq", number, head=head)) for head in every]
        if "decoder" in layers:
            words = range(len(explanation.answer_words))
            own["answer"] = [_levels(explanation.over_image("decoder", number, word=word)) for word in words]
        images.append({"source": _data_url(image), "width": image.width, "height": image.height, "maps": own})
    return {
        "question": explanation.question,
        "answer": explanation.answer,
        "question_words": [word.text for word in explanation.question_words],
        "question_weights": explanation.word_weights(),
        "answer_words": [word.text for word in explanation.answer_words],
        "layers": {layer: explanation.layers[layer] for layer in layers},
        "visual_tokens": explanation.visual_tokens,
        "probability": explanation.probability,
        "stops": HEAT_STOPS,
        "levels": LEVELS,
        "cells": explanation.cells,
        "images": images,
    }


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


def _write_arrays(explanation: Explanation, path: Path) -> None:
    maps = explanation.maps
    arrays: dict[str, Any] = {
        "sap_weights": maps.pooling_IVRC,
        "embq_image_attention": maps.image_HQIVRC,
        "embq_question_attention": maps.question_HQT,
        "decoder_attention": maps.decoder_LHAN,
        "decoder_on_grid": maps.decoder_AIVRC,
        "log_probabilities": maps.log_probabilities_A,
        "question_ids": np.array(maps.question_ids),
        "answer_ids": np.array(maps.answer_ids),
        "question_words": np.array([word.text for word in explanation.question_words]),
        "question": np.array(explanation.question),
        "answer": np.array(explanation.answer),
        "view_rectangles": np.array(explanation.rectangles),
        "image_sizes": np.array([image.size for image in explanation.images]),
    }
    for layer in explanation.layers:
        for number in range(len(explanation.images)):
            arrays[f"{layer}_over_image_{number}"] = explanation.over_image(layer, number)
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: array for name, array in arrays.items() if array is not None})

"""What an exported folder says about itself: files, sizes, prompt, pixels, generation.

The exporter writes these classes as JSON, the runtime reads them. A field that is added needs a default, or a new
`FORMAT_VERSION`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST_NAME = "flashsloth_export.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Port:
    """One input or output of a graph: `shape` holds sizes, and names where a size may differ from call to call."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class Graph:
    """A file with a graph, relative to the folder."""

    file: str
    inputs: list[Port]
    outputs: list[Port]


@dataclass(frozen=True)
class Sizes:
    """Numbers of the model.

    Attributes:
        views, channels, height, width: of the pixels of one image.
        patches: un-pooled features of one image, all its views.
        visual_tokens: visual tokens of one image where a question does not choose.
        visual_token_choices: all numbers of them that the graphs can make.
        query_tokens: learned queries of a turn, 0 for a model without.
        context: longest prompt and answer together.
        cache: (heads, width) of every tensor of the key-value cache: keys and values of each layer in turn.
    """

    views: int
    channels: int
    height: int
    width: int
    patches: int
    feature_width: int
    text_width: int
    visual_tokens: int
    visual_token_choices: list[int]
    query_tokens: int
    context: int
    cache: list[list[int]]


@dataclass(frozen=True)
class PromptLayout:
    """The chat template, cut into the pieces between what users write.

    A prompt is an opening, images (written once for every image of the first turn), the turns, and the ending of the
    last question. What comes before images or the first question is a pair: with images, and without.

    Attributes:
        default_opening: where the user gives no system prompt. empty_opening: where it is empty.
        takes_system: whether there may be one. system_start, system_end: around one that is not empty.
        image: an image. image_separator: between images. image_end: between the last image and the question.
        question_end: between the last question and the answer that is asked for.
        question_to_answer, answer_to_question: between earlier questions and answers.
        strips: the template removes white space around what users write.
        image_token, query_token, question_marker, user_header: as in the processor.
        image_token_id, query_token_id: of the placeholders.
        prefix_ids: what the tokenizer puts before a text.
        opens_texts: as in `tokenize_pieces`.
        limit: longest prompt that the tokenizer takes; None where it has no limit of its own.
    """

    default_opening: list[str]
    empty_opening: list[str]
    takes_system: bool
    system_start: str
    system_end: list[str]
    image: str
    image_separator: str
    image_end: str
    question_end: str
    question_to_answer: str
    answer_to_question: str
    strips: bool
    image_token: str
    query_token: str
    question_marker: str
    user_header: str
    image_token_id: int
    query_token_id: int | None
    prefix_ids: list[int]
    opens_texts: bool
    limit: int | None


@dataclass(frozen=True)
class ImageSettings:
    """Settings of the image processor; see `FlashSlothImageProcessor`."""

    view_grid: list[int] | None
    do_pad: bool
    resample: int
    rescale_factor: float | None
    mean: list[float] | None
    std: list[float] | None
    padding_color: list[int]
    alpha_background: list[int] | None
    max_pixels: int
    max_bytes: int


@dataclass(frozen=True)
class Generation:
    """How answers are made where a question does not say it."""

    eos_token_ids: list[int]
    pad_token_id: int
    suppress_tokens: list[int]
    max_new_tokens: int | None
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True)
class Manifest:
    """All of it.

    Attributes:
        format: "onnx" or "openvino". weights: how weights are held: float32, float16, int8 or int4.
        versions: of the libraries that wrote the folder. check: what the comparison with the original gave.
    """

    format_version: int
    format: str
    weights: str
    source: str
    versions: dict[str, str]
    vision: Graph
    decoder: Graph
    sizes: Sizes
    prompt: PromptLayout
    images: ImageSettings
    generation: Generation
    check: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder.

    Raises:
        FileNotFoundError: no such folder, or it was not exported.
        ValueError: a manifest that is broken or of another version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} was not exported (it has no {MANIFEST_NAME}); write one with `flashsloth export MODEL {folder}`"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} is of version {version}, this runtime reads version {FORMAT_VERSION}; export the model again "
                "with the release you run"
            )
        return _build(Manifest, values)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no manifest of an exported model: {error!r}; export the model again") from error


_PARTS: dict[str, Any] = {
    "vision": Graph,
    "decoder": Graph,
    "sizes": Sizes,
    "prompt": PromptLayout,
    "images": ImageSettings,
    "generation": Generation,
}


def _build(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass from JSON; keys of later releases are left out."""
    known = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in values.items() if name in known}
    if kind is Manifest:
        values |= {name: _build(part, values[name]) for name, part in _PARTS.items()}
    if kind is Graph:
        values |= {side: [Port(**port) for port in values[side]] for side in ("inputs", "outputs")}
    return kind(**values)

"""The static tier of the bench: what models cost by arithmetic alone, for given images, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flashsloth.checkpoints.loading import DTYPES

from .counted import Counted, Memory, count, dissect
from .memory import cache_bytes_per_token
from .models import MODELS, Origin, model_named
from .results import Settings

DEFAULT_SIZES = ((384, 384), (768, 768), (1024, 768), (1344, 1344))


@dataclass(frozen=True)
class ImageCost:
    """What an image of a size costs.

    Attributes:
        width, height: of the image in pixels.
        one: operations and tokens of one prompt with one image; its answer is one token.
        memory: of the batch.
    """

    width: int
    height: int
    one: Counted
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values with totals, for JSON."""
        flops = dict(zip(("vision", "compressor", "prefill"), self.one.flops.values(), strict=True))
        return {
            "width": self.width,
            "height": self.height,
            "views": self.one.image.views,
            "patches": self.one.image.patches,
            "visual_tokens": self.one.image.tokens,
            "prompt_tokens": self.one.prompt_tokens,
            "flops": {
                **flops, "decode_token": self.one.decode_flops, "to_first_token": self.one.first_token_flops
            },
            "memory": {**asdict(self.memory), "total": self.memory.total},
        }  # fmt: skip


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Attributes:
        name, title, origin, notes: see `models.BenchModel`.
        parameters: by part, see `counted.PARTS`; a part that is tied to an earlier one counts nothing.
        published_parameters: where a published count could be found.
        cache_bytes_per_token: keys and values of one more token.
        decode_bytes: weights read to make one token.
        visual_token_choices: see `anatomy.Anatomy`; all costs are those of the first.
        images: one entry per size.
    """

    name: str
    title: str
    origin: Origin
    notes: str
    parameters: dict[str, int]
    published_parameters: int | None
    cache_bytes_per_token: int
    decode_bytes: int
    visual_token_choices: list[int]
    images: list[ImageCost]

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values with totals, for JSON."""
        plain = {name: value for name, value in vars(self).items() if name != "images"}
        return {
            **plain, "images": [image.to_dict() for image in self.images], "total_parameters": self.total_parameters
        }  # fmt: skip


def measure(name: str, sizes: Sequence[tuple[int, int]], text_tokens: int, dtype: str, batch: int = 1) -> ModelCost:
    """Counts a model's tokens, parameters, operations and bytes. No memory is taken for weights.

    Args:
        name: key of `models.MODELS`.
        sizes: (width, height) of images in pixels.
        text_tokens: of the prompt beside the image.
        dtype: key of `checkpoints.loading.DTYPES`.
        batch: prompts at a time, one image each; only memory depends on it.

    Raises:
        ValueError: an unknown model or dtype, or a model that this version of transformers lacks.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; known are {', '.join(DTYPES)}.")
    entry, element = model_named(name), DTYPES[dtype].itemsize
    if not entry.available:
        entry.build()  # says which class is missing
    dissected, images = dissect(entry), []
    for width, height in sizes:
        one = Settings(name, width, height, text_tokens=text_tokens, output_tokens=1, dtype=dtype)
        single, many = count(one), count(replace(one, batch=batch))
        assert single is not None and many is not None, "model and dtype are known"
        images.append(ImageCost(width, height, single, many.memory))
    return ModelCost(
        name=name,
        title=entry.title,
        origin=entry.origin,
        notes=entry.notes,
        parameters=dissected.parameters,
        published_parameters=entry.published_parameters,
        cache_bytes_per_token=cache_bytes_per_token(dissected.anatomy.text_config, element),
        decode_bytes=element * dissected.weights["prefill"],
        visual_token_choices=list(dissected.anatomy.visual_token_choices),
        images=images,
    )


def available_models() -> list[str]:
    """Names of the models that the installed transformers can build."""
    return [name for name, model in MODELS.items() if model.available]


def measure_all(
    names: Sequence[str] | None,
    sizes: Sequence[tuple[int, int]],
    text_tokens: int,
    dtype: str,
    batch: int = 1,
    progress: Callable[[str], None] = lambda name: None,
) -> list[ModelCost]:
    """`measure` for several models; None takes all that the installed transformers can build.

    All names are checked before the first model is built. `progress` is called with each name before its turn.
    """
    chosen = list(dict.fromkeys(available_models() if names is None else names))
    for name in chosen:
        model_named(name)
    costs = []
    for name in chosen:
        progress(name)
        costs.append(measure(name, sizes, text_tokens, dtype, batch))
    return costs

"""Sizes of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..model.configuration_flashsloth import FlashSlothConfig
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration

BYTES_OF_HALF = 2


@dataclass(frozen=True)
class Part:
    """A part of the model; parameters shared with an earlier part are not counted again."""

    name: str
    description: str
    parameters: int


@dataclass(frozen=True)
class Summary:
    """Sizes of a model.

    Attributes:
        parts: in forward order.
        views: how an image becomes views, in words.
        visual_tokens, uncompressed_tokens: per image, all views.
        visual_token_choices: what a request may choose, with the window of each.
        weight_bytes: by number format; "int8" keeps what is no linear layer at 16 bits.
        cache_bytes_per_token: keys and values at 16 bits.
    """

    parts: list[Part]
    views: str
    visual_tokens: int
    uncompressed_tokens: int
    visual_token_choices: dict[int, int]
    weight_bytes: dict[str, int]
    cache_bytes_per_token: int

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "parameters": self.parameters}


def summarize(config: FlashSlothConfig, image_size: tuple[int, int] | None = None) -> Summary:
    """Counts a model's parameters, tokens and bytes without making its weights.

    Args:
        config: of the model.
        image_size: (width, height) in pixels of an image to describe the views of. The number of visual tokens does
            not depend on it.
    """
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(config)
        model.tie_weights()
    base = model.model
    modules: dict[str, nn.Module | None] = {
        "vision_tower": base.vision_tower,
        "compressor": base.compressor,
        "projector": base.projector,
        "query_tokens": base.query_tokens,
        "language_model": base.language_model,
        "embedded_query": base.embedded_query,
        "lm_head": model.lm_head,
    }
    descriptions = _descriptions(config)
    seen: set[nn.Parameter] = set()
    parts = []
    for name, module in modules.items():
        if module is not None:
            fresh = set(module.parameters()) - seen
            seen |= fresh
            parts.append(Part(name, descriptions[name], sum(parameter.numel() for parameter in fresh)))
    total = sum(part.parameters for part in parts)
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    in_linear = sum(weight.numel() for weight in linear - embeddings)
    return Summary(
        parts=parts,
        views=_views(config, image_size),
        visual_tokens=config.num_image_tokens,
        uncompressed_tokens=config.num_views * config.num_patches_per_view,
        visual_token_choices=config.visual_token_choices,
        weight_bytes={
            "float32": 4 * total,
            "bfloat16": BYTES_OF_HALF * total,
            "int8": in_linear + BYTES_OF_HALF * (total - in_linear),
        },
        cache_bytes_per_token=_cache_bytes(config),
    )


def _descriptions(config: FlashSlothConfig) -> dict[str, str]:
    vision, text = config.vision_config, config.text_config
    grid = f"{config.grid_height} x {config.grid_width}"
    window = config.effective_window
    pooled = f"{-(-config.grid_height // window)} x {-(-config.grid_width // window)}"
    return {
        "vision_tower": f"{vision.model_type}, hidden state {config.vision_feature_layer}, {grid} patches x "
        f"{vision.hidden_size}",
        "compressor": f"{config.compressor}, window {window}: {grid} -> {pooled}",
        "projector": f"{vision.hidden_size} -> {text.hidden_size}",
        "query_tokens": f"{config.num_query_tokens} x {text.hidden_size}",
        "language_model": f"{text.model_type}, {text.num_hidden_layers} layers x {text.hidden_size}",
        "embedded_query": f"before layer {config.embedded_query_layer}, width {config.embedded_query_hidden_size}, "
        f"{config.embedded_query_num_heads} heads",
        "lm_head": "tied to the embeddings" if config.tie_word_embeddings else f"{text.vocab_size} tokens",
    }


def _views(config: FlashSlothConfig, image_size: tuple[int, int] | None) -> str:
    width, height = config.image_width, config.image_height
    image = "an image of any size" if image_size is None else f"an image of {image_size[0]} x {image_size[1]}"
    text = f"{image} is resized to {width} x {height}"
    if config.view_grid is not None:
        rows, columns = config.view_grid
        text += (
            f", and again, padded to a square, to {columns * width} x {rows * height} and cut into {rows} x {columns} "
            f"tiles: {config.num_views} views"
        )
    return text


def _cache_bytes(config: FlashSlothConfig) -> int:
    text = config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_width * BYTES_OF_HALF

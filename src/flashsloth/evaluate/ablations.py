"""Parts of a loaded model taken out or replaced, to see what they carry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.compressors import COMPRESSORS
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration


@contextmanager
def zeroed_embedded_query(model: FlashSlothForConditionalGeneration) -> Iterator[None]:
    """Inside, the embedded query module adds nothing to the query tokens.

    Raises:
        ValueError: the model has no such module.
    """
    if model.model.embedded_query is None:
        raise ValueError("the model has no embedded query module to zero (num_query_tokens is 0)")

    def add_nothing(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    # the update of the queries is the output of the last linear layer
    handle = model.model.embedded_query.up_projection.register_forward_hook(add_nothing)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_compressor(model: FlashSlothForConditionalGeneration, name: str) -> Iterator[None]:
    """Inside, another compressor stands in place of the trained one, without retraining.

    Raises:
        ValueError: unknown name, or one whose tokens do not fit the projector and the prompt.
    """
    if name not in COMPRESSORS:
        raise ValueError(f"unknown compressor {name!r}; known are {', '.join(COMPRESSORS)}")
    config = model.config
    other = COMPRESSORS[name](config.vision_config.hidden_size, config.compressor_window, 0.0)
    original = model.model.compressor
    if other.out_features != original.out_features or other.uses_window != original.uses_window:
        raise ValueError(f"compressor {name!r} gives other tokens than {config.compressor!r}; it needs retraining")
    model.model.compressor = other.to(model.device, model.dtype).eval()
    try:
        yield
    finally:
        model.model.compressor = original

"""Memory of weights, keys and values, and activations. Sizes are in elements or bytes, as the name says.

Activations are an estimate of what is alive at the widest point of plain inference: fused attention (no table of
scores), one layer at a time, nothing kept for a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import NewGELUActivation, QuickGELUActivation

from .arithmetic import SLIDING, head_dim, layer_types

# activations written as several operations keep more copies of their input alive
_EXTRA_COPIES: dict[type[nn.Module], int] = {NewGELUActivation: 2, QuickGELUActivation: 1}
_STATE_BYTES = 4  # the recurrent state of the gated delta rule is kept in float32


def count_parameters(modules: Sequence[nn.Module], seen: set[nn.Parameter]) -> int:
    """Elements of the parameters below the modules that are not in `seen`, to which they are added."""
    fresh = {parameter for module in modules for parameter in module.parameters()} - seen
    seen |= fresh
    return sum(parameter.numel() for parameter in fresh)


def cache_bytes(config: PreTrainedConfig, positions: int, element: int) -> int:
    """Keys, values and recurrent states of one sequence.

    Args:
        config: of the language model.
        positions: tokens in the cache; layers with a sliding window keep no more than their window.
        element: bytes of one number.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_position = 2 * heads * head_dim(config) * element
    total = 0
    for kind in layer_types(config):
        if kind == "linear_attention":
            keys = config.linear_num_key_heads * config.linear_key_head_dim
            values = config.linear_num_value_heads * config.linear_value_head_dim
            total += (2 * keys + values) * config.linear_conv_kernel_dim * element
            total += values * config.linear_key_head_dim * _STATE_BYTES
        elif kind == "conv":
            total += config.hidden_size * config.conv_L_cache * element
        elif kind == SLIDING:
            total += per_position * min(positions, config.sliding_window)
        else:
            total += per_position * positions
    return total


def cache_bytes_per_token(config: PreTrainedConfig, element: int) -> int:
    """What one more token adds to the cache while no window is full."""
    return cache_bytes(config, 1, element) - cache_bytes(config, 0, element)


def widest_block_elements(layer: nn.Module, hidden_size: int) -> int:
    """Elements alive per position at the widest point of a transformer layer.

    Beside the residual stream and its normed copy these are queries, keys, values and the attention's output, or the
    inner activations of the MLP: two of its width, with a gate three.

    Args:
        layer: of a decoder or encoder.
        hidden_size: width of the residual stream.
    """
    widest = 0
    for parent in layer.modules():
        linears = [m for m in parent.children() if isinstance(m, nn.Linear)]
        if len(linears) > 1:
            # what all but the output projection make, and the input of that
            made, read = sum(m.out_features for m in linears) - hidden_size, max(m.in_features for m in linears)
            extra = sum(_EXTRA_COPIES.get(type(m), 0) for m in parent.children())
            widest = max(widest, made + read * (1 + extra))
    return 2 * hidden_size + widest


def feature_map_elements(tower: nn.Module, shape: Sequence[int]) -> int:
    """Elements alive at the widest point of a convolutional encoder: input and output of its widest leaf module.

    Args:
        tower: on the meta device.
        shape: of its input.
    """
    widest = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal widest
        widest = max(widest, inputs[0].numel() + output.numel())

    handles = [m.register_forward_hook(hook) for m in tower.modules() if not any(m.children())]
    with torch.no_grad():
        tower(torch.empty(*shape, device="meta"))
    for handle in handles:
        handle.remove()
    return widest

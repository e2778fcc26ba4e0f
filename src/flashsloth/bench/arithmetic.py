"""Floating-point operations of the parts of a model, from its modules (which may be on the meta device).

Conventions: a multiply-add is two operations; attention is charged for every pair of a query and a key, also where a
causal or sliding mask hides it; only matrix products and convolutions count. `torch.utils.flop_counter` does the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from flashsloth.model.embedded_query import EmbeddedQuery

# length of the blocks in which transformers runs the gated delta rule over a prompt
DELTA_RULE_CHUNK = 64
_MATRICES = (nn.Linear, nn.Conv2d, nn.Conv3d)
SLIDING = "sliding_attention"


def matrix_weights(modules: nn.Module | Iterable[nn.Module]) -> int:
    """Elements of the weights of all linear layers and patch convolutions; each is used once at every position."""
    roots = [modules] if isinstance(modules, nn.Module) else list(modules)
    return sum(m.weight.numel() for root in roots for m in root.modules() if isinstance(m, _MATRICES))


def matrix_flops(modules: nn.Module | Iterable[nn.Module], positions: int) -> int:
    """Operations of all linear layers below the modules, run at so many positions."""
    return 2 * matrix_weights(modules) * positions


def attention_flops(queries: int, keys: int, key_width: int, value_width: int | None = None) -> int:
    """Operations of the two products of attention; widths are those of all heads together."""
    return 2 * queries * keys * (key_width + (key_width if value_width is None else value_width))


def encoder_flops(layers: Sequence[nn.Module], lengths: Iterable[int], width: int) -> int:
    """Operations of transformer layers in which each of the given sequences attends to itself."""
    weights = matrix_weights(layers)
    return sum(2 * weights * length + len(layers) * attention_flops(length, length, width) for length in lengths)


def window_lengths(rows: int, columns: int, window: int) -> list[int]:
    """Positions in each window of a grid; those at the right and bottom edges may be smaller."""
    heights = [min(window, rows - start) for start in range(0, rows, window)]
    widths = [min(window, columns - start) for start in range(0, columns, window)]
    return [height * width for height in heights for width in widths]


def counted_flops(module: nn.Module, *shapes: Sequence[int]) -> int:
    """Operations of one forward pass, counted on the meta device.

    Args:
        module: its parameters must be on the meta device.
        shapes: of its float inputs.
    """
    inputs = [torch.empty(*shape, device="meta") for shape in shapes]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    return counter.get_total_flops()


def embedded_query_flops(module: EmbeddedQuery, queries: int, prompt: int, patches: int) -> int:
    """Operations of the embedded query module for one group of queries.

    Args:
        queries: learned queries of the group.
        prompt: positions of the whole prompt; all are projected, so that the question's can be read.
        patches: un-pooled features of all views.
    """
    image = module.image_attention
    flops = matrix_flops(module.down_projection_text, prompt)
    flops += matrix_flops(module.down_projection_image, patches)
    if module.text_attention is not None:
        text = module.text_attention
        flops += matrix_flops([text.key, text.value], prompt) + matrix_flops(text.query, queries)
        flops += attention_flops(queries, prompt, text.key.out_features, text.value.out_features)
    flops += matrix_flops([image.key, image.value], patches) + matrix_flops(image.query, queries)
    flops += attention_flops(queries, patches, image.key.out_features, image.value.out_features)
    return flops + matrix_flops(module.up_projection, queries)


def head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head of a language model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_types(config: PreTrainedConfig) -> list[str]:
    """What mixes positions in each decoder layer, in the words of transformers."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def _short_convolution_flops(layer: nn.Module, positions: int) -> int:
    """Causal depthwise convolutions; transformers pads the sequence on both sides and drops the end."""
    return sum(
        2 * m.weight.numel() * (positions + m.kernel_size[0] - 1) for m in layer.modules() if isinstance(m, nn.Conv1d)
    )


def _delta_rule_flops(config: PreTrainedConfig, positions: int) -> int:
    """Gated delta rule over a prompt, in chunks: inside a chunk pairs of positions, between chunks a state.

    The triangular system of a chunk is solved by substitution, which the counter does not see and is left out here.
    """
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    chunk = DELTA_RULE_CHUNK
    inside = 2 * chunk * chunk * (2 * keys + values)
    through_state = 3 * 2 * chunk * keys * values
    return config.linear_num_value_heads * -(-positions // chunk) * (inside + through_state)


def prefill_flops(layers: Sequence[nn.Module], config: PreTrainedConfig, head: nn.Module, positions: int) -> int:
    """Operations of the language model over a prompt, with its head at the last position only.

    Args:
        layers: decoder layers.
        config: of the language model.
        head: from hidden state to logits.
        positions: prompt tokens.
    """
    width = config.num_attention_heads * head_dim(config)
    flops = matrix_flops(layers, positions) + matrix_flops(head, 1)
    for layer, kind in zip(layers, layer_types(config), strict=True):
        if kind == "linear_attention":
            flops += _short_convolution_flops(layer, positions) + _delta_rule_flops(config, positions)
        elif kind == "conv":
            flops += _short_convolution_flops(layer, positions)
        else:
            flops += attention_flops(positions, positions, width)
    return flops


def decode_flops(layers: Sequence[nn.Module], config: PreTrainedConfig, head: nn.Module, context: int) -> int:
    """Operations of one more token after a context of so many, itself included."""
    width = config.num_attention_heads * head_dim(config)
    window = getattr(config, "sliding_window", None) or context
    flops = matrix_flops([*layers, head], 1)
    for layer, kind in zip(layers, layer_types(config), strict=True):
        if kind == "linear_attention":
            # the state is read for the correction, updated, and read for the output
            state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
            flops += 3 * 2 * state
        elif kind == SLIDING:
            flops += attention_flops(1, min(context, window), width)
        elif kind != "conv":
            flops += attention_flops(1, context, width)
        flops += sum(2 * m.weight.numel() for m in layer.modules() if isinstance(m, nn.Conv1d))
    return flops

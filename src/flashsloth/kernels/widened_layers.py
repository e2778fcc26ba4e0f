"""Layers held in 16 bits or 8 and multiplied in float32, for processors without kernels for such products.

    widen_(model)

Those processors (x86 without AVX-512, and all but the latest in float16) multiply prompts in bfloat16 several times
slower than in float32. Here the weights stay as they are; a few rows of them at a time become float32 in the cache.

Shape suffixes: B rows (all leading dimensions), K values read, N values written, H heads, T positions, W width of a
head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .opaque_products import opaque

WIDENED_ATTENTION = "widened"
WIDENED_DTYPES = (torch.bfloat16, torch.float16)
_CHUNK = 2**20  # weights widened at a time: they stay in the cache until they are multiplied
# with fewer rows, reading the weights takes the time, and PyTorch's own products read them once for each row
FEW_ROWS = 8


def refuse_gradient(values: Tensor) -> None:
    """Refuse to be trained.

    Raises:
        RuntimeError: a gradient is wanted.
    """
    if values.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("this model was packed for answering and cannot be trained; load it with kernels='torch'")


def _widened_product(values_BK: Tensor, weight_NK: Tensor) -> Tensor:
    result_BN = torch.empty(len(values_BK), len(weight_NK))
    rows = max(1, _CHUNK // weight_NK.shape[1])
    buffer_NK = torch.empty(min(rows, len(weight_NK)), weight_NK.shape[1])
    for start in range(0, len(weight_NK), rows):
        some_NK = weight_NK[start : start + rows]
        wide_NK = buffer_NK[: len(some_NK)].copy_(some_NK)
        torch.mm(values_BK, wide_NK.t(), out=result_BN[:, start : start + rows])
    return result_BN


_product = opaque(
    "widened_product(Tensor values_BK, Tensor weight_NK) -> Tensor",
    _widened_product,
    lambda values_BK, weight_NK: values_BK.new_empty(values_BK.shape[0], weight_NK.shape[0]),
)


def widened_product(values_BK: Tensor, weight_NK: Tensor) -> Tensor:
    """The product (B, N) in float32 of float32 values and a weight in any number format."""
    return _product(values_BK, weight_NK)


class WidenedLinear(nn.Module):
    """A linear layer in 16 bits that multiplies in float32.

    Args:
        linear: on a CPU; its parameters are shared.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, values: Tensor) -> Tensor:
        """(..., K) to (..., N) of the same dtype.

        Raises:
            RuntimeError: a gradient is wanted.
        """
        refuse_gradient(values)
        shape = values.shape[:-1]
        if shape.numel() < FEW_ROWS:
            return functional.linear(values, self.weight, self.bias)
        result_BN = widened_product(values.reshape(-1, self.in_features).float(), self.weight.detach())
        if self.bias is not None:
            result_BN.add_(self.bias.detach())
        return result_BN.to(values.dtype).view(*shape, self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class WidenedConv2d(nn.Module):
    """A convolution in 16 bits, such as an encoder's patch embedding, computed in float32.

    Args:
        convolution: on a CPU, padded with zeros; its parameters are shared.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.settings = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)

    def forward(self, pixels: Tensor) -> Tensor:
        """As the convolution."""
        bias = None if self.bias is None else self.bias.float()
        return functional.conv2d(pixels.float(), self.weight.float(), bias, *self.settings).to(pixels.dtype)


def widened_attention(
    module: nn.Module,
    query_BHTW: Tensor,
    key_BHTW: Tensor,
    value_BHTW: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """PyTorch's fused attention in float32, of inputs in any number format.

    Returns:
        (B, T, H, W) in the dtype of the query, and None for the weights.
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    wide = (query_BHTW.float(), key_BHTW.float(), value_BHTW.float())
    mixed_BTHW, _ = sdpa_attention_forward(module, *wide, attention_mask, **kwargs)
    return mixed_BTHW.to(query_BHTW.dtype), None


def widen_(model: nn.Module) -> int:
    """Replace the linear layers and convolutions of a model in 16 bits, in place.

    Returns:
        number of layers replaced.
    """
    replaced = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            layer = _wide_form(child)
            if layer is not None:
                setattr(module, name, layer)
                replaced += 1
    return replaced


def _wide_form(layer: nn.Module) -> nn.Module | None:
    if type(layer) is nn.Linear and type(layer.weight.data) is Tensor and layer.weight.dtype in WIDENED_DTYPES:
        return WidenedLinear(layer)
    if type(layer) is nn.Conv2d and layer.weight.dtype in WIDENED_DTYPES and layer.padding_mode == "zeros":
        return WidenedConv2d(layer)
    return None


AttentionInterface.register(WIDENED_ATTENTION, widened_attention)
AttentionMaskInterface.register(WIDENED_ATTENTION, sdpa_mask)

"""A linear layer with 8-bit weights and activations, multiplied by the integer kernels of CPUs that have them.

Shape suffixes: B rows (all leading dimensions), T positions, K values read, N values written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .opaque_products import opaque
from .widened_layers import FEW_ROWS, widened_product

SMALLEST_INT8, LARGEST_INT8 = -128, 127
_PRODUCT_DTYPES = (torch.float32, torch.bfloat16)
_CHUNK = 2**22  # numbers rounded at a time
_ZERO_POINT = 128  # oneDNN multiplies unsigned activations by signed weights
_LANES = 32  # numbers that PyTorch's product of bfloat16 and int8 reads at a time, past the end of a row if need be


def onednn_available() -> bool:
    """Whether oneDNN multiplies integers here exactly: processors without VNNI add pairs of products in 16 bits."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


class Int8Linear(nn.Module):
    """`nn.Linear` with weights in int8, one scale an output, and activations rounded to int8, one scale a row.

    The weights are read as they are, a byte each; nothing is converted back to floats.

    Args:
        weight_NK: int8.
        scale_N: float; what one step of each row stands for.
        bias_N: added at the end.
    """

    def __init__(self, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self.scale = nn.Parameter(scale_N.detach().float().contiguous(), requires_grad=False)
        self.bias = None if bias_N is None else nn.Parameter(bias_N.detach(), requires_grad=False)
        self.shared: SharedRounding | None = None
        self.packed: Tensor | None = None
        if onednn_available():
            # not a buffer: an opaque tensor cannot be moved or cast
            self.packed = torch.ops.onednn.qlinear_prepack(weight_NK.detach().contiguous(), None)
            self.register_buffer("zero_points", torch.zeros(self.out_features, dtype=torch.int32), persistent=False)
        else:
            self.weight = nn.Parameter(weight_NK.detach(), requires_grad=False)

    @classmethod
    def from_float(cls, linear: nn.Linear) -> Int8Linear:
        """Quantizes a layer on a CPU."""
        weight_NK, scale_N1 = _round_to_int8(linear.weight.detach())
        return cls(weight_NK, scale_N1.flatten(), linear.bias)

    @classmethod
    def from_torchao(cls, linear: nn.Linear) -> Int8Linear | None:
        """The same numbers as a layer that torchao quantized to int8-dynamic; None for any other."""
        weight: Any = linear.weight
        if getattr(weight, "act_quant_kwargs", None) is None or getattr(weight, "qdata", None) is None:
            return None
        if weight.qdata.dtype != torch.int8 or weight.scale.numel() != linear.out_features:
            return None
        return cls(weight.qdata, weight.scale.flatten(), linear.bias)

    def forward(self, values: Tensor) -> Tensor:
        """(..., K) float to (..., N) of the same dtype."""
        if self.packed is None:
            rounded_BK, scale_B1 = _round_to_int8(values.reshape(-1, self.in_features))
            products_BN = self._products_of_floats(rounded_BK, values.dtype) * (scale_B1 * self.scale)
            result = products_BN.to(values.dtype).view(*values.shape[:-1], self.out_features)
            return result if self.bias is None else result + self.bias
        dtype = values.dtype if values.dtype in _PRODUCT_DTYPES else torch.float32
        rounded_BK, scale_B1 = self.round(values) if self.shared is None else self.shared.take(self, values)
        result_BN = _product(rounded_BK, self.packed, self.scale, self.zero_points, dtype).to(values.dtype)
        scale_B1 = scale_B1.to(values.dtype)
        if self.bias is None:
            result_BN.mul_(scale_B1)
        else:
            torch.addcmul(self.bias, result_BN, scale_B1, out=result_BN)
        return result_BN.view(*values.shape[:-1], self.out_features)

    def _products_of_floats(self, rounded_BK: Tensor, dtype: torch.dtype) -> Tensor:
        """Products of integers (B, N), in floats that hold them; few rows for bfloat16 are rounded to it."""
        few = len(rounded_BK) < FEW_ROWS and not (self.in_features % _LANES or self.out_features % _LANES)
        if few and dtype == torch.bfloat16:
            ones_N = torch.ones(self.out_features, dtype=dtype)
            return torch._weight_int8pack_mm(rounded_BK.to(dtype), self.weight, ones_N)
        return widened_product(rounded_BK.float(), self.weight)

    def round(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs as (B, K) uint8 above the zero point, and scales (B, 1)."""
        rounded_BK, scale_B1 = _round_to_int8(values.reshape(-1, self.in_features))
        # the sign bit turned over is the same number above a zero point of 128
        return rounded_BK.view(torch.uint8).bitwise_xor_(_ZERO_POINT), scale_B1

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("these int8 layers live in memory only; write a folder with flashsloth quantize instead")


class PromptAndTokenLinear(nn.Module):
    """One layer in two forms: int8 products where prompts make the time, fewer bits where reading weights does.

    Which is used depends on the positions of a row alone, never on how many rows there are.

    Args:
        prompt: for several positions at a time.
        token: for one, a step of an answer.
    """

    def __init__(self, prompt: Int8Linear, token: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = prompt.in_features, prompt.out_features
        self.prompt, self.token = prompt, token

    def forward(self, values_BTK: Tensor) -> Tensor:
        """(B, T, K) float to (B, T, N) of the same dtype."""
        return self.token(values_BTK) if values_BTK.shape[-2] == 1 else self.prompt(values_BTK)


class SharedRounding:
    """Rounds a tensor once for several layers that are given the same one, one after the other.

    Nothing may write into the tensor in between.

    Args:
        layers: those that share it, of one width.
    """

    def __init__(self, layers: list[Int8Linear]) -> None:
        self._all = {id(layer) for layer in layers}
        # one attribute, so that threads that share a model never mix inputs: tensor, its rounding, who waits for it
        self._last: tuple[Tensor, tuple[Tensor, Tensor], set[int]] | None = None
        for layer in layers:
            layer.shared = self

    def take(self, layer: Int8Linear, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer would round the tensor to."""
        last = self._last
        if last is None or last[0] is not values or id(layer) not in last[2]:
            last = self._last = (values, layer.round(values), set(self._all))
        last[2].discard(id(layer))
        if not last[2]:
            self._last = None  # nothing is held longer than it is needed
        return last[1]


def _onednn_product(
    rounded_BK: Tensor, packed: Tensor, scale_N: Tensor, zero_points_N: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        rounded_BK, 1.0, _ZERO_POINT, packed, scale_N, zero_points_N, None, 1.0, 0, dtype, "none", [], "",
    )  # fmt: skip


def _shape_of_product(
    rounded_BK: Tensor, packed: Tensor, scale_N: Tensor, zero_points_N: Tensor, dtype: torch.dtype
) -> Tensor:
    return rounded_BK.new_empty(rounded_BK.shape[0], scale_N.shape[0], dtype=dtype)


_product = opaque(
    "int8_product(Tensor rounded_BK, Tensor packed, Tensor scale_N, Tensor zero_points_N, ScalarType dtype) -> Tensor",
    _onednn_product,
    _shape_of_product,
)


def _round_to_int8(values_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 and its scale (B, 1) float32, rounded as torchao's symmetric int8 is."""
    half = (LARGEST_INT8 - SMALLEST_INT8) / 2
    rows, width = values_BK.shape
    rounded_BK, scale_B1 = torch.empty_like(values_BK, dtype=torch.int8), torch.empty(rows, 1)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, rows, step):
        part = values_BK[start : start + step].float()
        scale = part.abs().amax(dim=-1, keepdim=True).div_(half).clamp_(min=torch.finfo(torch.float32).tiny)
        rounded_BK[start : start + step].copy_(part.mul(1.0 / scale).round_().clamp_(SMALLEST_INT8, LARGEST_INT8))
        scale_B1[start : start + step] = scale
    return rounded_BK, scale_B1

"""A linear layer with 8-bit weights and activations, multiplied by the integer kernel of CPUs; for memory only.

Shape suffixes: B rows (all leading dimensions), K values read, N values written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LARGEST_INT8 = 127


class Int8Linear(nn.Module):
    """`nn.Linear` with weights in int8, one scale an output, and activations rounded to int8, one scale a row.

    torch's integer product reads the weights as they are, a byte each; nothing is converted back to floats.

    Args:
        linear: the layer whose weights are taken, on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_NK = linear.weight.detach()
        weight_NK, scale_N1 = _round_to_int8(weight_NK)
        self.weight = nn.Parameter(weight_NK, requires_grad=False)
        self.scale = nn.Parameter(scale_N1.flatten(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, values: Tensor) -> Tensor:
        """(..., K) float to (..., N) of the same dtype."""
        values_BK, scale_B1 = _round_to_int8(values.reshape(-1, self.in_features))
        products_BN = torch._int_mm(values_BK, self.weight.t()) * (scale_B1 * self.scale)
        result_BN = products_BN.to(values.dtype)
        if self.bias is not None:
            result_BN = result_BN + self.bias
        return result_BN.view(*values.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a model quantized with int8-dynamic-cpu lives in memory only; save int8-dynamic instead")


def _round_to_int8(values_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 and its scale (B, 1) float32."""
    largest_B1 = values_BK.abs().amax(dim=-1, keepdim=True).float()
    scale_B1 = (largest_B1 / LARGEST_INT8).clamp(min=torch.finfo(torch.float32).tiny)
    return (values_BK / scale_B1).round().to(torch.int8), scale_B1

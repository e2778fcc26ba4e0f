"""Linear layers and attention that are quick on x86 processors, for a model that only answers.

    prepare_for_cpu_(model)

- `PackedLinear` keeps a weight in the blocked layout of oneDNN instead of bringing it there at every call: the same
  products in the same precision.
- `WidenedLinear` multiplies weights held in 16 bits in float32 where the processor has no kernels for them.
- `Int8Linear` takes the place of layers that torchao quantized to int8-dynamic, whose own kernels on a CPU are slower
  than bfloat16: the same numbers, by oneDNN.
- `matmul_attention` replaces PyTorch's fused attention where two matrix products are quicker.

Shape suffixes: B rows, H heads, T positions, W width of a head.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUActivation, GELUTanh
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..model.backbones import decoder_layers
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from .int8_linear import Int8Linear, PromptAndTokenLinear, SharedRounding
from .opaque_products import opaque
from .widened_layers import WIDENED_ATTENTION, WIDENED_DTYPES, refuse_gradient, widen_

log = logging.getLogger(__name__)

KERNELS = ("auto", "torch", "packed")
# layers that read the same tensor, by the names transformers gives them
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MATMUL_ATTENTION = "matmul"
X86 = ("x86_64", "AMD64")
_GELUS: dict[type[nn.Module], str] = {GELUTanh: "tanh", GELUActivation: "none", nn.GELU: "none"}
_LANES = 32  # numbers that softmax takes at a time; what is left of a row it takes one by one
_SCORES = 2**21  # numbers between two products; more of them leave the cache
# multiplications of a row's queries with its keys from which two products beat the fused kernel, where there is one
# query, as in a step of an answer, and where there are several
_FEWEST_OF_ONE = {torch.bfloat16: 2**15, torch.float32: 2**17}
_FEWEST_OF_SEVERAL = {torch.bfloat16: 2**20}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_MALLOC_SETTINGS = ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**29))  # the first is the most glibc takes
# torch's allocator reads it when it first allocates, and then asks Linux for huge pages: a step of an answer reads
# every weight, and looking up small pages costs it a fifth of its time
HUGE_PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"
_SMALLEST_WEIGHT = 2**15  # numbers of a decoder's layer; below that a step costs more than the layout saves


def chosen_kernels(kernels: str, device: str) -> str:
    """What "auto", "torch" or "packed" means on a device: "torch" or "packed".

    Raises:
        ValueError: an unknown name, or packed layers where they cannot be used.
    """
    if kernels not in KERNELS:
        raise ValueError(f"unknown kernels {kernels!r}; use {', '.join(KERNELS)}")
    usable = device == "cpu" and supported(torch.float32)
    if kernels == "auto":
        return "packed" if usable else "torch"
    if kernels == "packed" and not usable:
        raise ValueError("packed kernels need an x86 processor, a torch with oneDNN, and a model on the CPU")
    return kernels


def supported(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for this dtype on this processor, an x86 one."""
    if platform.machine() not in X86 or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def lacks_kernels(dtype: torch.dtype) -> bool:
    """Whether this processor, an x86 one, multiplies in 16 bits far slower than in float32."""
    return dtype in WIDENED_DTYPES and supported(torch.float32) and not supported(dtype)


def prepare_for_cpu_(model: FlashSlothForConditionalGeneration) -> int:
    """Give a model on a CPU quick layers, in place, where this processor has them.

    The model answers and can be saved as before; it can no longer be trained, moved or copied.

    Args:
        model: as loaded, or quantized by `quantization.quantize_`.

    Returns:
        number of layers replaced.
    """
    replaced = 0
    linears = _linears(model)
    while linears:  # emptied on the way, so that each weight is let go when its packed form is there
        owner, name, linear, smallest = linears.pop()
        layer = _quick_form(linear, smallest)
        if layer is not None:
            setattr(owner, name, layer)
            replaced += 1
    widened = lacks_kernels(model.dtype)
    if widened:
        replaced += widen_(model)
    fused = [module for module in model.modules() if _fuse_activation(module)]
    log.debug("%d layers replaced by quick ones, %d of them with their activation", replaced, len(fused))
    for module in model.modules():
        for names in SIBLINGS:
            found = [getattr(module, name, None) for name in names]
            found = [layer.prompt if isinstance(layer, PromptAndTokenLinear) else layer for layer in found]
            layers = [layer for layer in found if isinstance(layer, Int8Linear) and layer.packed is not None]
            if len(layers) == len(names):
                SharedRounding(layers)
    for part in (model.model.vision_tower, model.model.language_model):
        if part.config._attn_implementation == "sdpa":
            if widened:
                part.set_attn_implementation(WIDENED_ATTENTION)
            elif model.dtype in _FEWEST_OF_ONE and supported(model.dtype):
                part.set_attn_implementation(MATMUL_ATTENTION)
    return replaced


def keep_freed_memory() -> bool:
    """Have glibc keep memory that is freed, for this whole process: new pages cost more than what fills them.

    It is left alone where the environment sets it.

    Returns:
        whether it was done.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUN")) for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(parameter, size) for parameter, size in _MALLOC_SETTINGS)


def _quick_form(linear: nn.Linear, smallest: int) -> nn.Module | None:
    weight = linear.weight
    if type(weight.data) is not Tensor:
        return Int8Linear.from_torchao(linear)
    return PackedLinear(linear) if weight.numel() >= smallest and supported(weight.dtype) else None


def _linears(model: FlashSlothForConditionalGeneration) -> list[tuple[nn.Module, str, nn.Linear, int]]:
    """(owner, attribute, layer, numbers from which it is packed) of the linear layers of encoder, decoder and head."""
    # an encoder never reads less than all its positions, so that its layers are worth it at any size
    parts = [(layer, _SMALLEST_WEIGHT) for layer in decoder_layers(model.model.language_model)]
    parts.append((model.model.vision_tower, 0))
    # A multi-head attention reads the weight of its out_proj itself, past the module's forward.
    owners = [
        (module, smallest)
        for part, smallest in parts
        for module in part.modules()
        if not isinstance(module, nn.MultiheadAttention)
    ]
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        owners.append((model, _SMALLEST_WEIGHT))
    return [
        (owner, name, child, smallest)
        for owner, smallest in owners
        for name, child in owner.named_children()
        if type(child) is nn.Linear
    ]


def _fuse_activation(module: nn.Module) -> bool:
    """Let the first layer of a two-layer perceptron apply the GELU that follows it."""
    children = dict(module.named_children())
    first, activation = children.get("fc1"), children.get("activation_fn")
    if set(children) != {"fc1", "activation_fn", "fc2"} or not isinstance(first, PackedLinear):
        return False
    approximate = next((form for kind, form in _GELUS.items() if type(activation) is kind), None)
    if approximate is None:
        return False
    first.activation = ("gelu", approximate)
    module.activation_fn = nn.Identity()
    return True


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's blocked layout.

    Args:
        linear: on a CPU, in a dtype that is `supported`; it must not be used afterwards.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # not a buffer: an opaque tensor cannot be moved or cast
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.activation = ("none", "")  # name, form

    @property
    def weight(self) -> Tensor:
        """A copy in the ordinary layout, (out_features, in_features)."""
        return self.packed.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features).

        Raises:
            RuntimeError: a gradient is wanted.
        """
        refuse_gradient(inputs)
        return _product(inputs, self.packed, self.bias, self.out_features, *self.activation)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return shape + (f", activation={self.activation[0]}" if self.activation[0] != "none" else "")


def _packed_product(
    inputs: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, activation: str, form: str
) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, activation, [], form)


def _shape_of_product(
    inputs: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, activation: str, form: str
) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], out_features)


_product = opaque(
    "packed_product(Tensor inputs, Tensor packed, Tensor? bias, SymInt out_features, str activation, str form)"
    " -> Tensor",
    _packed_product,
    _shape_of_product,
)


def matmul_attention(
    module: nn.Module,
    query_BHTW: Tensor,
    key_BHTW: Tensor,
    value_BHTW: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by two matrix products and a softmax, in the dtype of its inputs; causal as transformers' sdpa is.

    PyTorch's fused kernel takes over where it is quicker (small products, prompts in float32), where there is dropout
    or a gradient, and for masks that differ between heads.

    Returns:
        (B, T, H, W), and None for the weights.
    """
    rows, heads, positions, width = query_BHTW.shape
    key_heads, keys = key_BHTW.shape[1:3]
    fewest = (_FEWEST_OF_ONE if positions == 1 else _FEWEST_OF_SEVERAL).get(query_BHTW.dtype)
    quicker = fewest is not None and heads * positions * keys * width >= fewest
    known = positions in (1, keys) if attention_mask is None else attention_mask.shape[1] == 1
    if dropout or query_BHTW.requires_grad or not (quicker and known):
        return sdpa_attention_forward(
            module, query_BHTW, key_BHTW, value_BHTW, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    # query heads that share a key head are rows of one product
    key, value = key_BHTW.flatten(0, 1), value_BHTW.flatten(0, 1)
    query = query_BHTW.reshape(len(key), -1, width) * (width**-0.5 if scaling is None else scaling)
    bias = _bias(module, query_BHTW, attention_mask, kwargs.get("is_causal"))
    if bias is None and positions == 1:
        mixed = torch.bmm(functional.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1), value)
        return mixed.view(rows, 1, heads, width), None
    bias = query.new_zeros(1, 1, keys) if bias is None else bias.repeat(1, heads // key_heads, 1)
    if keys % _LANES > 2 * (keys // _LANES):  # so short that the rest of a row takes most of softmax's time
        extra = _LANES - keys % _LANES
        key, value = (functional.pad(states, (0, 0, 0, extra)) for states in (key, value))
        bias = functional.pad(bias, (0, extra), value=torch.finfo(bias.dtype).min)
    bias = bias.repeat_interleave(key_heads, 0) if len(bias) > 1 else bias.expand(len(key), -1, -1)
    mixed = torch.empty_like(query)
    step = max(1, _SCORES // (query.shape[1] * key.shape[1]))
    for start in range(0, len(key), step):
        some = slice(start, start + step)
        scores = torch.baddbmm(bias[some], query[some], key[some].transpose(1, 2))
        torch.bmm(functional.softmax(scores, dim=-1), value[some], out=mixed[some])
    mixed_BHTW = mixed.view(rows, heads, positions, width)
    return mixed_BHTW.transpose(1, 2).contiguous(), None


def _bias(module: nn.Module, query_BHTW: Tensor, attention_mask: Tensor | None, causal: bool | None) -> Tensor | None:
    """What is added to the scores, (1 or B, T, keys)."""
    positions, least = query_BHTW.shape[2], torch.finfo(query_BHTW.dtype).min
    if attention_mask is None:
        if positions == 1 or not (getattr(module, "is_causal", True) if causal is None else causal):
            return None
        return query_BHTW.new_full((1, positions, positions), least).triu_(1)
    bias = attention_mask[:, 0]
    if bias.dtype == torch.bool:
        # not infinite: the rows of padding see nothing at all, and must not become NaN
        bias = query_BHTW.new_zeros(bias.shape).masked_fill_(~bias, least)
    return bias


AttentionInterface.register(MATMUL_ATTENTION, matmul_attention)
AttentionMaskInterface.register(MATMUL_ATTENTION, sdpa_mask)

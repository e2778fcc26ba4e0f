"""Faster kernels from optional libraries: asked for by the recipe, used or refused, never left out quietly.

Shape suffixes: N positions with a label, D width of the language model, V vocabulary.
"""

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration

if TYPE_CHECKING:
    from .recipe import KernelRecipe

# fields of a text configuration that change the logits after the head, which the fused loss does not know
_LOGIT_SCALES = ("logits_scaling", "logit_scale")


def apply_kernels(model: nn.Module, kernels: "KernelRecipe", on_cpu: bool) -> None:
    """Put the kernels a recipe asks for into the model.

    Args:
        model: a FlashSloth model, or a wrapper (adapters) that holds one.

    Raises:
        ValueError: a library that is not installed, or that supports neither this machine nor this decoder.
    """
    owner = next(module for module in model.modules() if isinstance(module, FlashSlothForConditionalGeneration))
    if kernels.liger:
        _require("liger", "liger_kernel", on_cpu)
        _apply_liger(owner)
    owner.head_loss = None
    if kernels.cut_cross_entropy:
        _require("cut_cross_entropy", "cut_cross_entropy", on_cpu)
        _check_head(owner)
        owner.head_loss = cut_cross_entropy_loss


def _require(option: str, module: str, on_cpu: bool) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"kernels.{option}: {module} is not installed; pip install 'flashsloth[kernels]'")
    if on_cpu:
        raise ValueError(f"kernels.{option} contradicts training on a CPU: its kernels need a GPU")


def _apply_liger(model: FlashSlothForConditionalGeneration) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    decoder = model.model.language_model
    family = decoder.config.model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"kernels.liger: the installed liger-kernel has no kernels for decoders of the family {family!r}; set it "
            "to false"
        )
    # norms, rotations and the gated layer of the decoder; the loss is the model's own
    _apply_liger_kernel_to_instance(model=decoder, cross_entropy=False, fused_linear_cross_entropy=False)


def _check_head(model: FlashSlothForConditionalGeneration) -> None:
    config = model.config.text_config
    scales = [name for name in _LOGIT_SCALES if getattr(config, name, None) is not None]
    if type(model.lm_head) is not nn.Linear:
        scales.append("an adapter on the head")
    elif model.lm_head.bias is not None:
        scales.append("a bias on the head")
    if scales:
        raise ValueError(
            f"kernels.cut_cross_entropy: this decoder ({config.model_type}) has {scales[0]}, which it cannot compute; "
            "set it to false"
        )


def cut_cross_entropy_loss(
    model: FlashSlothForConditionalGeneration, hidden_ND: Tensor, labels_N: Tensor, num_items: int | Tensor | None
) -> Tensor:
    """Cross-entropy of the head without its logits in memory: the sum over `num_items`, or the mean."""
    from cut_cross_entropy import linear_cross_entropy

    weight_VD: nn.Parameter = model.lm_head.weight
    if torch.is_autocast_enabled(hidden_ND.device.type):  # autocast does not reach into the library's kernels
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    cap = getattr(model.config.text_config, "final_logit_softcapping", None)
    total = linear_cross_entropy(hidden_ND, weight_VD, labels_N, softcap=cap, reduction="sum")
    return total / (labels_N.numel() if num_items is None else num_items)

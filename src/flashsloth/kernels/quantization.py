"""Quantize the linear layers of a model, in memory or with torchao to a folder that `from_pretrained` loads.

    model = quantize_(model, "int8-dynamic")

Decoder layers are quantized, and the vision encoder where asked for. Embeddings, head, compressor, projector and the
embedded query module keep their format: they are small or read one row at a time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUTanh

from ..checkpoints import hub
from ..checkpoints.folder import check_destination, size_of, write_folder
from ..checkpoints.loading import load_model
from ..checkpoints.pretrained import load_processor
from ..model.backbones import decoder_layers
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from .int8_linear import Int8Linear, PromptAndTokenLinear

INT4_GROUP_SIZE = 32
_ENCODER = "model.vision_tower"


def _int8_dynamic(device: torch.device) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    # No global compiler settings: they would change other models of the process.
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _int8_weight_only(device: torch.device) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _int4_weight_only(device: torch.device) -> Any:
    # Int4WeightOnlyConfig has no CPU kernels whose tensors safetensors can hold; these values do, one a byte.
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(INT4_GROUP_SIZE))


def _int4_packed(device: torch.device) -> Any:
    if device.type == "cpu":
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP_SIZE, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(
        group_size=INT4_GROUP_SIZE, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


def _int8_and_int4(linear: nn.Linear) -> nn.Module:
    """int8 for prompts; for the steps of an answer two weights a byte."""
    holder = nn.Sequential(linear)
    int8 = Int8Linear.from_float(linear)
    _import_torchao().quantize_(holder, _int4_packed(linear.weight.device))
    return PromptAndTokenLinear(int8, holder[0])


@dataclass(frozen=True)
class Scheme:
    """How weights are held.

    Attributes:
        recipe: torchao's configuration for a device, or
        layers: what takes the place of a linear layer of the decoder, and of the encoder.
        encoder: quantize the encoder too where nothing is said.
        grouped: the parts whose widths groups of `INT4_GROUP_SIZE` must divide.
        saved_as: the scheme to write instead of one that is laid out as the kernels of a machine read it.
        devices: those with kernels; None is any.
        dtype: the number format the kernels multiply in; None is any.
    """

    recipe: Callable[[torch.device], Any] | None = None
    layers: tuple[Callable[[nn.Linear], nn.Module], Callable[[nn.Linear], nn.Module]] | None = None
    encoder: bool = False
    grouped: tuple[str, ...] = ()
    saved_as: str | None = None
    devices: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None


SCHEMES: dict[str, Scheme] = {
    "int8-dynamic": Scheme(_int8_dynamic, encoder=True),
    "int8-weight-only": Scheme(_int8_weight_only),
    "int4-weight-only": Scheme(_int4_weight_only, grouped=("decoder", "encoder")),
    "int8-dynamic-cpu": Scheme(
        layers=(Int8Linear.from_float, Int8Linear.from_float), encoder=True, saved_as="int8-dynamic", devices=("cpu",)
    ),
    "int8-int4-cpu": Scheme(
        layers=(_int8_and_int4, Int8Linear.from_float),
        encoder=True,
        grouped=("decoder",),
        saved_as="int8-dynamic",
        devices=("cpu",),
        dtype=torch.bfloat16,
    ),
    "int4-packed": Scheme(
        _int4_packed,
        grouped=("decoder", "encoder"),
        saved_as="int4-weight-only",
        devices=("cpu", "cuda"),
        dtype=torch.bfloat16,
    ),
}


def is_quantized(model: nn.Module) -> bool:
    """Whether weights of the model are held in fewer bits, by a folder's configuration or in memory."""
    if getattr(model, "hf_quantizer", None) is not None:
        return True
    return any(
        isinstance(module, Int8Linear)
        or (isinstance(module, nn.Linear) and hasattr(module.weight, "__tensor_flatten__"))
        for module in model.modules()
    )


def quantize_(
    model: FlashSlothForConditionalGeneration, scheme: str, encoder: bool | None = None
) -> FlashSlothForConditionalGeneration:
    """Quantize a loaded model in place.

    Args:
        model: with floating-point weights, on the device where it will run.
        scheme: of torchao, for `save_pretrained` too: "int8-dynamic" (activations and weights), "int8-weight-only",
            "int4-weight-only". For memory only: "int8-dynamic-cpu" (the arithmetic of "int8-dynamic" by the integer
            kernel of CPUs; in 16 bits with the exact GELU where a model has its tanh form), "int8-int4-cpu" (that
            for prompts, and for the steps of an answer "int4-packed"), "int4-packed" (two weights a byte; bfloat16,
            CPU or CUDA).
        encoder: quantize the vision encoder too; default only where activations are quantized.

    Returns:
        the same model.

    Raises:
        ValueError: unknown scheme, a model that is quantized already, widths the scheme cannot group, a device or
            number format without kernels for it.
        ImportError: torchao is missing.
    """
    check_scheme(scheme)
    if is_quantized(model):
        raise ValueError("the model is quantized already; quantize the folder it was made from")
    how = SCHEMES[scheme]
    chosen = _chosen_layers(model, how.encoder if encoder is None else encoder)
    _check_widths(chosen, scheme)
    _check_kernels(model, scheme)
    if how.saved_as is not None:
        model.register_state_dict_pre_hook(_refuse_to_save(scheme))
    if how.layers is not None:
        of_decoder, of_encoder = how.layers
        while chosen:  # emptied on the way, so that each float weight is let go
            name, linear = chosen.popitem()
            model.set_submodule(name, of_encoder(linear) if name.startswith(_ENCODER) else of_decoder(linear))
        if model.dtype.itemsize == 2:
            _use_exact_gelu(model)
        return model
    assert how.recipe is not None
    torchao, recipe = _import_torchao(), how.recipe(model.device)
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in chosen]
    torchao.quantize_(model, recipe, filter_fn=lambda module, name: name in chosen)
    if how.saved_as is None:
        _describe(model, recipe, kept)
    return model


def check_scheme(scheme: str) -> None:
    """Raises ValueError where there is no such scheme."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown quantization scheme {scheme!r}; use {', '.join(SCHEMES)}")


def _check_widths(chosen: dict[str, nn.Linear], scheme: str) -> None:
    for name, linear in chosen.items():
        part = "encoder" if name.startswith(_ENCODER) else "decoder"
        if part in SCHEMES[scheme].grouped and linear.in_features % INT4_GROUP_SIZE:
            raise ValueError(
                f"{name} reads {linear.in_features} values, which groups of {INT4_GROUP_SIZE} do not divide, so "
                f"{scheme} cannot hold it; use int8-weight-only or int8-dynamic"
                + (", or leave the encoder out" if part == "encoder" else "")
            )
    if scheme == "int4-weight-only":
        warnings.warn(
            "int4-weight-only holds each 4-bit value in a byte of its own, since torchao has no packed format that "
            "runs on a CPU and can be saved as safetensors: it is no smaller than int8-weight-only",
            stacklevel=3,
        )


def _check_kernels(model: FlashSlothForConditionalGeneration, scheme: str) -> None:
    how = SCHEMES[scheme]
    if how.devices is not None and model.device.type not in how.devices:
        raise ValueError(
            f"{scheme} has kernels for {' and '.join(how.devices)} only; use {how.saved_as} on {model.device}"
        )
    if how.dtype is not None and model.dtype != how.dtype:
        wanted, found = (str(dtype).removeprefix("torch.") for dtype in (how.dtype, model.dtype))
        raise ValueError(
            f"{scheme} multiplies in {wanted}, but the model is in {found}; load it with dtype {wanted} "
            f"(--dtype {wanted})"
        )


def _why_not_saved(scheme: str) -> str:
    return (
        f"{scheme} is laid out for the kernels of one machine and cannot be saved; write {SCHEMES[scheme].saved_as}, "
        f"or use {scheme} in memory (flashsloth ask --quantize {scheme})"
    )


def _refuse_to_save(scheme: str) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise ValueError(_why_not_saved(scheme))

    return refuse


def _describe(model: FlashSlothForConditionalGeneration, recipe: Any, kept: list[str]) -> None:
    """Record in the configuration how the model was quantized, so that its folder loads."""
    from transformers import TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    config = TorchAoConfig(recipe, modules_to_not_convert=kept)
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)


def quantize_folder(
    name: str | os.PathLike[str],
    destination: Path,
    scheme: str,
    encoder: bool | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Write a quantized copy of a model: safetensors and `quantization_config` in its config.json.

    Args:
        name: as in `inference.load`.
        destination: folder to write; appears whole or not at all.
        scheme: as in `quantize_`.
        encoder: as in `quantize_`.
        dtype: of what is not quantized; "auto" as saved.
        overwrite: replace a folder that is not empty.

    Raises:
        ValueError, OSError, ImportError: as in `quantize_` and `inference.load`; a destination in use.
    """
    check_scheme(scheme)
    if SCHEMES[scheme].saved_as is not None:
        raise ValueError(_why_not_saved(scheme))
    _import_torchao()
    source = hub.resolve(name)
    check_destination(source, destination, overwrite)
    model = quantize_(load_model(source, dtype), scheme, encoder)
    processor = load_processor(source)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return write_folder(destination, overwrite, write, size_of(source))


def _chosen_layers(model: FlashSlothForConditionalGeneration, encoder: bool) -> dict[str, nn.Linear]:
    """Linear layers to quantize, by full name."""
    parts: list[nn.Module] = list(decoder_layers(model.model.language_model))
    if encoder:
        parts.append(model.model.vision_tower)
    # A multi-head attention reads the weight of its out_proj itself, past the module's forward.
    unsafe = {id(part.out_proj) for part in model.modules() if isinstance(part, nn.MultiheadAttention)}
    wanted = {id(module) for part in parts for module in part.modules() if isinstance(module, nn.Linear)} - unsafe
    return {name: module for name, module in model.named_modules() if id(module) in wanted}


def _use_exact_gelu(model: FlashSlothForConditionalGeneration) -> None:
    """GELU by the error function instead of its tanh form in encoder and decoder.

    They differ by 0.0005 at most, a small part of a step of int8, and torch computes the exact one four times faster
    in 16 bits on a CPU.
    """
    for part in (model.model.vision_tower, model.model.language_model):
        for owner in list(part.modules()):
            for name, child in owner.named_children():
                if isinstance(child, GELUTanh):
                    setattr(owner, name, nn.GELU())


def _import_torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ImportError("quantization needs torchao; pip install 'flashsloth[quantize]'") from error
    return torchao.quantization

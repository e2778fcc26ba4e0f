"""From a name to a model on a device; nothing less than all of its tensors is accepted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from . import hub
from .model.configuration_flashsloth import FlashSlothConfig
from .model.modeling_flashsloth import FlashSlothForConditionalGeneration

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MOST_NAMED_TENSORS = 5


def select_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ValueError: no such device on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:1 or mps") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise ValueError(f"device {name!r} is not available here; use --device auto or cpu")
    return device


def synchronize(device: torch.device | str | None = None) -> None:
    """Wait until a device, by default the accelerator if there is one, has done all its work."""
    if torch.accelerator.is_available() and (device is None or torch.device(device).type != "cpu"):
        torch.accelerator.synchronize(device)


def load_model(
    folder: str | os.PathLike[str], dtype: str = "auto", quantization_config: Any = None
) -> FlashSlothForConditionalGeneration:
    """`from_pretrained` that accepts nothing less than all tensors of the model.

    Args:
        folder: of a model, or of an adapter, which is merged into its base model.
        dtype: as in `load`.
        quantization_config: of transformers, to quantize weights while they are read.

    Raises:
        ValueError: a broken configuration or file; a tensor that is missing, unexpected or of another shape.
    """
    if hub.is_adapter(Path(folder)):
        from .train.adapters import load_merged

        return load_merged(Path(folder), dtype=dtype)
    model_type = hub.read_config(Path(folder)).get("model_type")
    if model_type != FlashSlothConfig.model_type:
        raise ValueError(f"{folder} holds a {model_type!r} model, not a FlashSloth; see `flashsloth convert`")
    try:
        model, report = FlashSlothForConditionalGeneration.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **({} if quantization_config is None else {"quantization_config": quantization_config}),
        )
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"{folder}/config.json: {error.__cause__ or error}") from error
    except SafetensorError as error:
        raise ValueError(f"a weight file in {folder} is damaged: {error}") from error
    problems = [f"missing {key}" for key in sorted(report["missing_keys"])]
    problems += [f"unexpected {key}" for key in sorted(report["unexpected_keys"])]
    problems += [
        f"{key} has shape {list(found)} instead of {list(expected)}"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    if problems:
        rest = len(problems) - MOST_NAMED_TENSORS
        more = f" and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {', '.join(problems[:MOST_NAMED_TENSORS])}{more}"
        )
    return model

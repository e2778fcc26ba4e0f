"""From a folder, of a model or an adapter, to a model on a device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from . import hub
from .adapters import load_merged
from .pretrained import DTYPES, load_plain

__all__ = ["DTYPES", "load_model", "select_device", "synchronize"]


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
    """The model of a folder, with all of its tensors.

    Args:
        folder: of a model, or of an adapter, which is merged into its base model.
        dtype: "auto" (as saved) or a name of `DTYPES`.
        quantization_config: of transformers, to quantize weights of a whole model while they are read.

    Raises:
        ValueError: a broken configuration or file; a tensor that is missing, unexpected or of another shape.
    """
    if hub.is_adapter(Path(folder)):
        return load_merged(Path(folder), dtype=dtype)
    return load_plain(folder, dtype, quantization_config)

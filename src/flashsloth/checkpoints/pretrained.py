"""From the folder of a whole model to the model; nothing less than all of its tensors is accepted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..model.configuration_flashsloth import FlashSlothConfig
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from . import hub

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MOST_NAMED_TENSORS = 5


def load_plain(
    folder: str | os.PathLike[str], dtype: str = "auto", quantization_config: Any = None
) -> FlashSlothForConditionalGeneration:
    """`from_pretrained` that accepts nothing less than all tensors of the model.

    Args:
        folder: of a whole model.
        dtype: "auto" (as saved) or a name of `DTYPES`.
        quantization_config: of transformers, to quantize weights while they are read.

    Raises:
        ValueError: a broken configuration or file; a tensor that is missing, unexpected or of another shape.
    """
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

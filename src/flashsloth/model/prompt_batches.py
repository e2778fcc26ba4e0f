"""Batches of encoded prompts, of the kinds that the options of tokenizers ask for.

Shape suffixes: B rows, T tokens, K images of a row, G query groups of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.utils import PaddingStrategy

from .prompt_encoding import NO_LIMIT, Features, pad_features


def stack_rows(
    rows: Sequence[Features], pixels: np.ndarray | None, tokenizer: Any, options: Mapping[str, Any]
) -> BatchFeature:
    """A batch from rows and the pixels of its images, padded and of the kind that a tokenizer's options ask for."""
    tensor_type = options.get("return_tensors")
    strategy = PaddingStrategy.LONGEST if options.get("padding") is True else options.get("padding")
    if strategy in (None, False, PaddingStrategy.DO_NOT_PAD):
        lengths = {len(row["input_ids"]) for row in rows}
        if len(lengths) > 1 and tensor_type is not None:
            raise ValueError(f"rows of {min(lengths)} to {max(lengths)} tokens need padding=True to form a tensor")
    length = None
    if strategy == PaddingStrategy.MAX_LENGTH:
        length = options.get("max_length") or tokenizer.model_max_length
        if length >= NO_LIMIT:
            raise ValueError('padding="max_length" needs max_length: the tokenizer has no limit of its own')
    if strategy in (None, False, PaddingStrategy.DO_NOT_PAD) and tensor_type is None:
        names = [name for name in rows[0] if any(len(row[name]) for row in rows)]
        data: dict[str, Any] = {name: [row[name].tolist() for row in rows] for name in names}
    else:
        side = options.get("padding_side") or tokenizer.padding_side
        multiple = options.get("pad_to_multiple_of")
        data = dict(pad_features(rows, tokenizer.pad_token_id, length, multiple, side))
        if tensor_type is None:
            data = {name: value.tolist() for name, value in data.items()}
    if pixels is not None:
        data["pixel_values"] = pixels
    return BatchFeature(data, tensor_type=tensor_type)


def without_batch_axis(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as arrays, (T,) instead of (1, T)."""
    arrays = {name: np.asarray(value) for name, value in row.items() if value is not None}
    for name, value in arrays.items():
        if name == "pixel_values" or value.ndim == 1:  # counts of images have no batch axis either
            continue
        if value.ndim != 2 or value.shape[0] != 1:
            raise ValueError(f"pad takes single samples; {name} of one has shape {value.shape}")
        arrays[name] = value[0]
    return arrays

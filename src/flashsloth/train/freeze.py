"""Which parameters belong to which part of the model, and which parts a stage trains."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

logger = logging.getLogger(__name__)

PartName = Literal["vision_encoder", "compressor", "projector", "query_tokens", "embedded_query", "language_model"]
PART_NAMES: tuple[PartName, ...] = get_args(PartName)

# The head belongs to the language model: it is tied to the embeddings in half of the decoder families.
PART_PREFIXES: dict[PartName, tuple[str, ...]] = {
    "vision_encoder": ("model.vision_tower.",),
    "compressor": ("model.compressor.",),
    "projector": ("model.projector.",),
    "query_tokens": ("model.query_tokens.",),
    "embedded_query": ("model.embedded_query.",),
    "language_model": ("model.language_model.", "lm_head."),
}


# PEFT puts the model under this name, and keeps beside a part that it trains whole the part as it was
_ADAPTER_PREFIX, _KEPT_ORIGINAL = "base_model.model.", ".original_module."


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model."""

    name: PartName
    trainable: int
    frozen: int


def part_of(parameter_name: str) -> PartName:
    """Name of the part that owns a parameter of `FlashSlothForConditionalGeneration`.

    Raises:
        ValueError: the parameter belongs to no known part.
    """
    name = parameter_name.removeprefix(_ADAPTER_PREFIX)
    for part, prefixes in PART_PREFIXES.items():
        if name.startswith(prefixes):
            return part
    known = ", ".join(prefix for prefixes in PART_PREFIXES.values() for prefix in prefixes)
    raise ValueError(f"parameter {parameter_name!r} belongs to no part of the model; parts start with {known}")


def set_trainable_parts(model: nn.Module, parts: Iterable[PartName]) -> list[PartCount]:
    """Make exactly the parameters of `parts` require gradients.

    A listed part without parameters (average pooling as the compressor, no query tokens) is reported by a warning.

    Returns:
        One count per part, in forward order.
    """
    parts = set(parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
    counts = count_parts(model)
    for count in counts:
        if count.name in parts and not count.trainable:
            logger.warning("part %r is listed as trainable, but this model has no parameters there", count.name)
    return counts


def count_parts(model: nn.Module) -> list[PartCount]:
    """Trainable and frozen parameters of each part, in forward order; quantized weights count unpacked."""
    counts = {part: [0, 0] for part in PART_NAMES}
    for name, parameter in model.named_parameters():
        if _KEPT_ORIGINAL not in name:
            packed = getattr(parameter, "quant_state", None)
            size = parameter.numel() if packed is None else packed.shape.numel()
            counts[part_of(name)][not parameter.requires_grad] += size
    return [PartCount(part, trainable, frozen) for part, (trainable, frozen) in counts.items()]


def format_counts(counts: Iterable[PartCount]) -> str:
    """One line: trainable parts, then frozen ones, with their parameter counts."""
    counts = list(counts)
    trainable = ", ".join(f"{count.name} {count.trainable:,}" for count in counts if count.trainable)
    frozen = ", ".join(f"{count.name} {count.frozen:,}" for count in counts if count.frozen)
    return f"trainable: {trainable or 'nothing'}; frozen: {frozen or 'nothing'}"

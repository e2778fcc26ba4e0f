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
    for part, prefixes in PART_PREFIXES.items():
        if parameter_name.startswith(prefixes):
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
    counts = {part: [0, 0] for part in PART_NAMES}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in parts)
        counts[part][part not in parts] += parameter.numel()
    for part in PART_NAMES:
        if part in parts and not any(counts[part]):
            logger.warning("part %r is listed as trainable, but this model has no parameters there", part)
    return [PartCount(part, trainable, frozen) for part, (trainable, frozen) in counts.items()]


def format_counts(counts: Iterable[PartCount]) -> str:
    """One line: trainable parts, then frozen ones, with their parameter counts."""
    counts = list(counts)
    trainable = ", ".join(f"{count.name} {count.trainable:,}" for count in counts if count.trainable)
    frozen = ", ".join(f"{count.name} {count.frozen:,}" for count in counts if count.frozen)
    return f"trainable: {trainable or 'nothing'}; frozen: {frozen or 'nothing'}"

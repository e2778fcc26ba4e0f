"""The model as it is, with a part of it changed, and the controls: each a column of questions through one harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

FREQUENT = "frequent-answer"
CONTROLS = ("text-only", "shuffled-image", FREQUENT)
# name on the command line -> argument of the adapter
OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "quantize": "quantization",
        "compressor": "compressor",
        "visual-tokens": "visual_tokens",
        "dtype": "dtype",
        "zero-embedded-query": "zero_embedded_query",
        "kernels": "kernels",
    }
)


@dataclass(frozen=True)
class Variant:
    """What is changed.

    Attributes:
        name: as it was asked for; empty for the model as it is.
        options: arguments of the adapter.
        control: name of a control, or nothing.
    """

    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    control: str = ""

    @property
    def folder(self) -> str:
        """Name of a folder for it."""
        return "".join(char if char.isalnum() or char in "-=" else "_" for char in self.name) or "model"


def read_variants(compared: Sequence[str], controls: Sequence[str]) -> list[Variant]:
    """The model as it is, then what it is compared with: `name=value`, several joined by commas.

    Raises:
        ValueError: an unknown option or control.
    """
    variants = [Variant()]
    for text in compared:
        options: dict[str, Any] = {}
        for part in text.split(","):
            name, given, value = part.strip().partition("=")
            if name not in OPTIONS or not given or not value:
                raise ValueError(f"--compare {text!r}: give name=value, the name one of {', '.join(OPTIONS)}")
            options[OPTIONS[name]] = value
        variants.append(Variant(text, options))
    for name in controls:
        if name not in CONTROLS:
            raise ValueError(f"unknown control {name!r}; there are {', '.join(CONTROLS)}")
        variants.append(Variant(name, {} if name == FREQUENT else {"control": name}, name))
    if len({variant.name for variant in variants}) < len(variants):
        raise ValueError("the same variant is asked for twice")
    return variants

"""The settings of a study: a strict dataclass tree read from YAML."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ..data.recipe import Positive
from ..synthetic.dataset import FAMILIES
from ..train.settings import parse_settings, read_tree

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
LEAST_SEEDS = 3


@dataclass(config=_STRICT, kw_only=True)
class Variant:
    """One way to configure the base recipe."""

    label: str
    """Its name in tables and plots."""
    overrides: dict[str, Any] | list[str] = Field(default_factory=dict)
    """What differs from the base recipe: `a.b: value`, or a list of `a.b=value`."""

    def as_list(self) -> list[str]:
        """The overrides as `load_recipe` takes them."""
        if isinstance(self.overrides, list):
            return list(self.overrides)
        # every JSON value is a YAML value
        return [f"{key}={json.dumps(value)}" for key, value in self.overrides.items()]


@dataclass(config=_STRICT, kw_only=True)
class EvaluationSettings:
    """Held-out rendered images on which every trained model is scored."""

    families: Annotated[list[str], Field(min_length=1)]
    """Of `flashsloth.synthetic`, in equal shares."""
    count: Positive
    """Images."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the images; the same for every run."""
    turns: Positive = 6
    """Questions an image."""
    photos: str | None = None
    """Folder (or environment variable, written `$NAME`) of the CIFAR-10 parquet files, for the photo family."""
    batch_size: Positive = 64
    """Questions answered at once."""
    majority_images: Positive = 1000
    """Training images from which the most frequent answer of each task is counted."""

    def __post_init__(self) -> None:
        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(f"evaluation.families: unknown family {family!r}; known are {', '.join(FAMILIES)}")


@dataclass(config=_STRICT, kw_only=True)
class Claim:
    """A statement about two variants that the study is to decide."""

    text: str
    variant: str
    reference: str
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The claim is that the variant's exact match exceeds the reference's less this share; 0 = that it is better."""


@dataclass(config=_STRICT, kw_only=True)
class Study:
    """A whole study."""

    base: Path
    """Recipe that every variant starts from, relative to the study's file."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=LEAST_SEEDS)]
    """A seed sets the initial weights and the training data of a run; variants of one seed see the same data."""
    variants: Annotated[dict[VariantName, Variant], Field(min_length=2)]
    reference: str
    """The variant whose training time and memory count as 1."""
    evaluation: EvaluationSettings
    claims: list[Claim] = Field(default_factory=list)
    output_dir: Path

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} names a seed twice")
        named = [("reference", self.reference)]
        for index, claim in enumerate(self.claims):
            named += [(f"claims.{index}.variant", claim.variant), (f"claims.{index}.reference", claim.reference)]
        for field, name in named:
            if name not in self.variants:
                raise ValueError(f"{field}: no variant {name!r}; variants are {', '.join(self.variants)}")


def load_study(path: str | Path) -> Study:
    """Read a study.

    Raises:
        ValueError: unreadable file, unknown key (with the nearest valid one), wrong type, contradicting fields.
    """
    path = Path(path)
    study = parse_settings(Study, read_tree(path), str(path))
    study.base = path.parent / study.base
    return study

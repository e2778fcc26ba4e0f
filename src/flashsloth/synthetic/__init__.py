"""Seeded images with questions, answers and captions: scenes, charts, text and photographs."""

from .dataset import FAMILIES, TASKS, SyntheticDataset, render
from .photos import Photographs
from .sample import Sample, Turn
from .scoring import answer_normalised, exact_match

__all__ = [
    "FAMILIES",
    "TASKS",
    "Photographs",
    "Sample",
    "SyntheticDataset",
    "Turn",
    "answer_normalised",
    "exact_match",
    "render",
]

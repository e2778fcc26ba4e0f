"""Files of the static tier. A file appears complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import flashsloth
from flashsloth.checkpoints.files import write_whole

from .tables import notes, tables
from .tokens import ModelCost


def versions() -> dict[str, str]:
    """What made the numbers."""
    return {
        "flashsloth": flashsloth.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_json(path: Path, costs: Sequence[ModelCost], settings: dict[str, Any]) -> None:
    """All numbers, unrounded."""
    content = {"versions": versions(), "settings": settings, "models": [cost.to_dict() for cost in costs]}
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def markdown(costs: Sequence[ModelCost], text_tokens: int, dtype: str, batch: int) -> str:
    """The tables as markdown, then what is assumed."""
    parts = [table.markdown() for table in tables(costs, text_tokens, dtype, batch)]
    assumed = notes(costs)
    if assumed:
        parts.append("\n".join(f"- {line}" for line in assumed))
    return "\n\n".join(parts) + "\n"


def write_markdown(path: Path, costs: Sequence[ModelCost], text_tokens: int, dtype: str, batch: int) -> None:
    """`markdown` after a line with the versions that made it."""
    made_by = ", ".join(f"{name} {version}" for name, version in versions().items())
    write_whole(path, f"<!-- {made_by} -->\n\n{markdown(costs, text_tokens, dtype, batch)}")

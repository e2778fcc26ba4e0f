"""What a row says about itself, and about the published one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DONE, INCOMPLETE, NOT_JUDGED, FAILED = "done", "incomplete", "not judged", "failed"
REPRODUCED, ABOVE, BELOW = "reproduced", "above", "below"


def published_model(visual_tokens: int, models: Mapping[str, int]) -> str | None:
    """The published model that makes so many tokens of an image."""
    return next((name for name, tokens in models.items() if tokens == visual_tokens), None)


def verdict(row: Mapping[str, Any]) -> str:
    """Whether a score lies within its tolerance of the published one; says why where that cannot be said."""
    if row["status"] != DONE:
        return str(row["status"])
    if row["published"] is None:
        return "nothing published"
    if row["limit"]:
        return "part of the set"
    if row["variant"] or row["control"]:
        return "a variant"
    difference = row["score"] - row["published"]
    if abs(difference) <= row["tolerance"]:
        return REPRODUCED
    return ABOVE if difference > 0 else BELOW

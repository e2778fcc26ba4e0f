"""Small pictures of the samples that the page shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from .adapter import read_messages

LONGEST_SIDE = 224
QUALITY = 80


def thumbnails(task: Any, samples: Sequence[dict[str, Any]], each: int) -> None:
    """Mark the first samples that are right and the first that are not as `shown`, with `thumbnail`, a data URL."""
    split = task.config.test_split or task.config.validation_split
    right = [sample for sample in samples if sample["score"] == 1.0][:each]
    wrong = [sample for sample in samples if sample["score"] != 1.0][:each]
    for sample in right + wrong:
        sample["shown"] = True
        if sample["error"] is not None:  # its picture cannot be read
            continue
        images, _ = read_messages(task.doc_to_messages(task.dataset[split][sample["id"]]))
        sample["thumbnail"] = _data_url(images[0]) if images else None


def _data_url(image: Any) -> str:
    small = image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

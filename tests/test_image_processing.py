"""Pixels equal to the authors', and every kind of image a user may hand over."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from flashsloth.model.image_processing_flashsloth import FlashSlothImageProcessor

PARITY_DIR = os.environ.get("FLASHSLOTH_PARITY_DIR")


@pytest.mark.parity
@pytest.mark.skipif(PARITY_DIR is None, reason="FLASHSLOTH_PARITY_DIR is not set")
@pytest.mark.parametrize("name", ["a_640x427", "b_300x500", "c_1024x768"])
@pytest.mark.parametrize(("kind", "view_grid"), [("square", None), ("hd", [2, 2])])
def test_pixels_equal_the_authors(name, kind, view_grid):
    folder = Path(PARITY_DIR) / "official-tiny"
    expected = json.loads((folder / "cases.json").read_text())["pixels_sha256"][f"{kind}.{name}"]
    processor = FlashSlothImageProcessor(view_grid=view_grid)
    pixels = processor(folder / f"{name}.png", return_tensors="np")["pixel_values"]
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, processor.num_views, 3, 384, 384)
    levels = np.round((pixels * 0.5 + 0.5) * 255).astype(np.uint8)
    assert hashlib.sha256(levels.tobytes()).hexdigest() == expected

"""Ranges of pixel values: told so that no picture turns black in silence."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from flashsloth.model.image_loading import load_image

UNIT = np.tile(np.linspace(0.4, 1, 32, dtype=np.float32), (32, 1))
CORNER = np.zeros_like(UNIT)
CORNER[0, 0] = 1


def levels(source):
    return np.asarray(load_image(source)).astype(int)


@pytest.mark.filterwarnings("ignore:.*clipped to 0")
@pytest.mark.parametrize("as_source", [np.asarray, torch.from_numpy, Image.fromarray], ids=["numpy", "torch", "pil"])
@pytest.mark.parametrize(
    ("clean", "changed"),
    [
        (UNIT, UNIT + CORNER * np.float32(1e-6)),
        (UNIT, np.where(CORNER == 1, np.float32(1.2), UNIT)),
        (UNIT, np.where(CORNER == 1, np.float32(-1e-7), UNIT)),
        (UNIT, np.where(CORNER == 1, np.float32(-0.1), UNIT)),
        (UNIT * 255, np.where(CORNER == 1, np.float32(281), UNIT * 255)),
        (UNIT * 255, np.where(CORNER == 1, np.float32(-9), UNIT * 255)),
        (UNIT * 0, UNIT * np.float32(-1e-9)),
        ((UNIT * 255).astype(np.int32), np.where(CORNER == 1, 256, UNIT * 255).astype(np.int32)),
        ((UNIT * 255).astype(np.int32), np.where(CORNER == 1, -1, UNIT * 255).astype(np.int32)),
    ],
)
def test_a_value_just_beyond_the_range_changes_nothing_else(clean, changed, as_source):
    assert np.abs(levels(as_source(clean)) - levels(as_source(changed)))[1:].max() == 0


@pytest.mark.filterwarnings("ignore:.*clipped to 0")
def test_sixteen_bits_in_mode_i_may_overshoot():
    grey = (UNIT * 65535).astype(np.int32)
    changed = np.where(CORNER == 1, 66000, grey).astype(np.int32)
    assert np.abs(levels(Image.fromarray(grey)) - levels(Image.fromarray(changed)))[1:].max() == 0


def test_clipping_by_more_than_rounding_is_said():
    with pytest.warns(UserWarning, match=r"-0\.2 to 1\.1; they are clipped to 0\.\.1"):
        load_image(np.linspace(-0.2, 1.1, 64).reshape(8, 8))


@pytest.mark.parametrize(
    "source",
    [
        (UNIT > 0.5).astype(np.uint8),
        (UNIT > 0.5).astype(np.int64),
        torch.from_numpy(UNIT > 0.5).int(),
        (UNIT * 255).astype(np.uint16),
        (UNIT * 4095).astype(np.uint16),
        UNIT / 255,
        UNIT * 3,
        UNIT + CORNER * 2,
        UNIT + CORNER * 100,
        Image.fromarray(UNIT + CORNER * 1000),
        Image.fromarray((UNIT * 1000).astype(np.int32)),
        Image.fromarray((UNIT * 255).astype(np.uint16)),
    ],
)
def test_a_picture_that_turns_black_is_said(source):
    with pytest.warns(UserWarning, match="nearly black"):
        load_image(source)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["bool", "uint8", "uint16", "int32", "int64", "uint64", "float32", "float64"])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_picture_of_one_level_is_no_reason_to_warn(kind, share):
    top = {"bool": 1, "uint16": 65535, "float32": 1, "float64": 1}.get(kind, 255)
    expected = 255 * (share > 0) if kind == "bool" else round(255 * share + 1e-6)
    assert levels(np.full((4, 4), share * top).round(3).astype(kind)).mean() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (np.array([[0.5, np.inf]]), "not finite"),
        (torch.tensor([[0.5, float("nan")]]), "not finite"),
        (Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)), "not finite"),
        (Image.fromarray(np.full((2, 2), -5, dtype=np.float32)), "everywhere"),
        (Image.fromarray(np.full((2, 2), 100_000, dtype=np.int32)), "everywhere"),
        ((UNIT - 0.7) / 0.3, "normalised"),
        ((UNIT * 65535).astype(np.int64), "pass uint8, uint16"),
        (UNIT.astype(np.complex64), "values of type"),
        (torch.eye(4).to_sparse(), "tensor cannot be read"),
        (torch.empty(4, 4, device="meta"), "tensor cannot be read"),
        (np.broadcast_to(np.float64(1), (100_000, 100_000)), "max_pixels"),
    ],
)
def test_values_without_a_range_are_refused(source, cause):
    with pytest.raises(ValueError, match=cause):
        load_image(source)


def test_alpha_has_a_range_of_its_own():
    pixels = np.dstack([UNIT] * 3 + [np.full_like(UNIT, 255)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(levels(pixels), levels(pixels[..., :3]))

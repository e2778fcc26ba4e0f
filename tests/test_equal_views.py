"""Views of equal pixels are encoded once, and nothing else changes."""

import pytest
import torch

from flashsloth.inference.equal_views import encode_distinct_views, find_distinct_views
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", view_grid=(2, 2))


def pixels_with_blank_tiles(model) -> torch.Tensor:
    config = model.config
    torch.manual_seed(0)
    pixels_IVCHW = torch.randn(2, config.num_views, 3, config.image_height, config.image_width)
    pixels_IVCHW[0, 2:4] = -1.0
    pixels_IVCHW[1, 1] = -1.0
    return pixels_IVCHW


def test_equal_views_are_encoded_once_with_equal_features(model):
    pixels = pixels_with_blank_tiles(model)
    expected = model.model.encode_views(pixels)
    encoded = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    try:
        found = encode_distinct_views(model.model, pixels)
    finally:
        hook.remove()
    assert encoded == [2 * model.config.num_views - 2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_views_that_differ_in_one_value_are_kept_apart():
    views = torch.zeros(3, 3, 4, 4, dtype=torch.bfloat16)
    views[1, 2, 3, 3] = 2**-20
    assert find_distinct_views(views) == ([0, 1], [0, 1, 0])


def test_without_equal_views_the_features_are_those_of_the_model(model):
    pixels = torch.randn(1, *pixels_with_blank_tiles(model).shape[1:])
    assert torch.equal(encode_distinct_views(model.model, pixels), model.model.encode_views(pixels))


def test_wrong_shapes_are_refused_as_by_the_model(model):
    with pytest.raises(ValueError, match="this model takes"):
        encode_distinct_views(model.model, pixels_with_blank_tiles(model)[:, 1:])

"""What the configuration derives and refuses."""

import json

import pytest

from flashsloth import FlashSlothConfig
from tiny_models import DECODERS, ENCODERS, tiny_config


def test_published_sizes_are_the_default():
    config = FlashSlothConfig()
    assert (config.grid_height, config.grid_width) == (27, 27)
    assert config.num_patches_per_view == 729
    assert config.num_image_tokens == 81
    assert config.embedded_query_hidden_size == 576
    assert FlashSlothConfig(view_grid=[2, 2]).num_image_tokens == 405


@pytest.mark.parametrize("encoder", ENCODERS)
def test_round_trip_through_a_folder(encoder, tmp_path):
    config = tiny_config("qwen3", encoder, view_grid=[2, 2])
    config.save_pretrained(tmp_path)
    assert FlashSlothConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_unknown_key_is_named_with_its_neighbour():
    with pytest.raises(ValueError, match=r"unknown key 'compresor'.*'compressor'"):
        tiny_config(compresor="average")


def test_unknown_key_in_a_file(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pool_size": 3}))
    with pytest.raises(ValueError, match="unknown key 'pool_size'"):
        FlashSlothConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"compressor": "mean"}, "compressor is 'mean'; known are spatial_attention"),
        ({"compressor_window": 4}, "compressor_window 4 does not divide the 6 x 6"),
        ({"compressor_window": 0}, "compressor_window is 0"),
        ({"view_grid": [2]}, "view_grid"),
        ({"vision_feature_layer": -9}, "vision_feature_layer -9 is outside the 3 layers"),
        ({"vision_final_norm": True}, "vision_final_norm needs the last layer"),
        ({"embedded_query_layer": 3}, "embedded_query_layer is 3, but text_config has 3 layers"),
        ({"embedded_query_num_heads": 5}, "not a multiple of embedded_query_num_heads"),
        ({"num_query_tokens": -1}, "num_query_tokens is -1"),
        ({"image_token_id": 96}, "image_token_id is 96, outside the vocabulary"),
        ({"image_token_id": 3}, "are both 3"),
    ],
)
def test_impossible_sizes_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="text_config.model_type is 'gpt9'"):
        FlashSlothConfig(text_config={"model_type": "gpt9"})


def test_sub_configs_may_be_given_as_objects():
    config = FlashSlothConfig(
        vision_config=ENCODERS["clip"],
        text_config=DECODERS["llama"],
        embedded_query_layer=1,
        embedded_query_num_heads=4,
    )
    assert config.text_config.model_type == "llama"
    assert config.num_image_tokens == 4

"""What the configuration derives and refuses."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_misspelt_key_in_a_file(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "compressor_windov": 3}))
    with pytest.raises(ValueError, match="unknown key 'compressor_windov'.*'compressor_window'"):
        FlashSlothConfig.from_pretrained(tmp_path)


def test_keys_of_other_tools_are_kept_with_a_warning(tmp_path, caplog):
    config = tiny_config(pool_size=3)
    config.my_note = {"from": ["a", 1]}
    config.save_pretrained(tmp_path)
    loaded = FlashSlothConfig.from_pretrained(tmp_path)
    assert (loaded.my_note, loaded.pool_size) == ({"from": ["a", 1]}, 3)
    assert loaded.to_dict() == config.to_dict()
    assert "'my_note'" in caplog.text


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
        ({"view_grid": [0, 0]}, "view_grid is"),
        ({"view_grid": [10**6, 10**6]}, "pixels of an image's views"),
        ({"compressor_window": 10**9, "compressor_padding": "pad"}, "patches of an image's views"),
        ({"num_query_tokens": 10**12}, "num_query_tokens: 1e"),
        ({"embedded_query_hidden_size": 4 * 10**12}, "weights of projector"),
        ({"compressor_dropout": float("nan")}, "compressor_dropout is nan"),
        ({"projector_hidden_act": "glue"}, "projector_hidden_act is 'glue'; known are"),
    ],
)
def test_impossible_sizes_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "abc"),
        ("hidden_size", -1),
        ("hidden_size", 10**12),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_attention_heads", 10**12),
        ("intermediate_size", 10**400),
        ("model_type", ["siglip_vision_model"]),
    ],
)
def test_hostile_sizes_of_a_part_are_refused_in_a_short_sentence(part, field, value):
    values = tiny_config("phi").to_dict()
    values[part] = {**values[part], field: value}
    with pytest.raises(ValueError, match=part) as refused:
        FlashSlothConfig(**values)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(("field", "value"), [("image_size", 0), ("patch_size", 10**6), ("image_size", [1, 2, 3])])
def test_images_without_patches_are_refused(field, value):
    values = tiny_config("phi").to_dict()
    values["vision_config"][field] = value
    with pytest.raises(ValueError, match=r"image_size|patch"):
        FlashSlothConfig(**values)


garbage = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers() | st.sampled_from([-1, 0, 2**70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_values_end_in_a_configuration_or_a_value_error(data):
    values = tiny_config("qwen3").to_dict()
    place = data.draw(st.sampled_from([values, values["vision_config"], values["text_config"]]))
    for key in data.draw(st.lists(st.sampled_from(sorted(place)), min_size=1, max_size=3)):
        place[key] = data.draw(garbage)
    try:
        FlashSlothConfig(**values)
    except ValueError as error:
        assert len(str(error)) < 600


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

"""The formulae of the static bench agree with operations counted on small models of every family."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flashsloth.bench import anatomy, rebuilt
from flashsloth.bench.arithmetic import (
    counted_flops,
    decode_flops,
    embedded_query_flops,
    prefill_flops,
    window_lengths,
)
from flashsloth.bench.token_rules import VisualInput
from flashsloth.model.backbones import CACHE_ARGUMENT, decoder_layers
from flashsloth.model.compressors import COMPRESSORS
from flashsloth.model.configuration_flashsloth import FlashSlothConfig
from flashsloth.model.embedded_query import EmbeddedQueryInputs
from flashsloth.model.modeling_flashsloth import FlashSlothForConditionalGeneration

TEXT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 16,
}  # fmt: skip
DECODERS = {
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "qwen3_5_text": DELTA,
}


def counted(module: nn.Module, call) -> int:
    """Operations of a call; those of rotary position tables are left out, they are no part of any layer."""
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        call()
    by_module = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for name, ops in by_module.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("positions", [7, 70])
def test_language_model(model_type: str, positions: int) -> None:
    if model_type == "qwen3_5_text" and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("older versions compute the gated delta rule by other products")
    config = CONFIG_MAPPING[model_type](**TEXT | DECODERS[model_type])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    embeds = torch.empty(1, positions, config.hidden_size, device="meta")
    flops = counted(model, lambda: model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1))
    layers = decoder_layers(model.base_model)
    assert prefill_flops(layers, config, model.get_output_embeddings(), positions) == flops


@pytest.mark.parametrize("model_type", [name for name in DECODERS if name != "qwen3_5_text"])
def test_one_more_token(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**TEXT | DECODERS[model_type])
    config.sliding_window = None if getattr(config, "sliding_window", None) is None else 512
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    context, width = 20, config.hidden_size
    cache = model(inputs_embeds=torch.empty(1, context, width, device="meta"), use_cache=True)[CACHE_ARGUMENT]
    token = torch.empty(1, 1, width, device="meta")
    flops = counted(model, lambda: model(inputs_embeds=token, use_cache=True, **{CACHE_ARGUMENT: cache}))
    layers = decoder_layers(model.base_model)
    # the reference of the short convolution computes one position more than it returns
    spare = sum(2 * m.weight.numel() for m in layers.modules() if isinstance(m, nn.Conv1d))
    assert decode_flops(layers, config, model.get_output_embeddings(), context + 1) + spare == flops


def test_windows_cover_a_grid_and_end_at_its_edges() -> None:
    assert window_lengths(10, 9, 4) == [16, 16, 4, 16, 16, 4, 8, 8, 2]


def small(name: str, **values) -> nn.Module:
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**values)).eval()


def tower(model_type: str, **changes) -> transformers.PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**VISION | {"patch_size": 4, "vision_use_head": False} | changes)


def text(model_type: str = "llama", **changes) -> transformers.PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**TEXT | changes)


def assert_vision(parts: anatomy.Anatomy, image: VisualInput, model: nn.Module, call, left_out=None) -> None:
    flops = counted(model, call) - (0 if left_out is None else counted(model, left_out))
    assert parts.vision_flops(image) + parts.connector_flops(image, 0) == flops > 0


def qwen_inputs(grid: tuple[int, int], patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(grid[0] * grid[1], 3 * 2 * patch * patch), torch.tensor([[1, *grid]])


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_qwen_vision(name: str, grid: tuple[int, int]) -> None:
    vision = {
        "Qwen2VL": {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2},
        "Qwen2_5_VL": {
            "hidden_size": 32, "intermediate_size": 72, "out_hidden_size": 48, "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "Qwen3VL": {
            "hidden_size": 32, "intermediate_size": 72, "out_hidden_size": 48, "deepstack_visual_indexes": [0, 1],
        },
    }[name]  # fmt: skip
    sections = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
    dissect = {"Qwen2VL": anatomy.qwen2_vl, "Qwen2_5_VL": anatomy.qwen2_5_vl, "Qwen3VL": anatomy.qwen3_vl}[name]
    model = small(
        f"{name}ForConditionalGeneration", text_config=TEXT | sections, attn_implementation="eager",
        vision_config={"depth": 3, "num_heads": 4, "patch_size": 4, **vision},
    )  # fmt: skip
    pixels, shape = qwen_inputs(grid, 4)
    image = VisualInput((grid,), grid[0] * grid[1] // 4)
    assert_vision(dissect(model), image, model, lambda: model.model.get_image_features(pixels, shape))


def test_internvl_vision() -> None:
    vision = VISION | {"patch_size": [4, 4], "image_size": [24, 24], "attention_bias": True}
    with torch.device("meta"):
        model = small(
            "InternVLForConditionalGeneration", text_config=text(), vision_config=vision, downsample_ratio=0.5
        )
    pixels = torch.empty(5, 3, 24, 24, device="meta")
    image = VisualInput(((6, 6),) * 5, 5 * 9)
    assert_vision(anatomy.internvl(model), image, model, lambda: model.model.get_image_features(pixels))


def test_smolvlm_vision() -> None:
    vision = VISION | {"patch_size": 4, "image_size": 24}
    model = small(
        "SmolVLMForConditionalGeneration", text_config=text(), vision_config=vision, scale_factor=3,
        attn_implementation="eager",
    )  # fmt: skip
    pixels = torch.ones(1, 5, 3, 24, 24)
    image = VisualInput(((6, 6),) * 5, 5 * 4)
    assert_vision(anatomy.smolvlm(model), image, model, lambda: model.model.get_image_features(pixels))


@pytest.mark.parametrize("name", ["PaliGemma", "Gemma3"])
def test_siglip_and_projector_vision(name: str) -> None:
    family = {
        "PaliGemma": {"text_config": text("gemma2", head_dim=16), "projection_dim": 48},
        "Gemma3": {"text_config": text("gemma3_text", head_dim=16), "mm_tokens_per_image": 9},
    }[name]
    with torch.device("meta"):
        model = small(
            f"{name}ForConditionalGeneration", vision_config=tower("siglip_vision_model", image_size=24), **family
        )
    pixels = torch.empty(2, 3, 24, 24, device="meta")
    image = VisualInput(((6, 6),) * 2, 2 * (9 if name == "Gemma3" else 36))
    parts = anatomy.siglip_and_projector(model)
    assert_vision(parts, image, model, lambda: model.model.get_image_features(pixels))


def test_lfm2_vl_vision() -> None:
    model = small(
        "Lfm2VlForConditionalGeneration", text_config=text("lfm2", **DECODERS["lfm2"]), downsample_factor=2,
        vision_config=tower("siglip2_vision_model", num_patches=36), projector_hidden_size=40,
        attn_implementation="eager",
    )  # fmt: skip
    grids = torch.tensor([[6, 6], [6, 6]])
    call = lambda: model.model.get_image_features(torch.zeros(2, 36, 48), grids, torch.ones(2, 36).long())  # noqa: E731
    image = VisualInput(((6, 6),) * 2, 2 * 9)
    # from transformers 5.24 on, position embeddings are resized by a matrix product; it is no part of any layer
    embeddings = model.model.vision_tower.get_submodule("embeddings")
    table = embeddings.position_embedding.weight.view(6, 6, -1)
    resize = lambda: embeddings.resize_positional_embeddings(table, grids, max_length=36)  # noqa: E731
    assert_vision(anatomy.siglip_and_projector(model), image, model, call, left_out=resize)


def test_minicpm_v_4_6_vision() -> None:
    model = small(
        "MiniCPMV4_6ForConditionalGeneration", text_config=text("qwen3_5_text", **DELTA).to_dict(),
        vision_config=VISION | {"patch_size": 4, "image_size": 32}, insert_layer_id=1, attn_implementation="eager",
    )  # fmt: skip
    grids = ((4, 12), (4, 12))
    pixels = torch.zeros(1, 3, 4, 4 * sum(rows * columns for rows, columns in grids))
    image = VisualInput(grids, 3 + 3)
    call = lambda: model.model.get_image_features(pixels, target_sizes=torch.tensor(grids))  # noqa: E731
    assert_vision(anatomy.minicpm_v_4_6(model), image, model, call)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_flashsloth_vision_and_queries(compressor: str) -> None:
    config = FlashSlothConfig(
        vision_config=tower("siglip_vision_model", image_size=24).to_dict(), text_config=text("phi").to_dict(),
        compressor=compressor, num_query_tokens=3, embedded_query_layer=1, embedded_query_num_heads=4,
        view_grid=[1, 2],
    )  # fmt: skip
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(config).eval()
    image = VisualInput(((6, 6),) * 3, config.num_image_tokens)
    prompt, queries, patches = 50, config.num_query_tokens, image.patches
    flops = counted(model, lambda: model.get_image_features(torch.empty(1, 3, 3, 24, 24, device="meta")))
    inputs = EmbeddedQueryInputs(
        features_IME=torch.empty(1, patches, 32, device="meta"),
        image_index_BK=torch.empty(1, 1, dtype=torch.long, device="meta"),
        image_mask_BGK=torch.empty(1, 1, 1, dtype=torch.bool, device="meta"),
        question_mask_BGT=torch.empty(1, 1, prompt, dtype=torch.bool, device="meta"),
        query_index_BGQ=torch.empty(1, 1, queries, dtype=torch.long, device="meta"),
    )
    module = model.model.embedded_query
    embq = counted(module, lambda: module(torch.empty(1, prompt, 48, device="meta"), inputs))
    assert embedded_query_flops(module, queries, prompt, patches) == embq > 0
    parts = anatomy.flashsloth(model)
    assert parts.vision_flops(image) + parts.connector_flops(image, prompt) == flops + embq


@pytest.mark.parametrize("family", ["mobilevlm_v2", "minicpm_v_2", "moondream2"])
def test_rebuilt_vision(family: str) -> None:
    encoder = tower("clip_vision_model" if family == "mobilevlm_v2" else "siglip_vision_model", image_size=24)
    connectors = {
        "mobilevlm_v2": lambda: rebuilt.DownsampleConnector(32, 48, side=3),
        "minicpm_v_2": lambda: rebuilt.Resampler(32, 48, queries=4, num_heads=4),
        "moondream2": lambda: rebuilt.GlobalAndLocalConnector(32, 80, 48),
    }
    with torch.device("meta"):
        model = rebuilt.Assembly(rebuilt.vision_tower(encoder), connectors[family](), text()).eval()
    tokens = {"mobilevlm_v2": 9, "minicpm_v_2": 3 * 4, "moondream2": 36}[family]
    image = VisualInput(((6, 6),) * (1 if family == "mobilevlm_v2" else 3), tokens)
    pixels = torch.empty(image.views, 3, 24, 24, device="meta")

    def call() -> torch.Tensor:
        features = model.vision_tower(pixel_values=pixels).last_hidden_state[:, -36:]
        # the global view beside one map stitched from the others
        inputs = [features[:1], features[:1]] if family == "moondream2" else [features]
        return model.connector(*inputs)

    assert call().shape == (1 if family != "minicpm_v_2" else 3, tokens // (3 if family == "minicpm_v_2" else 1), 48)
    assert_vision(getattr(anatomy, family)(model), image, model, call)


def test_fastvithd_is_timms_encoder() -> None:
    with torch.device("meta"):
        encoder = rebuilt.FastViTHD()
    # parameters and operations of timm 1.0.31's fastvit_mci3 without head, with inference_mode=True
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 122_714_208
    assert counted_flops(encoder, (1, 3, 1024, 1024)) == 486_707_822_592


def test_fastvithd_by_hand() -> None:
    with torch.device("meta"):
        encoder = rebuilt.FastViTHD(depths=(1, 1), width=8, attention_stages=1, head_size=8, reduction=4)
    # pixels at strides 2, 4 and 8 of an image of 32 x 32
    maps = {"half": 16 * 16, "quarter": 8 * 8, "eighth": 4 * 4}
    stem = 2 * maps["half"] * 3 * 8 * 9 + 2 * maps["quarter"] * (8 * 9 + 8 * 8)
    first = 2 * maps["quarter"] * (8 * 9 + 8 * 49 + 2 * 8 * 32)
    down = 2 * maps["eighth"] * (16 * 49 + 16 * 16)
    attention = 2 * maps["eighth"] * (16 * 48 + 16 * 16) + 4 * maps["eighth"] ** 2 * 16
    second = 2 * maps["eighth"] * 16 * 49 + attention + 2 * maps["eighth"] * (16 * 49 + 2 * 16 * 64)
    last = 2 * maps["eighth"] * 32 * 9 + 2 * 2 * 32 * 4
    assert counted_flops(encoder, (1, 3, 32, 32)) == stem + first + down + second + last

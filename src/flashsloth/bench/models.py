"""The models that are compared, built from configurations alone.

Sizes come from published configuration files; what is assumed is said in each entry's `notes`. Whether embeddings and
head are tied is always stated, since the defaults of the configuration classes differ.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from flashsloth.model.configuration_flashsloth import FlashSlothConfig
from flashsloth.model.modeling_flashsloth import FlashSlothForConditionalGeneration

from . import anatomy
from .anatomy import Dissect
from .rebuilt import (
    Assembly,
    DownsampleConnector,
    FastViTHD,
    GlobalAndLocalConnector,
    Resampler,
    vision_tower,
)
from .token_rules import (
    TokenRule,
    adaptive_slices,
    fixed,
    native_resolution,
    native_then_tiles,
    overlapping_crops,
    tiles_of_long_side,
    tiles_of_nearest_ratio,
)

Origin = Literal["own", "native", "rebuilt"]


@dataclass(frozen=True)
class BenchModel:
    """A model to compare.

    Attributes:
        title: as its makers write it.
        origin: "own", "native" (a class of transformers), or "rebuilt" (parts of the same shape put together here).
        build: makes it with random weights, on whatever device is the default.
        dissect: finds its parts.
        rule: from an image's size to visual tokens, by its default preprocessing.
        published_parameters: where a published count could be found.
        notes: what is assumed.
    """

    title: str
    origin: Origin
    build: Callable[[], nn.Module]
    dissect: Dissect
    rule: TokenRule
    published_parameters: int | None = None
    notes: str = ""

    @property
    def available(self) -> bool:
        """Whether the installed transformers has what it is built from."""
        return not isinstance(self.build, Native) or self.build.available

    def on_meta(self) -> nn.Module:
        """The model without memory for its weights."""
        with torch.device("meta"):
            model = self.build()
            # an assembly of parts ties nothing itself; its language model does
            getattr(model, "tie_weights", model.modules)()
        return model


def _config(model_type: str, **values: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**values)


class Native:
    """Builds a class of transformers, which is imported when it is needed.

    Args:
        name: of the class.
        values: of its configuration; a function is called for a sub-configuration.
    """

    def __init__(self, name: str, **values: Any) -> None:
        self.name, self.values = name, values

    @property
    def available(self) -> bool:
        """Whether the installed transformers has the class."""
        return hasattr(transformers, self.name)

    def __call__(self) -> nn.Module:
        if not self.available:
            raise ValueError(
                f"transformers {transformers.__version__} has no {self.name}; install a newer transformers, or leave "
                "the model out."
            )
        model_class = getattr(transformers, self.name)
        # copied, since the classes change the dictionaries they are given
        values = {key: value() if callable(value) else copy.deepcopy(value) for key, value in self.values.items()}
        return model_class(model_class.config_class(**values))


def _decoder(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **more,
    }


def _so400m(**changes: Any) -> dict[str, Any]:
    """SigLIP so400m, without pooling head."""
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    return {**sizes, "patch_size": 14, "vision_use_head": False, **changes}


QWEN3_06B = {"model_type": "qwen3", **_decoder(1024, 3072, 28, 16, 8, 151936, tied=True, head_dim=128)}
QWEN3_17B = {"model_type": "qwen3", **_decoder(2048, 6144, 28, 16, 8, 151936, tied=True, head_dim=128)}
SMOLLM2_135M = {"model_type": "llama", **_decoder(576, 1536, 30, 9, 3, 49152, tied=True)}
SMOLLM2_360M = {"model_type": "llama", **_decoder(960, 2560, 32, 15, 5, 49152, tied=True)}
SIGLIP2_BASE = {
    "model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 384, "patch_size": 16,
}  # fmt: skip
QWEN2_15B = _decoder(1536, 8960, 28, 12, 2, 151936, tied=True)


def _internvl(text_type: str, text: dict[str, Any]) -> Callable[[], nn.Module]:
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": [14, 14], "image_size": [448, 448], "attention_bias": True, "use_qk_norm": False,
    }  # fmt: skip
    return Native(
        "InternVLForConditionalGeneration", text_config=functools.partial(_config, text_type, **text),
        vision_config=vision, tie_word_embeddings=False,
    )  # fmt: skip


def _paligemma2(image_size: int) -> Callable[[], nn.Module]:
    text = _decoder(2304, 9216, 26, 8, 4, 257216, tied=True, head_dim=256)
    return Native(
        "PaliGemmaForConditionalGeneration", text_config=functools.partial(_config, "gemma2", **text),
        vision_config=functools.partial(_config, "siglip_vision_model", **_so400m(image_size=image_size)),
        projection_dim=2304, tie_word_embeddings=True,
    )  # fmt: skip


def _smolvlm(text: dict[str, Any], vision: dict[str, Any], scale_factor: int) -> Callable[[], nn.Module]:
    return Native(
        "SmolVLMForConditionalGeneration", text_config=functools.partial(_config, "llama", **text),
        vision_config=vision, scale_factor=scale_factor, tie_word_embeddings=False,
    )  # fmt: skip


def _minicpm_v_4_6() -> Callable[[], nn.Module]:
    text = _decoder(
        1024, 3584, 24, 8, 2, 248320, tied=True, head_dim=256,
        linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
        layer_types=["full_attention" if index % 4 == 3 else "linear_attention" for index in range(24)],
    )  # fmt: skip
    vision = _so400m(image_size=980)
    del vision["vision_use_head"]  # it has none
    return Native(
        "MiniCPMV4_6ForConditionalGeneration", text_config={"model_type": "qwen3_5_text", **text},
        vision_config=vision, tie_word_embeddings=True,
    )  # fmt: skip


def _lfm2_vl() -> Callable[[], nn.Module]:
    attention_layers = (2, 5, 8, 10, 12, 14)
    kinds = ["full_attention" if index in attention_layers else "conv" for index in range(16)]
    text = _decoder(2048, 12288, 16, 32, 8, 65536, tied=True, layer_types=kinds)
    vision = _so400m(patch_size=16, num_hidden_layers=26, num_patches=256)
    return Native(
        "Lfm2VlForConditionalGeneration", text_config=functools.partial(_config, "lfm2", **text),
        vision_config=functools.partial(_config, "siglip2_vision_model", **vision),
        downsample_factor=2, projector_hidden_size=2560, tie_word_embeddings=True,
    )  # fmt: skip


def _gemma3() -> Callable[[], nn.Module]:
    text = _decoder(2560, 10240, 34, 8, 4, 262208, tied=True, head_dim=256, sliding_window=1024)
    return Native(
        "Gemma3ForConditionalGeneration", text_config=functools.partial(_config, "gemma3_text", **text),
        vision_config=functools.partial(_config, "siglip_vision_model", **_so400m(image_size=896)),
        mm_tokens_per_image=256, tie_word_embeddings=True,
    )  # fmt: skip


def _siglip_tower(**changes: Any) -> nn.Module:
    return vision_tower(_config("siglip_vision_model", **_so400m(**changes)))


def _mobilevlm_v2() -> nn.Module:
    clip = _config(
        "clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = _config("llama", **_decoder(2560, 6912, 32, 32, 32, 32000, tied=False))
    return Assembly(vision_tower(clip), DownsampleConnector(1024, 2560, side=12), text)


def _minicpm_v_2() -> nn.Module:
    text = _config("llama", **_decoder(2304, 5760, 40, 36, 36, 122753, tied=False))
    tower = _siglip_tower(image_size=448, num_hidden_layers=26)
    return Assembly(tower, Resampler(1152, 2304, queries=64, num_heads=18), text)


def _moondream2() -> nn.Module:
    text = _config("phi", **_decoder(2048, 8192, 24, 32, 32, 51200, tied=False, partial_rotary_factor=0.5))
    return Assembly(_siglip_tower(image_size=378), GlobalAndLocalConnector(1152, 8192, 2048), text)


def _fastvlm() -> nn.Module:
    connector = nn.Sequential(nn.Linear(3072, 1536), nn.GELU(), nn.Linear(1536, 1536))
    return Assembly(FastViTHD(), connector, _config("qwen2", **QWEN2_15B | {"tie_word_embeddings": False}))


_QWEN2_VISION = {"num_heads": 16, "patch_size": 14, "depth": 32}
_SIGLIP_384, _SIGLIP2_BASE_384, _HD_GRID = 27, 24, [2, 2]
_QWEN2_RULE = native_resolution(patch=14, merge=2, min_pixels=56 * 56, max_pixels=12_845_056)
_INTERNVL_RULE = tiles_of_nearest_ratio(tile_grid=32, tokens_per_tile=256, tile=448, max_tiles=12)
_FLASHSLOTH_RULE = fixed(_SIGLIP_384, 81)


def _own(title: str, notes: str, rule: TokenRule = _FLASHSLOTH_RULE, **values: Any) -> BenchModel:
    return BenchModel(
        title, "own", lambda: FlashSlothForConditionalGeneration(FlashSlothConfig(**values)), anatomy.flashsloth, rule,
        notes=notes,
    )  # fmt: skip


def _other_decoder(title: str, text_config: dict[str, Any]) -> BenchModel:
    notes = f"No such weights exist; {title}'s sizes in Phi-2's place."
    return _own(f"FlashSloth, {title}", notes, text_config=text_config)


def _elastic(title: str, text_config: dict[str, Any]) -> BenchModel:
    """Of the recipe with that language model in `configs/`."""
    notes = (
        f"No such weights exist; SigLIP 2 base/16 at 384 px and {title}'s sizes. Of the numbers of visual tokens each "
        "request chooses one; the costs are those of the first."
    )
    return _own(
        f"FlashSloth, {title}, elastic", notes, fixed(_SIGLIP2_BASE_384, 64), vision_config=SIGLIP2_BASE,
        text_config=text_config, compressor_windows=[3, 4, 6, 12], embedded_query_num_heads=12,
    )  # fmt: skip


MODELS: dict[str, BenchModel] = {
    "flashsloth": _own(
        "FlashSloth", "SigLIP so400m/14 at 384 px, 26 layers; Phi-2; 9 query tokens join the prompt.",
    ),
    "flashsloth-hd": _own(
        "FlashSloth-HD", "As FlashSloth, five views of every image.", fixed(_SIGLIP_384, 81, views=5),
        view_grid=_HD_GRID,
    ),
    "siglip-phi2-729": _own(
        "SigLIP + Phi-2, 729 tokens",
        "FlashSloth's parts without compression and queries; the shape of Imp-v1-3B.",
        fixed(_SIGLIP_384, 729), compressor="none", num_query_tokens=0,
    ),
    "siglip-phi2-average": _own(
        "SigLIP + Phi-2, average", "FlashSloth's parts with a 3 x 3 average, without queries.",
        compressor="average", num_query_tokens=0,
    ),
    "flashsloth-qwen3-0.6b": _other_decoder("Qwen3-0.6B", QWEN3_06B),
    "flashsloth-qwen3-1.7b": _other_decoder("Qwen3-1.7B", QWEN3_17B),
    "flashsloth-smollm2-360m": _other_decoder("SmolLM2-360M", SMOLLM2_360M),
    "flashsloth-qwen3-0.6b-elastic": _elastic("Qwen3-0.6B", QWEN3_06B),
    "flashsloth-smollm2-135m-elastic": _elastic("SmolLM2-135M", SMOLLM2_135M),
    "qwen2-vl-2b": BenchModel(
        "Qwen2-VL-2B", "native",
        Native(
            "Qwen2VLForConditionalGeneration", text_config=dict(QWEN2_15B), tie_word_embeddings=True,
            vision_config={**_QWEN2_VISION, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4},
        ),
        anatomy.qwen2_vl, _QWEN2_RULE, 2_208_985_600,
        notes="Pixel bounds of the published preprocessor (3136 to 12,845,056), not of the class.",
    ),
    "qwen2.5-vl-3b": BenchModel(
        "Qwen2.5-VL-3B", "native",
        Native(
            "Qwen2_5_VLForConditionalGeneration", tie_word_embeddings=True,
            text_config=_decoder(2048, 11008, 36, 16, 2, 151936, tied=True),
            vision_config={
                **_QWEN2_VISION, "hidden_size": 1280, "intermediate_size": 3420, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 2048,
            },
        ),
        anatomy.qwen2_5_vl, _QWEN2_RULE, 3_754_622_976,
        notes="Pixel bounds of the published preprocessor (3136 to 12,845,056), not of the class.",
    ),
    "qwen3-vl-2b": BenchModel(
        "Qwen3-VL-2B", "native",
        Native(
            "Qwen3VLForConditionalGeneration", tie_word_embeddings=True,
            text_config=_decoder(2048, 6144, 28, 16, 8, 151936, tied=True, head_dim=128),
            vision_config={
                "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
                "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17],
            },
        ),
        anatomy.qwen3_vl, native_resolution(patch=16, merge=2, min_pixels=65_536, max_pixels=16_777_216),
        2_127_532_032,
    ),
    "internvl2-2b": BenchModel(
        "InternVL2-2B", "rebuilt", _internvl("llama", _decoder(2048, 8192, 24, 16, 8, 92553, tied=False)),
        anatomy.internvl, _INTERNVL_RULE, 2_205_754_368,
        notes="InternLM2 is not in transformers: a Llama of its sizes; the count published is InternVL2.5-2B's, of "
        "the same shape.",
    ),
    "internvl3-1b": BenchModel(
        "InternVL3-1B", "native", _internvl("qwen2", _decoder(896, 4864, 24, 14, 2, 151674, tied=False)),
        anatomy.internvl, _INTERNVL_RULE, 938_193_024,
        notes="The count published is InternVL2.5-1B's, of the same shape.",
    ),
    "internvl3-2b": BenchModel(
        "InternVL3-2B", "native", _internvl("qwen2", QWEN2_15B | {"vocab_size": 151674, "tie_word_embeddings": False}),
        anatomy.internvl, _INTERNVL_RULE,
        notes="Language model by family (Qwen2.5-1.5B with InternVL3's vocabulary); no published count found.",
    ),
    "minicpm-v-2": BenchModel(
        "MiniCPM-V-2", "rebuilt", _minicpm_v_2, anatomy.minicpm_v_2,
        adaptive_slices(14, 14, 448, 9, lambda rows, columns: 64),
        notes="A Llama of MiniCPM-2B's sizes with an untied head (the makers state 2.8B); slices are chosen as in the "
        "processor of MiniCPM-V 4.6.",
    ),
    "minicpm-v-4.6": BenchModel(
        "MiniCPM-V-4.6", "native", _minicpm_v_4_6(), anatomy.minicpm_v_4_6,
        adaptive_slices(14, 56, 448, 9, lambda rows, columns: rows * columns // 16),
        notes="16 patches a token (the default); heads follow from the stated 752M + 548M parameters.",
    ),
    "smolvlm-500m": BenchModel(
        "SmolVLM-500M", "native",
        _smolvlm(
            _decoder(960, 2560, 32, 15, 5, 49280, tied=False),
            {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                "patch_size": 16, "image_size": 512,
            },
            scale_factor=4,
        ),
        anatomy.smolvlm, tiles_of_long_side(tile_grid=32, tokens_per_tile=64, tile=512, long_side=2048),
        notes="Untied head, as its quantized files suggest.",
    ),
    "smolvlm2-2.2b": BenchModel(
        "SmolVLM2-2.2B", "native",
        _smolvlm(
            _decoder(2048, 8192, 24, 32, 32, 49280, tied=False), _so400m(image_size=384), scale_factor=3
        ),
        anatomy.smolvlm, tiles_of_long_side(tile_grid=27, tokens_per_tile=81, tile=384, long_side=1536),
        2_246_784_880,
    ),
    "paligemma2-3b-224": BenchModel(
        "PaliGemma2-3B, 224 px", "native", _paligemma2(224), anatomy.siglip_and_projector, fixed(16, 256),
    ),
    "paligemma2-3b-448": BenchModel(
        "PaliGemma2-3B, 448 px", "native", _paligemma2(448), anatomy.siglip_and_projector, fixed(32, 1024),
    ),
    "fastvlm-1.5b": BenchModel(
        "FastVLM-1.5B", "rebuilt", _fastvlm, anatomy.fastvlm, fixed(16, 256),
        notes="The native class needs timm: its FastViTHD encoder is rebuilt with merged branches; Qwen2-1.5B by "
        "family with an untied head.",
    ),
    "lfm2-vl-1.6b": BenchModel(
        "LFM2-VL-1.6B", "native", _lfm2_vl(), anatomy.siglip_and_projector,
        native_then_tiles(16, 2, 64, 256, tile=512, min_tiles=2, max_tiles=10, tolerance=2.0), 1_584_804_000,
        notes="26 vision layers and the projector's norm follow from the published count; a batch of tiles and a "
        "smaller thumbnail is charged without padding.",
    ),
    "gemma3-4b": BenchModel(
        "Gemma 3 4B", "native", _gemma3(), anatomy.siglip_and_projector, fixed(64, 256), 4_300_079_472,
        notes="Pan and scan off (the default).",
    ),
    "mobilevlm-v2-3b": BenchModel(
        "MobileVLM-V2-3B", "rebuilt", _mobilevlm_v2, anatomy.mobilevlm_v2, fixed(24, 144),
        notes="All 24 layers of CLIP run, though the features are those before the last.",
    ),
    "moondream2": BenchModel(
        "Moondream2", "rebuilt", _moondream2, anatomy.moondream2,
        overlapping_crops(crop=378, patch=14, margin=4, max_crops=12, tokens=729),
        notes="A SigLIP so400m at 378 px and a Phi of Phi-1.5's sizes, without the region head; the language model "
        "reads 729 tokens whatever the number of crops.",
    ),
}  # fmt: skip


def model_named(name: str) -> BenchModel:
    """The model of that exact name.

    Raises:
        ValueError: no such model; names the nearest.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(MODELS)}."
        raise ValueError(f"unknown model {name!r}; {hint}")
    return MODELS[name]

"""The format of the authors' released checkpoints: tensor names, facts their config leaves out, config both ways."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PhiConfig, SiglipVisionConfig

from ..model.configuration_flashsloth import FlashSlothConfig

Shapes = Mapping[str, tuple[int, ...]]

OFFICIAL_MODEL_TYPE = "phi"
OFFICIAL_ARCHITECTURE = "FlashSlothForCausalLM"

# What the authors' code fixes and their config.json does not say.
OFFICIAL_FACTS: dict[str, Any] = {
    "compressor": "spatial_attention",
    "compressor_window": 3,
    "compressor_dropout": 0.1,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "num_query_tokens": 9,
    "embedded_query_layer": 7,
    "embedded_query_uses_question": True,
    "hd_view_grid": [2, 2],
    "vision_head_width": 72,
    "vision_hidden_size": 1152,
    "vision_intermediate_size": 4304,
    "vision_patch_size": 14,
    "vision_image_size": 384,
    # Its embedding is added to every learned query token at every forward of the authors' code.
    "folded_token_id": 764,
    "query_token": "<learnable>",
    "query_token_id": 50295,
    "eos_token": "</s>",
    "eos_token_id": 50296,
    # Not in the released vocabulary; the row after the last used one is free.
    "image_token": "<image>",
    "image_token_id": 50297,
    "pad_token_id": 50256,
    "bos_token_id": 50256,
}

_VISION = "model.vision_tower.vision_tower.vision_model."
_ATTENTIONS = {"t2q_attn": "text_attention", "i2q_attn": "image_attention"}
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_NORMS = {"ln_q": "norm_query", "ln_text": "norm_text", "ln_kv": "norm_image"}

EMBEDDING = "model.embed_tokens.weight"
QUERY_TOKENS = "model.learnable_tokens.token"

# Authors' prefix -> ours; no prefix is the beginning of another one on its side.
PREFIXES: dict[str, str] = {
    _VISION: "model.vision_tower.",
    "model.pooling.mlp.": "model.compressor.score.",
    "model.mm_projector.": "model.projector.",
    QUERY_TOKENS: "model.query_tokens.weight",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.final_layernorm.": "model.language_model.final_layernorm.",
    "lm_head.": "lm_head.",
    "model.lqformer.down_projector_learnable_text.": "model.embedded_query.down_projection_text.",
    "model.lqformer.down_projector_image.": "model.embedded_query.down_projection_image.",
    "model.lqformer.up_projector.": "model.embedded_query.up_projection.",
    **{
        f"model.lqformer.layers.0.{attention}.{projection}.": f"model.embedded_query.{ours}.{role}."
        for attention, ours in _ATTENTIONS.items()
        for projection, role in _PROJECTIONS.items()
    },
    **{f"model.lqformer.layers.0.{norm}.": f"model.embedded_query.{ours}." for norm, ours in _NORMS.items()},
}
# transformers may write the vision model with or without its own base prefix.
_SAVED_VISION_PREFIX = "model.vision_tower.vision_model."

_TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "layer_norm_eps",
    "resid_pdrop", "embd_pdrop", "attention_dropout", "qk_layernorm", "tie_word_embeddings",
)  # fmt: skip

# Keys of the released config.json that say nothing about the tensors.
_CONFIG_TEMPLATE: dict[str, Any] = {
    "architectures": [OFFICIAL_ARCHITECTURE],
    "model_type": OFFICIAL_MODEL_TYPE,
    "bos_token_id": OFFICIAL_FACTS["bos_token_id"],
    # As released: the authors' code stops at "</s>" by other means.
    "eos_token_id": OFFICIAL_FACTS["pad_token_id"],
    "image_aspect_ratio": "square",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "rope_scaling": None,
    "tokenizer_model_max_length": 3072,
    "tokenizer_padding_side": "right",
    "use_cache": True,
    "use_mm_proj": True,
}


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an authors' checkpoint."""
    return config.get("model_type") == OFFICIAL_MODEL_TYPE and OFFICIAL_ARCHITECTURE in (
        config.get("architectures") or ()
    )


def to_ours(name: str) -> str | None:
    """Our name of an authors' tensor, None when the format has no such tensor."""
    return _translate(name, PREFIXES)


def to_theirs(name: str) -> str | None:
    """The authors' name of one of our tensors, None when their format has no place for it."""
    if name.startswith(_SAVED_VISION_PREFIX):
        name = "model.vision_tower." + name.removeprefix(_SAVED_VISION_PREFIX)
    return _translate(name, {ours: theirs for theirs, ours in PREFIXES.items()})


def _translate(name: str, prefixes: Mapping[str, str]) -> str | None:
    for prefix, replacement in prefixes.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return None


def config_from_official(
    official: Mapping[str, Any],
    shapes: Shapes,
    *,
    vision_num_attention_heads: int | None = None,
    image_size: int | None = None,
) -> FlashSlothConfig:
    """Our config of an authors' checkpoint, from its config.json and the shapes of its tensors.

    Where a tensor that carries a size is missing, the authors' value stands in, so that the check of all tensors that
    follows can name it.

    Raises:
        ValueError: a size cannot be derived, or config.json lacks a field.
    """
    facts = OFFICIAL_FACTS
    missing = [key for key in ("num_attention_heads", "num_hidden_layers", "hidden_size") if official.get(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}, which the tensors cannot tell.")

    vocab_size = official.get("vocab_size") or _size(shapes, EMBEDDING, 0, 0)
    if vocab_size <= facts["image_token_id"]:
        raise ValueError(
            f"vocab_size is {vocab_size}: there is no row {facts['image_token_id']} for the image placeholder. "
            f"Resize the embeddings and lm_head to at least {facts['image_token_id'] + 1} rows first."
        )
    text = {key: official[key] for key in _TEXT_KEYS if key in official}
    text["vocab_size"] = vocab_size
    text.setdefault("intermediate_size", _size(shapes, "model.layers.0.mlp.fc1.weight", 0, 4 * text["hidden_size"]))
    rope = {"rope_type": "default", "rope_theta": official.get("rope_theta", 10000.0)}
    rope |= official.get("rope_scaling") or {}
    rope["partial_rotary_factor"] = official.get("partial_rotary_factor", 0.5)
    text_config = PhiConfig(
        **text,
        rope_parameters=rope,
        bos_token_id=facts["bos_token_id"],
        eos_token_id=facts["eos_token_id"],
        pad_token_id=facts["pad_token_id"],
    )
    image_hd = bool(official.get("image_hd", False))
    vision_config = _vision_config(official, shapes, vision_num_attention_heads, image_size)
    return FlashSlothConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=facts["image_token_id"],
        query_token_id=facts["query_token_id"],
        vision_feature_layer=facts["vision_feature_layer"],
        compressor=facts["compressor"],
        compressor_window=facts["compressor_window"],
        compressor_dropout=facts["compressor_dropout"],
        projector_hidden_act=facts["projector_hidden_act"],
        num_query_tokens=_size(shapes, QUERY_TOKENS, 0, facts["num_query_tokens"]),
        embedded_query_layer=facts["embedded_query_layer"],
        embedded_query_hidden_size=_size(
            shapes, "model.lqformer.down_projector_image.weight", 0, vision_config.hidden_size // 2
        ),
        # the authors' module takes the language model's number of heads (Phi-2: 32)
        embedded_query_num_heads=official["num_attention_heads"],
        embedded_query_uses_question=facts["embedded_query_uses_question"],
        view_grid=list(facts["hd_view_grid"]) if image_hd else None,
    )


def _vision_config(
    official: Mapping[str, Any], shapes: Shapes, num_attention_heads: int | None, image_size: int | None
) -> SiglipVisionConfig:
    facts = OFFICIAL_FACTS
    patch_name = _VISION + "embeddings.patch_embedding.weight"
    position_name = _VISION + "embeddings.position_embedding.weight"
    width = official.get("mm_hidden_size") or _size(shapes, patch_name, 0, facts["vision_hidden_size"])
    if num_attention_heads is None:
        num_attention_heads, rest = divmod(width, facts["vision_head_width"])
        if rest:
            raise ValueError(
                f"The vision encoder is {width} wide, no multiple of {facts['vision_head_width']}, the width of a"
                " SigLIP so400m head; give vision_num_attention_heads."
            )
    image_size = facts["vision_image_size"] if image_size is None else image_size
    likely_patch = _size(shapes, patch_name, 3, facts["vision_patch_size"])
    num_positions = _size(shapes, position_name, 0, (image_size // likely_patch) ** 2)
    patch_size = _size(shapes, patch_name, 3, image_size // max(math.isqrt(num_positions), 1))
    if (image_size // patch_size) ** 2 != num_positions:
        raise ValueError(
            f"{position_name} has {num_positions} positions, but an image of {image_size} pixels has "
            f"{image_size // patch_size}^2 patches of {patch_size} pixels; give the image_size of the encoder."
        )
    layer_prefix = _VISION + "encoder.layers."
    indices = {name.removeprefix(layer_prefix).split(".")[0] for name in shapes if name.startswith(layer_prefix)}
    num_stored_layers = max((int(index) for index in indices if index.isdigit()), default=-1) + 1
    # The checkpoint keeps the layers up to the feature layer; the config describes the encoder they were cut from.
    num_cut_layers = -1 - facts["vision_feature_layer"]
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=_size(shapes, layer_prefix + "0.mlp.fc1.weight", 0, facts["vision_intermediate_size"]),
        num_hidden_layers=num_stored_layers + num_cut_layers,
        num_attention_heads=num_attention_heads,
        image_size=image_size,
        patch_size=patch_size,
    )


def _size(shapes: Shapes, name: str, dimension: int, default: int) -> int:
    shape = shapes.get(name, ())
    return shape[dimension] if len(shape) > dimension else default


def config_to_official(config: FlashSlothConfig, recorded: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The authors' config.json of one of our configs.

    Args:
        config: ours.
        recorded: the config.json the folder was converted from, {} if unknown; fields that do not follow from
            `config` are taken from it.
        dtype: of the stored weights, e.g. "float16".

    Raises:
        ValueError: the authors' code has a fixed value where `config` has another one.
    """
    facts, text, vision = OFFICIAL_FACTS, config.text_config, config.vision_config
    views = list(config.view_grid) if config.view_grid else None
    fixed = {
        "text_config.model_type": (text.model_type, OFFICIAL_MODEL_TYPE),
        "vision_config.model_type": (vision.model_type, SiglipVisionConfig.model_type),
        "view_grid": (views, facts["hd_view_grid"] if views else None),
        "embedded_query_num_heads": (config.embedded_query_num_heads, text.num_attention_heads),
        "image_token_id": (config.image_token_id, facts["image_token_id"]),
        "query_token_id": (config.query_token_id, facts["query_token_id"]),
    }
    for field in (
        "compressor", "compressor_window", "projector_hidden_act", "vision_feature_layer", "num_query_tokens",
        "embedded_query_layer", "embedded_query_uses_question",
    ):  # fmt: skip
        fixed[field] = (getattr(config, field), facts[field])
    wrong = [f"{field} is {value!r}, theirs {theirs!r}" for field, (value, theirs) in fixed.items() if value != theirs]
    if wrong:
        raise ValueError("The authors' format cannot hold this model: " + "; ".join(wrong) + ".")
    rope = dict(text.rope_parameters)
    derived = {key: getattr(text, key) for key in _TEXT_KEYS}
    derived |= {
        "image_hd": config.view_grid is not None,
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "partial_rotary_factor": rope.pop("partial_rotary_factor", 1.0),
        "rope_theta": rope.pop("rope_theta", 10000.0),
        "torch_dtype": dtype,
    }
    if rope.get("rope_type", "default") != "default":
        derived["rope_scaling"] = rope
    return dict(sorted((_CONFIG_TEMPLATE | dict(recorded) | derived).items()))

"""From the `model` section of a recipe to a model and its processor."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..hub import PACKAGED_MODELS, resolve
from ..inference import load_model
from ..model.configuration_flashsloth import FlashSlothConfig
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from .recipe import ModelRecipe

logger = logging.getLogger(__name__)

IMAGE_TOKEN, QUERY_TOKEN = "<image>", "<learnable>"
# Rows of the embedding are added in multiples of this, which keeps the head's matrix product aligned.
VOCABULARY_MULTIPLE = 64


def build(recipe: ModelRecipe) -> tuple[FlashSlothForConditionalGeneration, FlashSlothProcessor]:
    """The model to train, in float32, and its processor.

    Raises:
        ValueError: parts that do not fit each other; the message names the recipe's fields.
    """
    if recipe.checkpoint is not None:
        return load(recipe.checkpoint)
    assert recipe.language is not None and recipe.vision is not None, "the recipe has checked it"
    tokenizer = _tokenizer(recipe)
    language_weights = None
    if isinstance(recipe.language, str):
        language_weights = _pretrained_language(recipe.language, len(tokenizer))
        text_config = language_weights.config
    else:
        text_config = _sub_config(recipe.language, vocab_size=len(tokenizer))
    config = _join(recipe, text_config, tokenizer)
    model = FlashSlothForConditionalGeneration(config).to(torch.float32)
    if isinstance(recipe.vision, str):
        _copy_vision(recipe.vision, model.model.vision_tower)
    if language_weights is not None:
        _copy(language_weights.base_model, model.model.language_model)
        _copy(language_weights.get_output_embeddings(), model.lm_head)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, _processor(recipe, config, tokenizer)


def build_processor(recipe: ModelRecipe) -> tuple[FlashSlothConfig, FlashSlothProcessor]:
    """Configuration and processor of the model to train, without its weights: what preparing data needs.

    Raises:
        ValueError: as `build`.
    """
    if recipe.checkpoint is not None:
        folder = resolve(recipe.checkpoint)
        return FlashSlothConfig.from_pretrained(folder), FlashSlothProcessor.from_pretrained(folder)
    tokenizer = _tokenizer(recipe)
    if isinstance(recipe.language, str):
        text_config = AutoConfig.from_pretrained(recipe.language)
        text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    else:
        assert recipe.language is not None, "the recipe has checked it"
        text_config = _sub_config(recipe.language, vocab_size=len(tokenizer))
    config = _join(recipe, text_config, tokenizer)
    return config, _processor(recipe, config, tokenizer)


def _join(recipe: ModelRecipe, text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> FlashSlothConfig:
    """The configuration of an encoder and a decoder together."""
    assert recipe.vision is not None, "the recipe has checked it"
    text_config.pad_token_id, text_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    text_config.bos_token_id = tokenizer.bos_token_id
    return FlashSlothConfig(
        vision_config=vision_config(recipe.vision),
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        query_token_id=tokenizer.convert_tokens_to_ids(QUERY_TOKEN),
        **recipe.config,
    )


def _processor(
    recipe: ModelRecipe, config: FlashSlothConfig, tokenizer: PreTrainedTokenizerBase
) -> FlashSlothProcessor:
    template = {} if recipe.chat_template is None else {"chat_template": _read_template(recipe.chat_template)}
    return FlashSlothProcessor.from_config(config, tokenizer, **template)


def load(folder: str | Path) -> tuple[FlashSlothForConditionalGeneration, FlashSlothProcessor]:
    """A saved FlashSloth model in float32, and its processor.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    return load_model(folder, "float32"), FlashSlothProcessor.from_pretrained(folder)


def _tokenizer(recipe: ModelRecipe) -> PreTrainedTokenizerBase:
    if recipe.tokenizer is not None and recipe.tokenizer.source == "synthetic":
        from ..synthetic.tokenizer import train_tokenizer

        assert recipe.tokenizer.vocabulary_size is not None, "the recipe has checked it"
        return train_tokenizer(recipe.tokenizer.vocabulary_size)
    source = recipe.language if recipe.tokenizer is None else recipe.tokenizer.source
    tokenizer = AutoTokenizer.from_pretrained(source)
    missing = [token for token in (IMAGE_TOKEN, QUERY_TOKEN) if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        logger.warning("the tokenizer of %s has no padding token; %r serves as one", source, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained_language(name: str, vocabulary: int) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if vocabulary > model.config.vocab_size:
        model.resize_token_embeddings(vocabulary, pad_to_multiple_of=VOCABULARY_MULTIPLE)
    return model


def vision_config(vision: str | dict[str, Any]) -> PreTrainedConfig:
    """Configuration of the encoder that `model.vision` of a recipe names or spells out."""
    if isinstance(vision, dict):
        return _sub_config(vision)
    try:
        config = AutoConfig.from_pretrained(PACKAGED_MODELS.get(vision, vision))
    except OSError as error:
        raise ValueError(
            f"model.vision: {vision!r} is no folder of a model, not packaged ({', '.join(PACKAGED_MODELS)}), and not "
            "to be had from the hub"
        ) from error
    # an image-text model (SigLIP, CLIP, FlashSloth) holds its encoder's configuration inside
    return getattr(config, "vision_config", config)


def _copy_vision(name: str, tower: nn.Module) -> None:
    """Fill a tower from a pretrained encoder, or from the tower of a trained FlashSloth."""
    folder = PACKAGED_MODELS.get(name, name)
    if not isinstance(AutoConfig.from_pretrained(folder), FlashSlothConfig):
        _copy(type(tower).from_pretrained(folder, config=tower.config, dtype=torch.float32), tower)
        return
    source = load_model(resolve(folder), "float32").model.vision_tower
    missing = sorted(set(tower.state_dict()) - set(source.state_dict()))
    if missing:
        raise ValueError(
            f"model.vision: the FlashSloth model {name} ends its encoder earlier than model.config asks for (no "
            f"{missing[0]}); set vision_feature_layer and vision_final_norm in model.config as they are there"
        )
    _copy(source, tower)


def _sub_config(values: dict[str, Any], **defaults: Any) -> PreTrainedConfig:
    values = {**defaults, **values}
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {model_type!r} is not known to transformers")
    if "vocab_size" in defaults and values["vocab_size"] < defaults["vocab_size"]:
        raise ValueError(
            f"model.language.vocab_size={values['vocab_size']} contradicts model.tokenizer, which has "
            f"{defaults['vocab_size']} tokens"
        )
    config_class = CONFIG_MAPPING[model_type]
    unknown = sorted(values.keys() - set(config_class().to_dict()))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in the sub-configuration of {model_type}")
    return config_class(**values)


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights `target` has; `source` may have more (layers above the features that are used)."""
    state = source.state_dict()
    target.load_state_dict({name: state[name] for name in target.state_dict()})


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"model.chat_template: cannot read {path}: {error.strerror}") from error

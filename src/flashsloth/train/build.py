"""From the `model` section of a recipe to a model and its processor."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_bitsandbytes_available
from transformers.utils import logging as transformers_logging

from ..checkpoints.hub import PACKAGED_MODELS, is_adapter, locate, resolve
from ..checkpoints.loading import DTYPES, load_model
from ..checkpoints.pretrained import load_any_config, load_config, load_processor, load_tokenizer, load_weights
from ..data.text_files import read_text
from ..model.configuration_flashsloth import FlashSlothConfig
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from .freeze import PART_PREFIXES
from .recipe import ModelRecipe, TokenizerRecipe

logger = logging.getLogger(__name__)

IMAGE_TOKEN, QUERY_TOKEN = "<image>", "<learnable>"
# Rows of the embedding are added in multiples of this, which keeps the head's matrix product aligned.
VOCABULARY_MULTIPLE = 64


def build(recipe: ModelRecipe) -> tuple[FlashSlothForConditionalGeneration, FlashSlothProcessor]:
    """The model to train, in float32 (or with its language model in 4 bits), and its processor.

    Raises:
        ValueError: parts that do not fit each other; the message names the recipe's fields.
    """
    if recipe.checkpoint is not None:
        model, processor = load(recipe.checkpoint, recipe.quantization, recipe.dtype)
        _set_windows(recipe, model.config, processor)
        return model, processor
    with _refusals():
        return _build_new(recipe)


def _build_new(recipe: ModelRecipe) -> tuple[FlashSlothForConditionalGeneration, FlashSlothProcessor]:
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
        _copy(language_weights.base_model, model.model.language_model, f"model.language {recipe.language}")
        _copy(language_weights.get_output_embeddings(), model.lm_head, f"the head of model.language {recipe.language}")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, _processor(recipe, config, tokenizer)


def build_processor(recipe: ModelRecipe) -> tuple[FlashSlothConfig, FlashSlothProcessor]:
    """Configuration and processor of the model to train, without its weights: what preparing data needs.

    Raises:
        ValueError: as `build`.
    """
    if recipe.checkpoint is not None:
        folder = _whole_model(recipe.checkpoint)
        config, processor = load_config(folder), load_processor(folder)
        _set_windows(recipe, config, processor)
        return config, processor
    with _refusals():
        tokenizer = _tokenizer(recipe)
        if isinstance(recipe.language, str):
            text_config = _language_config(recipe.language)
            text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
        else:
            assert recipe.language is not None, "the recipe has checked it"
            text_config = _sub_config(recipe.language, vocab_size=len(tokenizer))
        config = _join(recipe, text_config, tokenizer)
        return config, _processor(recipe, config, tokenizer)


@contextmanager
def _refusals() -> Iterator[None]:
    """Make one sentence of what libraries raise on configurations that no model has."""
    try:
        yield
    except (ValueError, OSError, ImportError, AssertionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"model: no model can be made of these settings ({type(error).__name__}: {error})") from error


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
    options = _normalization(recipe.vision) if isinstance(recipe.vision, str) else {}
    if recipe.letterbox:
        options["do_pad"] = True
    if recipe.chat_template is not None:
        options["chat_template"] = _read_template(recipe.chat_template)
    return FlashSlothProcessor.from_config(config, tokenizer, **options)


def _set_windows(recipe: ModelRecipe, config: FlashSlothConfig, processor: FlashSlothProcessor) -> None:
    """Let the weights of a checkpoint learn windows that they were not trained with."""
    if "compressor_windows" not in recipe.config:
        return
    windows = recipe.config["compressor_windows"]
    # checked as a configuration of its own, before the model's is changed
    FlashSlothConfig(**(config.to_dict() | {"compressor_windows": windows}))
    config.compressor_windows = windows
    processor.visual_token_choices = list(config.visual_token_choices) if len(config.trained_windows) > 1 else None


def load(
    name: str | Path, quantization: str | None = None, dtype: str = "float32"
) -> tuple[FlashSlothForConditionalGeneration, FlashSlothProcessor]:
    """A saved FlashSloth model in float32, and its processor.

    Args:
        name: packaged model, folder or hub name.
        quantization: "4bit" reads the matrices of the language model as NF4.
        dtype: format of everything else under `quantization`.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the folder holds an adapter.
        ImportError: bitsandbytes is needed and missing.
    """
    folder = _whole_model(name)
    if quantization is None:
        model = load_model(folder, "float32")
    else:
        model = load_model(folder, dtype, quantization_config=quantization_config(dtype))
    return model, load_processor(folder)


def _whole_model(name: str | Path) -> Path:
    folder = resolve(name)
    if is_adapter(folder):
        raise ValueError(
            f"model.checkpoint {name} is an adapter; make a whole model of it first: flashsloth merge {name} OUT"
        )
    return folder


def quantization_config(dtype: str) -> Any:
    """4-bit NF4 for the language model; what sees pixels keeps its format, which 4 bits would ruin first.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if not is_bitsandbytes_available():
        raise ImportError("model.quantization: 4bit needs bitsandbytes; pip install 'flashsloth[quantization]'")
    if not torch.accelerator.is_available():
        logger.warning("model.quantization: 4bit without a GPU works, but far slower than without quantization")
    kept = [prefix for part, prefixes in PART_PREFIXES.items() if part != "language_model" for prefix in prefixes]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
        llm_int8_skip_modules=[*kept, "lm_head"],
    )


def set_dtypes(model: nn.Module, frozen: str) -> None:
    """Keep what learns in float32 and put frozen weights in the format `frozen`; quantized ones stay as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else DTYPES[frozen])


def _tokenizer(recipe: ModelRecipe) -> PreTrainedTokenizerBase:
    if recipe.tokenizer is not None and recipe.tokenizer.source == "synthetic":
        from ..synthetic.tokenizer import train_tokenizer

        assert recipe.tokenizer.vocabulary_size is not None, "the recipe has checked it"
        return train_tokenizer(recipe.tokenizer.vocabulary_size, recipe.tokenizer.families)
    assert recipe.tokenizer is not None or isinstance(recipe.language, str), "the recipe has checked it"
    settings = recipe.tokenizer or TokenizerRecipe(source=str(recipe.language))
    source = PACKAGED_MODELS.get(settings.source, settings.source)
    tokenizer = load_tokenizer(source)
    # in the order of the published checkpoints, whose ids new models of the same decoder then share
    wanted = (QUERY_TOKEN, settings.eos_token, IMAGE_TOKEN, settings.pad_token)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in wanted if token is not None and token not in vocabulary]
    tokenizer.add_tokens(missing, special_tokens=True)
    if settings.eos_token is not None:
        tokenizer.eos_token = settings.eos_token
    if settings.pad_token is not None:
        tokenizer.pad_token = settings.pad_token
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {source} has no end-of-sequence token; give model.tokenizer.eos_token")
    if tokenizer.pad_token is None:
        logger.warning("the tokenizer of %s has no padding token; %r serves as one", source, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained_language(name: str, vocabulary: int) -> PreTrainedModel:
    folder = PACKAGED_MODELS.get(name, name)
    if isinstance(load_any_config(folder), FlashSlothConfig):
        source = load_model(resolve(folder), "float32")
        model = AutoModelForCausalLM.from_config(source.config.text_config, trust_remote_code=False).to(torch.float32)
        _copy(source.model.language_model, model.base_model, f"model.language {name}")
        _copy(source.lm_head, model.get_output_embeddings(), f"the head of model.language {name}")
    else:
        model, _ = load_weights(AutoModelForCausalLM, locate(folder), dtype=torch.float32)
    if vocabulary > model.config.vocab_size:
        model.resize_token_embeddings(vocabulary, pad_to_multiple_of=VOCABULARY_MULTIPLE)
    return model


def _language_config(name: str) -> PreTrainedConfig:
    config = load_any_config(PACKAGED_MODELS.get(name, name))
    # a FlashSloth model holds its decoder's configuration inside
    return config.text_config if isinstance(config, FlashSlothConfig) else config


def vision_config(vision: str | dict[str, Any]) -> PreTrainedConfig:
    """Configuration of the encoder that `model.vision` of a recipe names or spells out."""
    if isinstance(vision, dict):
        return _sub_config(vision)
    try:
        config = load_any_config(PACKAGED_MODELS.get(vision, vision))
    except ValueError as error:
        raise ValueError(
            f"model.vision: {vision!r} is no folder of a model, not packaged ({', '.join(PACKAGED_MODELS)}), and not "
            f"to be had from the hub: {error}"
        ) from error
    # an image-text model (SigLIP, CLIP, FlashSloth) holds its encoder's configuration inside
    return getattr(config, "vision_config", config)


def _copy_vision(name: str, tower: nn.Module) -> None:
    """Fill a tower from a pretrained encoder, or from the tower of a trained FlashSloth."""
    folder = PACKAGED_MODELS.get(name, name)
    if not isinstance(load_any_config(folder), FlashSlothConfig):
        # what is missing is refused below; what is left over (upper layers, a text encoder) is meant to be
        with _errors_only():
            source, report = load_weights(type(tower), locate(folder), config=tower.config, dtype=torch.float32)
        _copy(source, tower, f"model.vision {name}", absent=report["missing_keys"])
        return
    source = load_model(resolve(folder), "float32").model.vision_tower
    missing = sorted(set(tower.state_dict()) - set(source.state_dict()))
    if missing:
        raise ValueError(
            f"model.vision: the FlashSloth model {name} ends its encoder earlier than model.config asks for (no "
            f"{missing[0]}); set vision_feature_layer and vision_final_norm in model.config as they are there"
        )
    _copy(source, tower, f"model.vision {name}")


@contextmanager
def _errors_only() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _normalization(vision: str) -> dict[str, Any]:
    """Mean and deviation of the pixels that a pretrained encoder was trained on."""
    folder = PACKAGED_MODELS.get(vision, vision)
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    except OSError:
        logger.warning("model.vision %s says nothing of its pixels' mean and deviation; 0.5 is taken for both", vision)
        return {}
    return {name: settings[name] for name in ("image_mean", "image_std") if name in settings}


def _sub_config(values: dict[str, Any], **defaults: Any) -> PreTrainedConfig:
    values = {**defaults, **values}
    model_type = values.pop("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
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


def _copy(source: nn.Module, target: nn.Module, name: str, absent: Iterable[str] = ()) -> None:
    """Copy the weights `target` has; `source` may have more (layers above the features that are used).

    Args:
        name: of the source, for messages.
        absent: weights of `source` that its files lacked, so that they are random.
    """
    state = source.state_dict()
    lost = [key for key in target.state_dict() if key not in state or key in set(absent)]
    if lost:
        raise ValueError(f"{name} lacks {len(lost)} of the weights this model needs, first {lost[0]}")
    target.load_state_dict({key: state[key] for key in target.state_dict()})


def _read_template(path: str) -> str:
    try:
        return read_text(Path(path))
    except ValueError as error:
        raise ValueError(f"model.chat_template: cannot read {error}") from error

"""The two graphs of a model: `vision` for images, `decoder` for prompts and steps, traced by torch.export.

One decoder graph serves both: a step passes no images, no query groups and no positions. Its weights are held once.

Shape suffixes: B rows, T tokens of a call, S tokens of the whole row, D width of the language model, I images,
V views, C channels, H W pixels, P un-pooled patches, E width of the encoder, N visual tokens, K images of a row,
G query groups of a row.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from flashsloth_edge.engines import FEATURES, LOGITS, VISUAL_TOKENS

from ..model.backbones import CACHE_ARGUMENT, PATCH_INPUT_FAMILIES
from ..model.compressors import ImageFeatures
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration

# Names in the graphs of sizes that differ from call to call.
DYNAMIC_NAMES: dict[str, dict[int, str]] = {
    "pixel_values": {0: "images"},
    "input_ids": {0: "rows", 1: "tokens"},
    "attention_mask": {0: "rows", 1: "all_tokens"},
    FEATURES: {0: "images"},
    "visual_tokens": {0: "images", 1: "tokens_of_image"},
    "image_token_counts": {0: "images"},
    "image_positions": {0: "rows", 1: "images_of_row"},
    "query_positions": {0: "rows", 1: "groups"},
    "question_ids": {0: "rows", 1: "question_tokens"},
}
CACHE_NAMES = {0: "rows", 2: "past_tokens"}
# No size of the examples is 0 or 1, nor equal to another it is not always equal to: the tracer would tie them.
ROWS, IMAGES_OF_ROW, GROUPS, IMAGES, PAST, WORDS = 2, 2, 2, 3, 5, 4


class VisionGraph(nn.Module):
    """Pixels (I, V, C, H, W) to un-pooled features (I, P, E) and visual tokens (I, N, D) for each number of them."""

    def __init__(self, model: FlashSlothForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        base = self.model.model
        features_IPE = base.encode_views(pixel_values)
        choices = self.model.config.visual_token_choices
        return features_IPE, *(base.compress(features_IPE, count) for count in choices)


class DecoderGraph(nn.Module):
    """Logits (B, vocabulary) of the last position, and the cache with the tokens of this call."""

    def __init__(self, model: FlashSlothForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_features: Tensor,
        visual_tokens: Tensor,
        image_token_counts: Tensor,
        image_positions: Tensor,
        past: list[Tensor],
        query_positions: Tensor | None = None,
        question_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        position_ids_BS = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids_BS[:, -input_ids.shape[1] :],
            image_features=ImageFeatures(
                last_hidden_state=image_features, pooler_output=visual_tokens, token_counts=image_token_counts
            ),
            image_positions=image_positions,
            query_positions=query_positions,
            question_ids=question_ids,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: _filled_cache(past)},
        )
        layers = output.get(CACHE_ARGUMENT).layers
        return output.logits[:, 0], *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def _filled_cache(past: list[Tensor]) -> DynamicCache:
    """A cache that holds these tensors. Sliding layers hold everything too: the mask hides what is out of reach."""
    cache = DynamicCache()
    layers = []
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        # as its first update leaves it; that update would concatenate with an empty tensor of rank 1
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layers.append(layer)
    cache.layers, cache.layer_class_to_replicate = layers, None
    return cache


def cache_sizes(model: FlashSlothForConditionalGeneration) -> list[list[int]]:
    """(heads, width) of keys and values of each layer in turn, as one step of the language model makes them."""
    width = model.config.text_config.hidden_size
    embeds_BTD = torch.zeros(1, 1, width, dtype=model.dtype)
    with torch.no_grad():
        output = model.model.language_model(inputs_embeds=embeds_BTD, use_cache=True)
    tensors = [tensor for layer in output.get(CACHE_ARGUMENT).layers for tensor in (layer.keys, layer.values)]
    return [[tensor.shape[1], tensor.shape[3]] for tensor in tensors]


def trace_vision(model: FlashSlothForConditionalGeneration) -> tuple[Any, list[str]]:
    """The vision graph as a program of `torch.onnx.export`, and the names of its outputs."""
    config = model.config
    shape = (IMAGES, config.num_views, config.vision_config.num_channels, config.image_height, config.image_width)
    outputs = [FEATURES, *(VISUAL_TOKENS.format(count) for count in config.visual_token_choices)]
    with _fixed_positions(model):
        program = _export(VisionGraph(model), {"pixel_values": torch.zeros(shape)}, outputs)
    return program, outputs


def trace_decoder(model: FlashSlothForConditionalGeneration) -> tuple[Any, list[str]]:
    """The decoder graph as a program of `torch.onnx.export`, and the names of its outputs."""
    example = _decoder_example(model)
    outputs = [LOGITS, *(f"present_{index}" for index in range(len(example["past"])))]
    return _export(DecoderGraph(model), example, outputs), outputs


def _decoder_example(model: FlashSlothForConditionalGeneration) -> dict[str, Any]:
    config = model.config
    count, patches = config.num_image_tokens, config.num_views * config.num_patches_per_view
    tokens = IMAGES_OF_ROW * count + WORDS + GROUPS * max(config.num_query_tokens, 1)
    first_query = PAST + IMAGES_OF_ROW * count + WORDS
    long = {"dtype": torch.long}
    example: dict[str, Any] = {
        "input_ids": torch.zeros(ROWS, tokens, **long),
        "attention_mask": torch.ones(ROWS, PAST + tokens, **long),
        FEATURES: torch.zeros(IMAGES, patches, config.vision_config.hidden_size),
        "visual_tokens": torch.zeros(IMAGES, count, config.text_config.hidden_size),
        "image_token_counts": torch.full((IMAGES,), count),
        "image_positions": torch.tensor([[PAST, PAST + count], [PAST, -1]]),
    }
    example["past"] = [torch.zeros(ROWS, heads, PAST, width) for heads, width in cache_sizes(model)]
    if config.num_query_tokens:
        second = first_query + config.num_query_tokens
        example["query_positions"] = torch.tensor([[first_query, second], [first_query, -1]])
        example["question_ids"] = torch.zeros(ROWS, PAST + tokens + 1, **long)
    return example


def _export(module: nn.Module, example: dict[str, Any], outputs: list[str]) -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    names: list[str] = []
    shapes: dict[str, Any] = {}
    for name, value in example.items():
        if isinstance(value, list):
            names += [f"{name}_{index}" for index in range(len(value))]
            shapes[name] = [dict.fromkeys(CACHE_NAMES, dynamic) for _ in value]
        else:
            names.append(name)
            shapes[name] = dict.fromkeys(DYNAMIC_NAMES[name], dynamic)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, about how modules of transformers are written
        return torch.onnx.export(
            module.eval(),
            (),
            kwargs=example,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=outputs,
            verbose=False,
        )


@contextlib.contextmanager
def _fixed_positions(model: FlashSlothForConditionalGeneration) -> Iterator[None]:
    """Position embeddings of encoders that resize them for every image, as what they are for our one size."""
    tower = model.model.vision_tower
    if tower.config.model_type not in PATCH_INPUT_FAMILIES:
        yield
        return
    embeddings, config = tower.embeddings, model.config
    table_HWE = embeddings.position_embedding.weight.unflatten(0, (embeddings.position_embedding_size, -1))
    grid_12 = torch.tensor([[config.grid_height, config.grid_width]])
    with torch.no_grad():
        fixed_1PE = embeddings.resize_positional_embeddings(
            table_HWE, grid_12, max_length=config.grid_height * config.grid_width
        )
    embeddings.resize_positional_embeddings = lambda *args, **kwargs: fixed_1PE
    try:
        yield
    finally:
        del embeddings.resize_positional_embeddings

"""Where the parts of a built model are, and what the vision side costs for an image. One function per family.

Everything here reads modules and their configurations only, so models may be on the meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from flashsloth.model.backbones import decoder_layers

from .arithmetic import (
    attention_flops,
    counted_flops,
    embedded_query_flops,
    encoder_flops,
    matrix_flops,
    window_lengths,
)
from .memory import feature_map_elements, widest_block_elements
from .rebuilt import Assembly
from .token_rules import VisualInput


@dataclass(frozen=True)
class Anatomy:
    """Parts of a model.

    Attributes:
        connector: from encoder features to visual tokens; counted before `vision`, of which it may be a part.
        vision: the encoder.
        embedded_query: modules inside the language model that read the image.
        language_model: without head.
        head: from hidden states to logits.
        vision_flops: operations of the encoder for an image.
        connector_flops: operations from features to visual tokens, and of `embedded_query`, for an image and a
            prompt of so many positions.
        vision_elements: elements alive at the encoder's widest point.
        kept_elements: elements of encoder features kept while the prompt is read.
        query_tokens: positions the model adds to the prompt besides visual tokens.
        visual_token_choices: numbers of visual tokens among which a request chooses, its default first; empty where
            there is no choice.
    """

    connector: Sequence[nn.Module]
    vision: nn.Module
    language_model: nn.Module
    head: nn.Module
    vision_flops: Callable[[VisualInput], int]
    connector_flops: Callable[[VisualInput, int], int]
    vision_elements: Callable[[VisualInput], int]
    embedded_query: Sequence[nn.Module] = ()
    kept_elements: Callable[[VisualInput], int] = lambda image: 0
    query_tokens: int = 0
    visual_token_choices: Sequence[int] = ()

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers."""
        return decoder_layers(self.language_model)

    @property
    def text_config(self) -> PreTrainedConfig:
        """Configuration of the language model."""
        return self.language_model.config


Dissect = Callable[[nn.Module], Anatomy]


class _Transformer:
    """Cost of a plain vision transformer; every view attends to itself.

    Args:
        patch_embedding: run at every patch.
        layers: of the encoder, all of which run.
        width: of all attention heads.
        class_tokens: positions of a view besides its patches.
    """

    def __init__(
        self, patch_embedding: nn.Module, layers: Iterable[nn.Module], width: int, class_tokens: int = 0
    ) -> None:
        self.patch_embedding, self.layers = patch_embedding, list(layers)
        self.width, self.class_tokens = width, class_tokens

    def lengths(self, image: VisualInput) -> list[int]:
        return [patches + self.class_tokens for patches in image.patches_of_views]

    def flops(self, image: VisualInput) -> int:
        return matrix_flops(self.patch_embedding, image.patches) + encoder_flops(
            self.layers, self.lengths(image), self.width
        )

    def elements(self, image: VisualInput) -> int:
        return sum(self.lengths(image)) * widest_block_elements(self.layers[0], self.width)


def siglip_transformer(tower: nn.Module) -> _Transformer:
    """Cost of a SigLIP tower, all of whose layers run."""
    return _Transformer(tower.embeddings.patch_embedding, tower.encoder.layers, tower.config.hidden_size)


def _per_token(modules: nn.Module | Sequence[nn.Module]) -> Callable[[VisualInput, int], int]:
    return lambda image, prompt: matrix_flops(modules, image.tokens)


def _anatomy(
    encoder: _Transformer,
    vision: nn.Module,
    connector: Sequence[nn.Module],
    language_model: nn.Module,
    head: nn.Module,
    **others: Any,
) -> Anatomy:
    """Parts of a model with a plain encoder and a connector that runs at every visual token, but for the others."""
    usual = {
        "vision_flops": encoder.flops, "connector_flops": _per_token(connector), "vision_elements": encoder.elements
    }  # fmt: skip
    return Anatomy(connector, vision, language_model, head, **{**usual, **others})


def flashsloth(model: nn.Module) -> Anatomy:
    """FlashSloth with any compressor, with or without embedded queries."""
    base, config = model.model, model.config
    size, queries = config.vision_config.hidden_size, config.num_query_tokens
    default, choices = config.num_image_tokens, config.visual_token_choices

    def connector_flops(image: VisualInput, prompt: int) -> int:
        # the compressor's score network sees every patch; its weighted sum is a matrix product too
        flops = matrix_flops(base.compressor, image.patches)
        if config.compressor == "spatial_attention":
            flops += 2 * image.patches * size
        flops += matrix_flops(base.projector, image.tokens)
        if base.embedded_query is not None:
            flops += embedded_query_flops(base.embedded_query, queries, prompt, image.patches)
        return flops

    return _anatomy(
        siglip_transformer(base.vision_tower),
        base.vision_tower,
        [base.compressor, base.projector],
        base.language_model,
        model.lm_head,
        connector_flops=connector_flops,
        embedded_query=[] if base.embedded_query is None else [base.query_tokens, base.embedded_query],
        kept_elements=lambda image: image.patches * size if queries else 0,
        query_tokens=queries,
        visual_token_choices=[default, *(count for count in choices if count != default)] if len(choices) > 1 else (),
    )


def qwen2_vl(model: nn.Module) -> Anatomy:
    """Qwen2-VL: every patch attends to the whole image."""
    visual = model.model.visual
    encoder = _Transformer(visual.patch_embed, visual.blocks, visual.config.embed_dim)
    return _anatomy(encoder, visual, [visual.merger], model.model.language_model, model.lm_head)


def qwen2_5_vl(model: nn.Module) -> Anatomy:
    """Qwen2.5-VL: attention in windows, in a few layers over the whole image."""
    visual, config = model.model.visual, model.model.visual.config
    encoder = _Transformer(visual.patch_embed, visual.blocks, config.hidden_size)
    full = [block for index, block in enumerate(visual.blocks) if index in config.fullatt_block_indexes]
    windowed = [block for index, block in enumerate(visual.blocks) if index not in config.fullatt_block_indexes]
    window = config.window_size // config.patch_size

    def vision_flops(image: VisualInput) -> int:
        windows = [length for grid in image.grids for length in window_lengths(*grid, window)]
        return (
            matrix_flops(visual.patch_embed, image.patches)
            + encoder_flops(full, image.patches_of_views, config.hidden_size)
            + encoder_flops(windowed, windows, config.hidden_size)
        )

    return _anatomy(
        encoder, visual, [visual.merger], model.model.language_model, model.lm_head, vision_flops=vision_flops
    )


def qwen3_vl(model: nn.Module) -> Anatomy:
    """Qwen3-VL: three more mergers hand features of inner layers to the language model."""
    visual = model.model.visual
    encoder = _Transformer(visual.patch_embed, visual.blocks, visual.config.hidden_size)
    mergers = [visual.merger, visual.deepstack_merger_list]
    return _anatomy(encoder, visual, mergers, model.model.language_model, model.lm_head)


def internvl(model: nn.Module) -> Anatomy:
    """InternVL: a class token in every tile."""
    base, tower = model.model, model.model.vision_tower
    embeddings, layers = tower.embeddings.patch_embeddings, tower.encoder.layer
    encoder = _Transformer(embeddings, layers, tower.config.hidden_size, class_tokens=1)
    return _anatomy(encoder, tower, [base.multi_modal_projector], base.language_model, model.lm_head)


def smolvlm(model: nn.Module) -> Anatomy:
    """SmolVLM."""
    base = model.model
    encoder = siglip_transformer(base.vision_model)
    return _anatomy(encoder, base.vision_model, [base.connector], base.text_model, model.lm_head)


def siglip_and_projector(model: nn.Module) -> Anatomy:
    """PaliGemma, LFM2-VL and Gemma 3: a SigLIP tower and a projector of linear layers."""
    base, projector = model.model, model.model.multi_modal_projector
    # Gemma 3 keeps the matrix of its projector as a bare parameter
    bare = sum(p.numel() for p in projector.parameters(recurse=False) if p.ndim == 2)
    return _anatomy(
        siglip_transformer(base.vision_tower), base.vision_tower, [projector], base.language_model, model.lm_head,
        connector_flops=lambda image, prompt: matrix_flops(projector, image.tokens) + 2 * bare * image.tokens,
    )  # fmt: skip


def minicpm_v_4_6(model: nn.Module) -> Anatomy:
    """MiniCPM-V 4.6: patches are merged two by two after an inner layer, and again after the encoder."""
    base, tower = model.model, model.model.vision_tower
    config, merger = tower.config, tower.vit_merger
    first = config.insert_layer_id + 1
    window = config.window_kernel_size[0] * config.window_kernel_size[1]
    early = _Transformer(tower.embeddings.patch_embedding, tower.encoder.layers[:first], config.hidden_size)
    late = tower.encoder.layers[first:]

    def vision_flops(image: VisualInput) -> int:
        merged = [patches // window for patches in image.patches_of_views]
        windows = sum(merged)
        flops = early.flops(image) + encoder_flops(late, merged, config.hidden_size)
        flops += matrix_flops(merger.self_attn, image.patches)
        flops += windows * attention_flops(window, window, config.hidden_size)
        return flops + matrix_flops([merger.linear_1, merger.linear_2], windows)

    return _anatomy(early, tower, [base.merger], base.language_model, model.lm_head, vision_flops=vision_flops)


def assembly(model: nn.Module, encoder: _Transformer, **others: Any) -> Anatomy:
    """A vision tower, a connector and a causal language model side by side, as `rebuilt.Assembly`."""
    text = model.language_model
    return _anatomy(
        encoder, model.vision_tower, [model.connector], text.base_model, text.get_output_embeddings(), **others
    )


def mobilevlm_v2(model: Assembly) -> Anatomy:
    """MobileVLM V2: linear layers at every patch, then pooling and a depthwise convolution."""
    tower, connector = model.vision_tower, model.connector
    width = tower.config.hidden_size
    encoder = _Transformer(tower.embeddings.patch_embedding, tower.encoder.layers, width, class_tokens=1)

    def connector_flops(image: VisualInput, prompt: int) -> int:
        return matrix_flops(connector.mlp, image.patches) + matrix_flops(connector.position, image.tokens)

    return assembly(model, encoder, connector_flops=connector_flops)


def minicpm_v_2(model: Assembly) -> Anatomy:
    """MiniCPM-V 2: queries read the patches of every view."""
    connector = model.connector
    queries, width = connector.query.shape

    def connector_flops(image: VisualInput, prompt: int) -> int:
        flops = matrix_flops([connector.kv_proj, connector.k_proj, connector.v_proj], image.patches)
        flops += matrix_flops([connector.q_proj, connector.out_proj], image.tokens)
        flops += 2 * connector.projection.numel() * image.tokens
        return flops + sum(attention_flops(queries, patches, width) for patches in image.patches_of_views)

    return assembly(model, siglip_transformer(model.vision_tower), connector_flops=connector_flops)


def moondream2(model: Assembly) -> Anatomy:
    """Moondream 2."""
    return assembly(model, siglip_transformer(model.vision_tower))


def fastvlm(model: Assembly) -> Anatomy:
    """FastVLM: a convolutional encoder; its operations are counted on the meta device."""
    tower, text = model.vision_tower, model.language_model

    def pixels(image: VisualInput) -> tuple[int, int, int, int]:
        rows, columns = image.grids[0]
        return image.views, 3, rows * tower.stride, columns * tower.stride

    counted = functools.cache(functools.partial(counted_flops, tower))
    elements = functools.cache(functools.partial(feature_map_elements, tower))
    return Anatomy(
        connector=[model.connector],
        vision=tower,
        language_model=text.base_model,
        head=text.get_output_embeddings(),
        vision_flops=lambda image: counted(pixels(image)),
        connector_flops=_per_token(model.connector),
        vision_elements=lambda image: elements(pixels(image)),
    )

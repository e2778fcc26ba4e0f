"""What differs between families of vision encoders and language models, in one place.

Shape suffixes: I images (every view counts as one), C channels, H W pixels, P patches, E encoder width,
B rows, T tokens, V vocabulary.
"""

import copy
import inspect
import math
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedConfig
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

# name of the key-value cache in forward, outputs and `generate`: transformers 5.24 renamed it
CACHE_ARGUMENT = next(
    field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values")
)
# attribute under which an encoder keeps the norm after its last layer
FINAL_NORM_NAMES = ("post_layernorm", "layernorm", "norm")
# attribute under which a decoder keeps its layers
DECODER_LAYER_NAMES = ("layers", "h", "blocks")
# encoders fed with flattened patches and their grid shape instead of images
PATCH_INPUT_FAMILIES = ("siglip2_vision_model",)


def _pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def patch_grid(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """Rows and columns of patches of one image."""
    if vision_config.model_type in PATCH_INPUT_FAMILIES:
        side = math.isqrt(vision_config.num_patches)
        return side, side
    height, width = _pair(vision_config.image_size)
    patch_height, patch_width = _pair(vision_config.patch_size)
    return height // patch_height, width // patch_width


def image_size_of(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width in pixels of the images an encoder expects."""
    if vision_config.model_type in PATCH_INPUT_FAMILIES:
        rows, columns = patch_grid(vision_config)
        patch_height, patch_width = _pair(vision_config.patch_size)
        return rows * patch_height, columns * patch_width
    return _pair(vision_config.image_size)


def num_kept_layers(vision_config: PreTrainedConfig, feature_layer: int) -> int:
    """Encoder layers that run to produce `hidden_states[feature_layer]` (0 is the patch embedding)."""
    return feature_layer if feature_layer >= 0 else vision_config.num_hidden_layers + 1 + feature_layer


def build_vision_tower(vision_config: PreTrainedConfig, feature_layer: int, final_norm: bool) -> nn.Module:
    """A vision encoder that ends at the layer whose features are used, without pooling head.

    Args:
        vision_config: configuration of the whole encoder.
        feature_layer: index into its `hidden_states`.
        final_norm: keep the norm after the last layer; otherwise it is replaced by the identity.
    """
    whole, vision_config = vision_config, copy.deepcopy(vision_config)
    vision_config.num_hidden_layers = num_kept_layers(vision_config, feature_layer)
    vision_config.vision_use_head = False  # read by SigLIP; other families have no such head
    tower = AutoModel.from_config(vision_config, trust_remote_code=False)
    whole._attn_implementation = tower.config._attn_implementation  # what is chosen where nothing was asked for
    if isinstance(getattr(tower, "pooler", None), nn.Module):
        tower.pooler = None
    if not final_norm:
        owner = getattr(tower, "vision_model", tower)
        names = [name for name in FINAL_NORM_NAMES if isinstance(getattr(owner, name, None), nn.Module)]
        if len(names) != 1:
            raise ValueError(
                f"cannot tell the final norm of the {vision_config.model_type!r} encoder among {FINAL_NORM_NAMES}; "
                "add its attribute name there, or use vision_feature_layer=-1 with vision_final_norm=true."
            )
        setattr(owner, names[0], nn.Identity())
    return tower


def encode_patches(tower: nn.Module, pixel_values_ICHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Run a tower of `build_vision_tower` and drop class and register tokens.

    Returns:
        features_IPE, row-major over the grid.
    """
    return run_tower(tower, pixel_values_ICHW, grid).last_hidden_state


def run_tower(tower: nn.Module, pixel_values_ICHW: Tensor, grid: tuple[int, int], **options: bool) -> BaseModelOutput:
    """As `encode_patches`, with what `options` such as `output_hidden_states=True` ask for.

    Returns:
        features_IPE and hidden states without class and register tokens; attentions as the tower gives them.
    """
    num_patches = grid[0] * grid[1]
    if tower.config.model_type in PATCH_INPUT_FAMILIES:
        patch = _pair(tower.config.patch_size)
        columns_IFP = functional.unfold(pixel_values_ICHW, kernel_size=patch, stride=patch)
        images, _, patches = columns_IFP.shape
        # unfold orders a patch as (channel, y, x); these encoders were trained on (y, x, channel)
        patches_IPF = columns_IFP.view(images, -1, patch[0] * patch[1], patches).permute(0, 3, 2, 1).flatten(2)
        shapes_I2 = torch.tensor([grid], device=pixel_values_ICHW.device).expand(images, 2)
        output = tower(pixel_values=patches_IPF, pixel_attention_mask=None, spatial_shapes=shapes_I2, **options)
    else:
        output = tower(pixel_values=pixel_values_ICHW, **options)
    states = output.last_hidden_state, *(output.hidden_states or ())
    features_IPE, *layers = (state_ITE[:, state_ITE.shape[1] - num_patches :] for state_ITE in states)
    return BaseModelOutput(
        last_hidden_state=features_IPE, hidden_states=tuple(layers) or None, attentions=output.attentions
    )


def decoder_layers(language_model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a base language model, in order."""
    for name in DECODER_LAYER_NAMES:
        layers = getattr(language_model, name, None)
        if isinstance(layers, nn.ModuleList):
            break
    else:
        raise ValueError(
            f"{type(language_model).__name__} keeps its layers under none of {DECODER_LAYER_NAMES}; add the attribute "
            "name to DECODER_LAYER_NAMES."
        )
    parameters = inspect.signature(type(language_model).forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"{type(language_model).__name__}.forward takes no extra keyword arguments, so the embedded query module "
            "cannot be reached through it; use another language model, or set num_query_tokens to 0."
        )
    return layers


def fuse_activations(language_model: nn.Module) -> None:
    """Compute the tanh form of GELU by one kernel where a family writes it as eight operations (Phi, GPT-2)."""
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def scale_logits(text_config: PreTrainedConfig, logits_BTV: Tensor) -> Tensor:
    """Apply what some families do to the logits after their head (Gemma 2 soft cap, Granite and Cohere scale)."""
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits_BTV = logits_BTV / divisor
    if (factor := getattr(text_config, "logit_scale", None)) is not None:
        logits_BTV = logits_BTV * factor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits_BTV = torch.tanh(logits_BTV / cap) * cap
    return logits_BTV

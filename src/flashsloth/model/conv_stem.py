"""A vision encoder whose patches are made by a few strided convolutions instead of one product.

A plain ViT finds edges and strokes in its first layers, which convolutions do cheaply. At small widths, where these
layers are a large part of the whole, a convolutional stem reads fine detail better at the same cost (Xiao et al.,
"Early Convolutions Help Transformers See Better", 2021).

Shape suffixes: I images, C channels, H W pixels, E encoder width, h w patches.
"""

import math

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, SiglipVisionConfig, SiglipVisionModel

_WIDEST = 2**16
_MOST_LAYERS = 16


@strict
class ConvStemVisionConfig(SiglipVisionConfig):
    """A SigLIP encoder with a convolutional stem.

    Attributes:
        stem_widths: channels after each convolution of the stem; the last is `hidden_size`.
        stem_strides: stride of each; together they make `patch_size`.

    The rest is as in `SiglipVisionConfig`.

    Raises:
        ValueError: a stem that does not end at `hidden_size` and `patch_size`.
    """

    model_type = "conv_stem_vision_model"

    stem_widths: list[int] | tuple[int, ...] = (192, 384, 768)
    stem_strides: list[int] | tuple[int, ...] = (2, 2, 4)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        widths, strides = list(self.stem_widths), list(self.stem_strides)
        if len(widths) != len(strides) or not 1 <= len(widths) <= _MOST_LAYERS:
            raise ValueError(f"stem_widths and stem_strides must be lists of one length, 1 to {_MOST_LAYERS}.")
        if not all(1 <= value <= _WIDEST for value in (*widths, *strides)):
            raise ValueError(f"stem_widths and stem_strides must be from 1 to {_WIDEST}.")
        if widths[-1] != self.hidden_size or math.prod(strides) != self.patch_size:
            raise ValueError(
                f"stem_widths ends at {widths[-1]} and stem_strides make {math.prod(strides)}; these must be "
                f"hidden_size ({self.hidden_size}) and patch_size ({self.patch_size})."
            )


class ConvStem(nn.Sequential):
    """Convolutions of 3 x 3 (or of their stride, where that is more), each but the last normalised and activated."""

    def __init__(self, config: ConvStemVisionConfig) -> None:
        layers: list[nn.Module] = []
        channels = config.num_channels
        for width, stride in zip(config.stem_widths, config.stem_strides, strict=True):
            kernel = max(3, stride)
            if layers:
                layers += [nn.GroupNorm(1, channels), nn.GELU()]
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding=(kernel - stride + 1) // 2))
            channels = width
        super().__init__(*layers)

    @property
    def weight(self) -> Tensor:
        """The last convolution's; its dtype is that of the stem."""
        return self[-1].weight


class ConvStemVisionModel(SiglipVisionModel):
    """(I, C, H, W) pixels -> (I, h * w, E) features, as `SiglipVisionModel`."""

    config: ConvStemVisionConfig
    config_class = ConvStemVisionConfig

    def __init__(self, config: ConvStemVisionConfig) -> None:
        super().__init__(config)
        self.embeddings.patch_embedding = ConvStem(config)
        self.post_init()


AutoConfig.register(ConvStemVisionConfig.model_type, ConvStemVisionConfig, exist_ok=True)
AutoModel.register(ConvStemVisionConfig, ConvStemVisionModel, exist_ok=True)

__all__ = ["ConvStemVisionConfig", "ConvStemVisionModel"]

"""Models that transformers does not hold, put together from parts of the same shape, for measuring cost only.

Shape suffixes: V views, P patches of a view, E encoder width, Q queries, D width of the language model, C channels,
H W feature map.
"""

from __future__ import annotations

import math

from torch import Tensor, cat, empty, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig


class Assembly(nn.Module):
    """A vision tower, a connector and a language model side by side.

    Args:
        vision_tower: from pixels to features.
        connector: from features (V, P, E) to visual tokens of the language model's width.
        text_config: of the language model.
    """

    def __init__(self, vision_tower: nn.Module, connector: nn.Module, text_config: PreTrainedConfig) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.connector = connector
        self.language_model = AutoModelForCausalLM.from_config(text_config)


def vision_tower(config: PreTrainedConfig) -> nn.Module:
    """A vision encoder of transformers without pooling head."""
    return AutoModel.from_config(config)


class DownsampleConnector(nn.Module):
    """MobileVLM V2's: two linear layers on every patch, average pooling, a depthwise convolution with a residual."""

    def __init__(self, vision_size: int, text_size: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.mlp = nn.Sequential(nn.Linear(vision_size, text_size), nn.GELU(), nn.Linear(text_size, text_size))
        self.position = nn.Conv2d(text_size, text_size, kernel_size=3, padding=1, groups=text_size)

    def forward(self, features_VPE: Tensor) -> Tensor:
        grid = math.isqrt(features_VPE.shape[1])
        map_VDHW = self.mlp(features_VPE).transpose(1, 2).unflatten(2, (grid, grid))
        map_VDHW = functional.adaptive_avg_pool2d(map_VDHW, (self.side, self.side))
        return (map_VDHW + self.position(map_VDHW)).flatten(2).transpose(1, 2)


class Resampler(nn.Module):
    """MiniCPM-V 2's: learned queries read the patches of each view by one cross attention.

    Args:
        vision_size: E. text_size: D. queries: Q, tokens of a view. num_heads: of the attention.
    """

    def __init__(self, vision_size: int, text_size: int, queries: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(empty(queries, text_size))
        self.kv_proj = nn.Linear(vision_size, text_size, bias=False)
        self.norm_query, self.norm_image, self.norm_output = (nn.LayerNorm(text_size) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(text_size, text_size) for _ in range(4))
        self.projection = nn.Parameter(empty(text_size, text_size))

    def forward(self, features_VPE: Tensor) -> Tensor:
        views = features_VPE.shape[0]
        image_VPD = self.norm_image(self.kv_proj(features_VPE))
        queries_VQD = self.norm_query(self.query).expand(views, -1, -1)
        heads = [
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, queries_VQD),
                (self.k_proj, image_VPD),
                (self.v_proj, image_VPD),
            )
        ]
        read_VQD = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.norm_output(self.out_proj(read_VQD)) @ self.projection


class GlobalAndLocalConnector(nn.Module):
    """Moondream's: features of the global view beside those of the stitched crops, then two linear layers."""

    def __init__(self, vision_size: int, hidden_size: int, text_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, text_size))

    def forward(self, global_VPE: Tensor, local_VPE: Tensor) -> Tensor:
        return self.mlp(cat([global_VPE, local_VPE], dim=-1))


class _Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(empty(channels))

    def forward(self, map_VCHW: Tensor) -> Tensor:
        return map_VCHW * self.gamma[:, None, None]


class _ConvolutionalMlp(nn.Sequential):
    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, expansion * channels, 1),
            nn.GELU(),
            nn.Conv2d(expansion * channels, channels, 1),
        )


class _ConvolutionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixer = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.mlp = _ConvolutionalMlp(channels)
        self.scale = _Scale(channels)

    def forward(self, map_VCHW: Tensor) -> Tensor:
        map_VCHW = self.mixer(map_VCHW)
        return map_VCHW + self.scale(self.mlp(map_VCHW))


class _AttentionBlock(nn.Module):
    def __init__(self, channels: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.projection = nn.Linear(channels, channels)
        self.mlp = _ConvolutionalMlp(channels)
        self.attention_scale, self.mlp_scale = _Scale(channels), _Scale(channels)

    def forward(self, map_VCHW: Tensor) -> Tensor:
        size = map_VCHW.shape[2:]
        heads = self.qkv(self.norm(map_VCHW.flatten(2).transpose(1, 2))).chunk(3, dim=-1)
        heads = [states.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for states in heads]
        mixed_VPC = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        mixed_VCHW = self.projection(mixed_VPC).transpose(1, 2).unflatten(2, size)
        map_VCHW = map_VCHW + self.attention_scale(mixed_VCHW)
        return map_VCHW + self.mlp_scale(self.mlp(map_VCHW))


class _SqueezeAndExcite(nn.Module):
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, reduction, 1), nn.Conv2d(reduction, channels, 1)

    def forward(self, map_VCHW: Tensor) -> Tensor:
        weight_VC11 = self.excite(self.squeeze(map_VCHW.mean((2, 3), keepdim=True)).relu())
        return map_VCHW * weight_VC11.sigmoid()


class FastViTHD(nn.Sequential):
    """FastVLM's convolutional encoder with its branches merged: five stages, attention in the last ones, stride 64.

    Of the size of timm's `fastvit_mci3` in inference mode, which needs timm and torchvision.

    Args:
        depths: blocks of each stage.
        width: channels of the first stage; they double from stage to stage.
        attention_stages: how many of the last stages mix by attention.
        head_size: channels of an attention head.
        reduction: inner channels of the last layer's squeeze and excite.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (2, 12, 24, 4, 2),
        width: int = 96,
        attention_stages: int = 2,
        head_size: int = 32,
        reduction: int = 192,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width),
            nn.GELU(),
            nn.Conv2d(width, width, 1),
            nn.GELU(),
        ]
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            if stage:
                half = channels // 2
                layers += [nn.Conv2d(half, channels, 7, stride=2, padding=3, groups=half), nn.GELU()]
                layers += [nn.Conv2d(channels, channels, 1), nn.GELU()]
            attends = stage >= len(depths) - attention_stages
            if attends:
                layers.append(nn.Conv2d(channels, channels, 7, padding=3, groups=channels))
            layers += [
                _AttentionBlock(channels, head_size) if attends else _ConvolutionBlock(channels) for _ in range(depth)
            ]
        layers.append(nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels))
        layers += [_SqueezeAndExcite(2 * channels, reduction), nn.GELU()]
        super().__init__(*layers)
        self.stride = 2 ** (len(depths) + 1)

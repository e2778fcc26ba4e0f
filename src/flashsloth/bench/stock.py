"""FlashSloth's parts put together from transformers as one would first do it: what our own code is measured against.

Shape suffixes: V views, P patches of a view, E encoder width, D width of the language model.
"""

from __future__ import annotations

import math

from torch import Tensor, cat, nn
from transformers import AutoModel, AutoModelForCausalLM

from flashsloth.model.configuration_flashsloth import FlashSlothConfig

from . import anatomy
from .arithmetic import matrix_flops
from .models import MODELS, BenchModel, model_named
from .results import Settings
from .token_rules import fixed


class WindowLoop(nn.Module):
    """Spatial attention pooling of one window after the other, then the projector."""

    def __init__(self, width: int, text_size: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.projector = nn.Sequential(nn.Linear(width, text_size), nn.GELU(), nn.Linear(text_size, text_size))

    def forward(self, features_VPE: Tensor) -> Tensor:
        side = math.isqrt(features_VPE.shape[1])
        map_VHWE = features_VPE.unflatten(1, (side, side))
        pooled = []
        for row in range(0, side, self.window):
            for column in range(0, side, self.window):
                window_VKE = map_VHWE[:, row : row + self.window, column : column + self.window].flatten(1, 2)
                weights_VK1 = self.score(window_VKE).softmax(1)
                pooled.append((weights_VK1 * window_VKE).sum(1, keepdim=True))
        return self.projector(cat(pooled, dim=1))


class StockFlashSloth(nn.Module):
    """The whole encoder with all hidden states, pooling window by window, a decoder that makes all logits; no EmbQ.

    Leaving out EmbQ is in its favour.
    """

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__()
        self.vision_tower = AutoModel.from_config(config.vision_config)
        sizes = config.vision_config.hidden_size, config.text_config.hidden_size
        self.connector = WindowLoop(*sizes, config.compressor_window)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


def _dissect(model: StockFlashSloth) -> anatomy.Anatomy:
    return anatomy.assembly(
        model,
        anatomy.siglip_transformer(model.vision_tower),
        connector_flops=lambda image, prompt: (
            matrix_flops(model.connector.score, image.patches) + matrix_flops(model.connector.projector, image.tokens)
        ),
    )


def _build(**values: object) -> StockFlashSloth:
    return StockFlashSloth(FlashSlothConfig(**values))


_NOTES = (
    "Stock parts: 27 encoder layers with all hidden states, a loop over windows, logits at every position, no EmbQ."
)
# what Settings.assembly "stock" means for a model
STOCK: dict[str, BenchModel] = {
    "flashsloth": BenchModel("FlashSloth, stock parts", "rebuilt", _build, _dissect, fixed(27, 81), notes=_NOTES),
    "flashsloth-hd": BenchModel(
        "FlashSloth-HD, stock parts", "rebuilt", _build, _dissect, fixed(27, 81, views=5), notes=_NOTES
    ),
}


def find_entry(model: str, assembly: str) -> BenchModel | None:
    """What was measured, None for a name that is not known here, of another version."""
    return (STOCK if assembly == "stock" else MODELS).get(model)


def entry_of(settings: Settings) -> BenchModel:
    """What is to be measured.

    Raises:
        ValueError: there is no such model, or no stock assembly of it.
    """
    entry = model_named(settings.model)
    if settings.assembly == "own":
        return entry
    if settings.model not in STOCK:
        raise ValueError(f"{settings.model} has no stock assembly; those that have one are {', '.join(STOCK)}")
    return STOCK[settings.model]

"""Teach an encoder that begins at random to see characters, by a loss on every patch.

From captions alone reading is learned last: a letter's features get no gradient before the language model looks at the
right place, and it does not look there before the features tell letters apart. Rendered images know where each
character stands, so the encoder can be told directly. Nothing is added to the model: the classes are fixed random
directions in the encoder's features.

Shape suffixes: B images, G glyphs of an image (padded), H W the encoder's grid, S slots of a patch side by side, K
classes, E width of the encoder.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.glyphs import CHARACTERS
from ..model.modeling_flashsloth import FlashSlothModel

CLASSES = len(CHARACTERS) + 1  # class 0: no character
SLOTS = 2  # characters side by side in a patch
EMPTY_WEIGHT = 0.15  # of class 0, which is by far the most frequent
SEED = 0  # of the directions: the same in every run, so that a resumed one goes on with them


def patch_labels(glyphs_BG3: Tensor, height: int, width: int) -> Tensor:
    """Class of every slot of every patch, (B, H, W, S); characters outside the image are left out."""
    classes_BG, x_BG, y_BG = glyphs_BG3[..., 0].long(), glyphs_BG3[..., 1], glyphs_BG3[..., 2]
    row_BG, column_BG = (y_BG * height).floor().long(), (x_BG * width * SLOTS).floor().long()
    shown_BG = (classes_BG > 0) & (row_BG >= 0) & (row_BG < height) & (column_BG >= 0) & (column_BG < width * SLOTS)
    labels_BHC = classes_BG.new_zeros(len(glyphs_BG3), height, width * SLOTS)
    image_BG = torch.arange(len(glyphs_BG3), device=classes_BG.device)[:, None].expand_as(classes_BG)
    labels_BHC[image_BG[shown_BG], row_BG[shown_BG], column_BG[shown_BG]] = classes_BG[shown_BG]
    return labels_BHC.unflatten(-1, (width, SLOTS))


class GlyphSupervision:
    """Cross-entropy of the characters in each patch, read off the encoder's features.

    Args:
        model: a FlashSloth model, or a wrapper that holds one.

    Raises:
        ValueError: the model cuts an image into several views.
    """

    def __init__(self, model: nn.Module) -> None:
        owner = next(module for module in model.modules() if isinstance(module, FlashSlothModel))
        if owner.config.num_views != 1:
            raise ValueError(
                f"glyph_loss needs one view an image, and this model has {owner.config.num_views} (view_grid "
                f"{owner.config.view_grid}); leave glyph_loss out"
            )
        width = owner.config.vision_config.hidden_size
        generator = torch.Generator().manual_seed(SEED)
        self.directions_CE = nn.init.orthogonal_(torch.empty(SLOTS * CLASSES, width), generator=generator)
        self._grid = owner.config.grid_height, owner.config.grid_width
        self._features_BTE: Tensor | None = None
        self._handle = owner.vision_tower.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._features_BTE = output.last_hidden_state

    def loss(self, glyphs_BG3: Tensor) -> Tensor:
        """Mean over the patches of the batch of the last forward pass, a float32 scalar.

        Args:
            glyphs_BG3: of `data.glyphs.glyph_tensor`.
        """
        assert self._features_BTE is not None, "call it after the forward pass"
        features_BTE, self._features_BTE = self._features_BTE, None
        height, width = self._grid
        features_BHWE = features_BTE[:, -height * width :].unflatten(1, self._grid)  # without class tokens
        labels_BHWS = patch_labels(glyphs_BG3, height, width)
        logits_BHWC = functional.linear(features_BHWE.float(), self.directions_CE.to(features_BHWE.device))
        logits_BHWSK = logits_BHWC.unflatten(-1, (SLOTS, CLASSES))
        weights_K = torch.ones(CLASSES, device=logits_BHWC.device)
        weights_K[0] = EMPTY_WEIGHT
        return functional.cross_entropy(logits_BHWSK.flatten(0, -2), labels_BHWS.flatten(), weights_K)

    def remove(self) -> None:
        """Stop keeping features."""
        self._handle.remove()

"""Compressors: from the encoder's patch grid to fewer visual tokens.

Shape suffixes: N images (every view counts as one), H W patches, h w windows, K patches in a window, E encoder width,
M tokens, F output width; I images, P patches of all views of one.

A new compressor is a class with `uses_window`, `any_window` (whether its weights fit windows of other sizes than its
own), `out_features` and `forward(features_NHWE, window=None) -> tokens_NMF`, and an entry in `COMPRESSORS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

CHOICE_SEED = 0  # of the patches that a random choice takes outside training


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Encoded images, for any number of calls.

    Attributes:
        last_hidden_state: un-pooled encoder features (I, P, E).
        pooler_output: visual tokens (I, N, D), each image's first `token_counts` of them where these differ.
        token_counts: (I,) int64 visual tokens of each image; None where every image has N.
    """

    token_counts: Tensor | None = None


def select_images(features: BaseModelOutputWithPooling, order: Tensor) -> ImageFeatures:
    """Features of some images, in this order."""
    counts = getattr(features, "token_counts", None)
    return ImageFeatures(
        last_hidden_state=features.last_hidden_state[order],
        pooler_output=features.pooler_output[order],
        token_counts=None if counts is None else counts[order.to(counts.device)],
    )


def compress_by_count(compress: Callable[..., Tensor], features_IPE: Tensor, token_counts_I: Tensor) -> Tensor:
    """Visual tokens (I, N, D) of images that have different numbers of them, zeros at the end of those with fewer.

    Args:
        compress: (features of some images, their number of tokens) -> their tokens.
    """
    counts = token_counts_I.tolist()
    if len(counts) != len(features_IPE):
        raise ValueError(f"image_token_counts names {len(counts)} images, but there are {len(features_IPE)}.")
    groups = {count: [image for image, own in enumerate(counts) if own == count] for count in counts}
    tokens = [compress(features_IPE[groups[count]], count) for count in groups]
    padded = [functional.pad(own, (0, 0, 0, max(counts) - own.shape[1])) for own in tokens]
    order = torch.tensor([image for group in groups.values() for image in group], device=features_IPE.device)
    return torch.cat(padded)[order.argsort()]


def split_windows(features_NHWE: Tensor, window: int) -> tuple[Tensor, Tensor | None]:
    """Cut a grid in windows, padding it at the bottom and right where the window does not divide it.

    Returns:
        windows_NMKE, row-major over windows and inside each, and keep_MK: False where a patch is padding (None when
        there is none).
    """
    images, height, width, channels = features_NHWE.shape
    pad_height, pad_width = -height % window, -width % window
    keep_MK = None
    if pad_height or pad_width:
        keep_1HW1 = torch.ones(1, height, width, 1, dtype=torch.bool, device=features_NHWE.device)
        features_NHWE = functional.pad(features_NHWE, (0, 0, 0, pad_width, 0, pad_height))
        keep_1HW1 = functional.pad(keep_1HW1, (0, 0, 0, pad_width, 0, pad_height))
        keep_MK = split_windows(keep_1HW1, window)[0][0, :, :, 0]
    rows, columns = (height + pad_height) // window, (width + pad_width) // window
    grid_NhKwKE = features_NHWE.reshape(images, rows, window, columns, window, channels)
    windows_NMKE = grid_NhKwKE.transpose(2, 3).reshape(images, rows * columns, window * window, channels)
    return windows_NMKE, keep_MK


class SpatialAttentionPooling(nn.Module):
    """SAP (paper section 3.2): a learned softmax over the patches of each window weighs their average.

    `on_weights`, where it is set, is called with the weights of every call: (N, M, K), rows sum to 1.
    """

    uses_window: ClassVar[bool] = True
    any_window: ClassVar[bool] = True
    on_weights: Callable[[Tensor], None] | None = None

    def __init__(self, hidden_size: int, window: int, dropout: float) -> None:
        super().__init__()
        self.window = window
        self.out_features = hidden_size
        self.score = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_size, 1)
        )

    def weights(self, windows_NMKE: Tensor, keep_MK: Tensor | None) -> Tensor:
        """Weight of each patch in its window: weights_NMK, rows sum to 1."""
        scores_NMK = self.score(windows_NMKE).squeeze(-1)
        if keep_MK is not None:
            scores_NMK = scores_NMK.masked_fill(~keep_MK, torch.finfo(scores_NMK.dtype).min)
        return scores_NMK.softmax(dim=-1, dtype=torch.float32).to(windows_NMKE.dtype)

    def forward(self, features_NHWE: Tensor, window: int | None = None) -> Tensor:
        windows_NMKE, keep_MK = split_windows(features_NHWE, window or self.window)
        weights_NMK = self.weights(windows_NMKE, keep_MK)
        if self.on_weights is not None:
            self.on_weights(weights_NMK)
        return (weights_NMK.unsqueeze(-2) @ windows_NMKE).squeeze(-2)


class AveragePooling(nn.Module):
    """Plain mean over each window."""

    uses_window: ClassVar[bool] = True
    any_window: ClassVar[bool] = True

    def __init__(self, hidden_size: int, window: int, dropout: float) -> None:
        super().__init__()
        self.window = window
        self.out_features = hidden_size

    def forward(self, features_NHWE: Tensor, window: int | None = None) -> Tensor:
        windows_NMKE, keep_MK = split_windows(features_NHWE, window or self.window)
        if keep_MK is None:
            return windows_NMKE.mean(dim=2)
        weights_MK = keep_MK / keep_MK.sum(dim=1, keepdim=True)
        return torch.einsum("mk,nmke->nme", weights_MK.to(windows_NMKE.dtype), windows_NMKE)


class RandomChoice(nn.Module):
    """One patch of each window, drawn anew at every training step; outside training always the same ones."""

    uses_window: ClassVar[bool] = True
    any_window: ClassVar[bool] = True

    def __init__(self, hidden_size: int, window: int, dropout: float) -> None:
        super().__init__()
        self.window = window
        self.out_features = hidden_size

    def forward(self, features_NHWE: Tensor, window: int | None = None) -> Tensor:
        windows_NMKE, keep_MK = split_windows(features_NHWE, window or self.window)
        images, windows, patches, _ = windows_NMKE.shape
        if self.training:
            scores_NMK = torch.rand(images, windows, patches, device=windows_NMKE.device)
        else:
            generator = torch.Generator().manual_seed(CHOICE_SEED)
            scores_NMK = torch.rand(1, windows, patches, generator=generator).to(windows_NMKE.device)
        if keep_MK is not None:
            scores_NMK = scores_NMK.masked_fill(~keep_MK, -1.0)
        chosen_NM11 = scores_NMK.argmax(-1)[..., None, None].expand(images, -1, -1, windows_NMKE.shape[-1])
        return windows_NMKE.gather(2, chosen_NM11).squeeze(2)


class PixelUnshuffle(nn.Module):
    """Concatenate the channels of each window; padding counts as zeros."""

    uses_window: ClassVar[bool] = True
    any_window: ClassVar[bool] = False

    def __init__(self, hidden_size: int, window: int, dropout: float) -> None:
        super().__init__()
        self.window = window
        self.out_features = hidden_size * window * window

    def forward(self, features_NHWE: Tensor, window: int | None = None) -> Tensor:
        return split_windows(features_NHWE, self.window)[0].flatten(2)


class NoCompression(nn.Module):
    """Every patch becomes a visual token."""

    uses_window: ClassVar[bool] = False
    any_window: ClassVar[bool] = False

    def __init__(self, hidden_size: int, window: int, dropout: float) -> None:
        super().__init__()
        self.out_features = hidden_size

    def forward(self, features_NHWE: Tensor, window: int | None = None) -> Tensor:
        return features_NHWE.flatten(1, 2)


COMPRESSORS: dict[str, type[nn.Module]] = {
    "spatial_attention": SpatialAttentionPooling,
    "average": AveragePooling,
    "random": RandomChoice,
    "pixel_unshuffle": PixelUnshuffle,
    "none": NoCompression,
}

"""Encode views of equal pixels once: the blank tiles of padded images, pages repeated in a batch.

Shape suffixes: I images, V views of an image, U distinct views, C channels, H W pixels, P patches, E encoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.backbones import encode_patches
from ..model.modeling_flashsloth import FlashSlothModel


def find_distinct_views(views: Tensor) -> tuple[list[int], list[int]]:
    """Which views are the first of their content, and for every view the place of its equal among those.

    Compared exactly, byte by byte. Views on another device are copied to the CPU for it, which waits for that device:
    give views that have not been moved yet.

    Args:
        views: (I*V, C, H, W).
    """
    rows = views.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    places: dict[bytes, int] = {}
    first: list[int] = []
    where: list[int] = []
    for index, row in enumerate(rows):
        content = row.tobytes()
        if content not in places:
            places[content] = len(first)
            first.append(index)
        where.append(places[content])
    return first, where


def encode_distinct_views(model: FlashSlothModel, pixel_values: Tensor) -> Tensor:
    """`model.encode_views` that runs the encoder once for views of equal content.

    An encoder sees every view alone, so the features are the same up to the rounding of a smaller batch.

    Args:
        model: its device decides where the encoder runs.
        pixel_values: (I, V, C, H, W), best on the CPU.

    Returns:
        un-pooled features (I, P, E), the views of an image one after the other.
    """
    if pixel_values.ndim != 5:
        return model.encode_views(pixel_values.to(model.device))
    first, where = find_distinct_views(pixel_values.flatten(0, 1))
    if len(first) == len(where):
        return model.encode_views(pixel_values.to(model.device))
    config = model.config
    if (pixel_values.shape[1], *pixel_values.shape[3:]) != (config.num_views, config.image_height, config.image_width):
        return model.encode_views(pixel_values.to(model.device))  # refuses the shape in words
    distinct_UCHW = pixel_values.flatten(0, 1)[first].to(model.device, model.vision_tower.dtype)
    features_UPE = encode_patches(model.vision_tower, distinct_UCHW, (config.grid_height, config.grid_width))
    features_VPE = features_UPE[torch.tensor(where, device=features_UPE.device)]
    return features_VPE.reshape(pixel_values.shape[0], -1, features_VPE.shape[-1])

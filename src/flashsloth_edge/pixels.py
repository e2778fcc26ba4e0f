"""From images to the pixels of the vision graph.

Shape suffixes: I images, V views, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .manifest import ImageSettings, Sizes
from .shared.image_loading import load_image
from .shared.image_views import apply_table, value_table, views_of


class Pixels:
    """Loads images and prepares them as the model's image processor does."""

    def __init__(self, settings: ImageSettings, sizes: Sizes) -> None:
        self.settings, self.sizes = settings, sizes
        normalization = None if settings.mean is None or settings.std is None else (settings.mean, settings.std)
        self._table = value_table(settings.rescale_factor, normalization)

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        """Pixels (I, V, C, H, W) float32 of paths, URLs, bytes, arrays or PIL images.

        Raises:
            ValueError, OSError: a bad image, by its place where there are several.
        """
        settings, sizes = self.settings, self.sizes
        levels = []
        for index, source in enumerate(images):
            try:
                image = load_image(
                    source,
                    max_pixels=settings.max_pixels,
                    max_bytes=settings.max_bytes,
                    alpha_background=settings.alpha_background,
                )
                color = tuple(settings.padding_color)
                grid, resample = settings.view_grid, settings.resample
                levels.append(views_of(image, sizes.height, sizes.width, grid, settings.do_pad, color, resample))
            except (ValueError, FileNotFoundError) as error:
                if len(images) == 1:
                    raise
                raise type(error)(f"image {index + 1} of {len(images)}: {error}") from error
        return apply_table(np.stack(levels), self._table)

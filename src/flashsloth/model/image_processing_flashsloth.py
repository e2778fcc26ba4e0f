"""From images to the encoder's pixels: one squashed or padded view, and for FlashSloth-HD a grid of tiles besides it.

Shape suffixes: I images of the batch, V views of an image, H W pixels of a view, C channels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType

from .image_loading import DEFAULT_MAX_BYTES, DEFAULT_MAX_PIXELS, DEFAULT_TIMEOUT_SECONDS, load_image
from .image_views import apply_table, padded_square, padding_color, value_table, views_of


class FlashSlothImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of `FlashSlothImageProcessor` beyond those of every image processor."""

    view_grid: list[int] | tuple[int, ...] | None
    alpha_background: list[int] | tuple[int, ...] | None
    max_pixels: int | None
    max_bytes: int | None
    url_timeout: float | None
    allow_private_urls: bool | None


class FlashSlothImageProcessor(BaseImageProcessor):
    """Resizes each image to the encoder's size; with a view grid adds the tiles of the image padded to a square.

    Views are ordered: whole image, then tiles row-major (paper section 3.4, FlashSloth-HD: grid (2, 2), five views).
    Resizing is Pillow's, on 8-bit pixels. An image that is padded is first averaged over blocks of pixels where a side
    is beyond 12,288 pixels.

    Args:
        size: {"height", "width"} of a view, in pixels.
        view_grid: `None`, or [rows, columns] of the tiles.
        do_pad: pad the whole image to a square before it is resized, too, so that it keeps its proportions; otherwise
            it is squashed.
        resample: filter of the resizing.
        do_rescale: multiply pixels by `rescale_factor`.
        rescale_factor: from 8-bit pixels to the range of the mean.
        do_normalize: pixel -> (pixel - mean) / std.
        image_mean: of all channels or of each; the square is padded with int(255 * mean).
        image_std: of all channels or of each.
        alpha_background: colour put under transparent pixels; `None` drops the alpha channel.
        max_pixels: an image with more is refused (see `load_image`).
        max_bytes: a file or download with more is refused.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = FlashSlothImageProcessorKwargs

    def __init__(
        self,
        size: dict[str, int] | None = None,
        view_grid: Sequence[int] | None = None,
        do_pad: bool = False,
        resample: int = PILImageResampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
        image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
        alpha_background: Sequence[int] | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = _checked_size(size or {"height": 384, "width": 384})
        self.view_grid = _checked_grid(view_grid)
        self.do_pad = do_pad
        self.resample = int(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _per_channel(image_mean, "image_mean")
        self.image_std = _per_channel(image_std, "image_std")
        self.alpha_background = None if alpha_background is None else list(alpha_background)
        self.max_pixels = max_pixels
        self.max_bytes = max_bytes

    @property
    def backend(self) -> str:
        """The imaging library, as transformers names it."""
        return "pil"

    @property
    def num_views(self) -> int:
        """Views of an image, V."""
        return 1 if self.view_grid is None else 1 + self.view_grid[0] * self.view_grid[1]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Views an image of this size is cut into (the name is the one serving engines call)."""
        grid = _checked_grid((images_kwargs or {}).get("view_grid", self.view_grid))
        return 1 if grid is None else 1 + grid[0] * grid[1]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Loads an image, or a list (of lists) of them, keeping the nesting."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return load_image(
            image_url_or_urls,
            max_pixels=self.max_pixels,
            max_bytes=self.max_bytes,
            alpha_background=self.alpha_background,
        )

    def preprocess(
        self,
        images: Any,
        *,
        size: dict[str, int] | None = None,
        view_grid: Sequence[int] | None = None,
        do_pad: bool | None = None,
        resample: int | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        alpha_background: Sequence[int] | None = None,
        max_pixels: int | None = None,
        max_bytes: int | None = None,
        url_timeout: float | None = None,
        allow_private_urls: bool | None = None,
        input_data_format: str | None = None,
        return_tensors: str | TensorType | None = None,
        **unused: Any,
    ) -> BatchFeature:
        """Turns images into pixels.

        Args:
            images: an image in any form `load_image` takes, or a list, or a list of lists (one per row of text).
            return_tensors: "pt", "np" or None (a numpy array).

        The other arguments override the processor's own for this call; `None` keeps them. `allow_private_urls` is
        not a setting of the processor, so that no downloaded configuration can switch it on.

        Returns:
            `pixel_values` (I, V, 3, H, W) float32, images in reading order.

        Raises:
            ValueError, FileNotFoundError: an image is bad; names it, and its place among several.
        """
        for name, value in unused.items():
            if value is not None and value is not getattr(type(self), name, None) and name not in IGNORED_KWARGS:
                raise ValueError(f"FlashSlothImageProcessor has no option {name!r}")
        size = self.size if size is None else _checked_size(size)
        grid = self.view_grid if view_grid is None else _checked_grid(view_grid)
        mean = self.image_mean if image_mean is None else _per_channel(image_mean, "image_mean")
        std = self.image_std if image_std is None else _per_channel(image_std, "image_std")
        do_pad = self.do_pad if do_pad is None else do_pad
        resample = self.resample if resample is None else int(resample)
        background = self.alpha_background if alpha_background is None else alpha_background
        table = value_table(
            (self.rescale_factor if rescale_factor is None else rescale_factor)
            if (self.do_rescale if do_rescale is None else do_rescale)
            else None,
            (mean, std) if (self.do_normalize if do_normalize is None else do_normalize) else None,
        )
        flat = list(flatten_images(images))
        if not flat:
            raise ValueError("no images were given")
        views = 1 if grid is None else 1 + grid[0] * grid[1]
        height, width = size["height"], size["width"]
        color = padding_color(mean)
        levels_IVHWC = np.empty((len(flat), views, height, width, 3), dtype=np.uint8)
        for index, source in enumerate(flat):
            try:
                image = load_image(
                    source,
                    max_pixels=self.max_pixels if max_pixels is None else max_pixels,
                    max_bytes=self.max_bytes if max_bytes is None else max_bytes,
                    timeout=DEFAULT_TIMEOUT_SECONDS if url_timeout is None else url_timeout,
                    allow_private_urls=bool(allow_private_urls),
                    alpha_background=background,
                    input_data_format=input_data_format,
                )
                levels_IVHWC[index] = views_of(image, height, width, grid, do_pad, color, resample)
            except (ValueError, FileNotFoundError) as error:
                if len(flat) == 1:
                    raise
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                raise kind(f"image {index + 1} of {len(flat)}: {error}") from error
        return BatchFeature({"pixel_values": apply_table(levels_IVHWC, table)}, tensor_type=return_tensors)

    def place_in_view(self, image_size: tuple[int, int], x: float, y: float) -> tuple[float, float]:
        """Where a place of an image lies in its first view, in parts of the view's width and height.

        Args:
            image_size: (width, height) of the image in pixels.
            x: pixels from its left side.
            y: pixels from its upper side.
        """
        width, height = image_size
        if not self.do_pad:
            return x / width, y / height
        side = max(width, height)
        return (x + (side - width) // 2) / side, (y + (side - height) // 2) / side

    def view_rectangles(self, image_size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
        """What each view shows, (left, top, right, bottom) in pixels of the image; padding lies beyond its sides.

        Args:
            image_size: (width, height) of the image in pixels.
        """
        left, top, right, bottom = square = padded_square(*image_size)
        views = [square if self.do_pad else (0.0, 0.0, float(image_size[0]), float(image_size[1]))]
        if self.view_grid is not None:
            rows, columns = self.view_grid
            width, height = (right - left) / columns, (bottom - top) / rows
            views += [
                (left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height)
                for row in range(rows)
                for column in range(columns)
            ]
        return views


# Options every image processor is offered that mean nothing here.
IGNORED_KWARGS = frozenset({
    "data_format", "default_to_square", "device", "disable_grouping", "do_convert_rgb", "do_resize",
    "image_seq_length",
})  # fmt: skip


def flatten_images(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) >= 4:
        for image in images:
            yield from flatten_images(image)
    elif images is not None:
        yield images


def _checked_size(size: Any) -> dict[str, int]:
    size = dict(get_size_dict(size))
    if set(size) != {"height", "width"} or min(size.values()) < 1:
        raise ValueError(f'size must be {{"height": ..., "width": ...}} in pixels, got {size}')
    return {"height": int(size["height"]), "width": int(size["width"])}


def _checked_grid(grid: Sequence[int] | None) -> list[int] | None:
    if grid is None:
        return None
    if len(grid) != 2 or any(not isinstance(value, int) or value < 1 for value in grid):
        raise ValueError(f"view_grid must be None or [rows, columns] with both at least 1, got {grid!r}")
    return list(grid)


def _per_channel(value: float | Sequence[float], name: str) -> list[float]:
    values = [float(value)] * 3 if isinstance(value, (int, float)) else [float(item) for item in value]
    if len(values) != 3:
        raise ValueError(f"{name} needs one value or three, got {len(values)}")
    return values


__all__ = ["FlashSlothImageProcessor"]

"""The views of an image: squashed or padded, and a grid of tiles; and the values that their pixels become.

Shape suffixes: I images of the batch, V views of an image, H W pixels of a view, C channels.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

# Pixels of the padded square held at a time while its rows are resized.
STRIP_PIXELS = 1 << 24
# Padding to a square costs the square of the longer side, however little there is of the image.
MAX_PADDED_SIDE = 12_288
COLOR_LEVELS = 256


def padding_color(mean: Sequence[float]) -> tuple[int, ...]:
    """What a square is padded with: the mean of the pixels, as 8-bit levels."""
    return tuple(int(255 * value) for value in mean)


def views_of(
    image: Image.Image,
    height: int,
    width: int,
    grid: Sequence[int] | None,
    do_pad: bool,
    color: tuple[int, ...],
    resample: int,
) -> np.ndarray:
    """Views of an 8-bit RGB image, (V, H, W, C) uint8: the whole image, then the tiles of `grid` row-major.

    Args:
        do_pad: pad the whole image to a square with `color`; otherwise it is squashed. Tiles are always padded.
        resample: filter of Pillow.
    """
    if do_pad:
        whole = _resize_padded(image, (width, height), color, resample)
    else:
        whole = _squash(image, (width, height), resample)
    levels_1HWC = np.asarray(whole)[None]
    if grid is None:
        return levels_1HWC
    return np.concatenate([levels_1HWC, _tiles(image, height, width, grid, color, resample)])


def _tiles(
    image: Image.Image, height: int, width: int, grid: Sequence[int], color: tuple[int, ...], resample: int
) -> np.ndarray:
    rows, columns = grid
    levels_HWC = np.asarray(_resize_padded(image, (columns * width, rows * height), color, resample))
    tiles = levels_HWC.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, height, width, 3)


def _squash(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """Resizes to (width, height), the same under every release of Pillow.

    Pillow resizes one axis after the other with 8 bits in between, so their order shows. Before Pillow 13 rows came
    first; since then columns do where the height shrinks much more than the width. The recorded pixels are of the
    latter kind.
    """
    target_width, target_height = size
    width, height = image.size
    shrinks_height_more = height > target_height and height - target_height > 2 * (width - target_width)
    first = (width, target_height) if shrinks_height_more else (target_width, height)
    return image.resize(first, resample).resize(size, resample)


def _resize_padded(image: Image.Image, size: tuple[int, int], color: tuple[int, ...], resample: int) -> Image.Image:
    """The image padded to a centred square, then resized to (width, height), rows first.

    Rows do not touch each other in the first pass: strips of the image give the same pixels as the whole square, which
    is never held (a long image would need a huge one).
    """
    target_width, target_height = size
    image = _averaged(image, color)
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (target_width, side), color)
    strip_rows = max(1, STRIP_PIXELS // side)
    for start in range(0, height, strip_rows):
        stop = min(height, start + strip_rows)
        strip = Image.new("RGB", (side, stop - start), color)
        strip.paste(image.crop((0, start, width, stop)), (left, 0))
        narrow.paste(strip.resize((target_width, stop - start), resample), (0, top + start))
    return narrow.resize((target_width, target_height), resample)


def padded_square(width: int, height: int) -> tuple[float, float, float, float]:
    """The square that `_resize_padded` makes of an image, in pixels of the image."""
    factor = -(-max(width, height) // MAX_PADDED_SIDE)
    is_wide = width > height
    # whole blocks are averaged along the longer side, and the shorter one is padded to whole blocks
    before_x, before_y = (0 if is_wide else (-width % factor) // 2), ((-height % factor) // 2 if is_wide else 0)
    columns, rows = -(-width // factor), -(-height // factor)
    side = max(columns, rows)
    left = -((side - columns) // 2) * factor - before_x
    top = -((side - rows) // 2) * factor - before_y
    return float(left), float(top), float(left + side * factor), float(top + side * factor)


def _averaged(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image, averaged over square blocks if its longer side is beyond `MAX_PADDED_SIDE`.

    The longer side is averaged first, and only then the shorter one padded to whole blocks: this never needs more than
    about twice the image.
    """
    factor = -(-max(image.size) // MAX_PADDED_SIDE)
    if factor == 1:
        return image
    is_wide = image.width > image.height
    image = image.reduce((factor, 1) if is_wide else (1, factor))
    padding = (0, -image.height % factor) if is_wide else (-image.width % factor, 0)
    padded = Image.new("RGB", (image.width + padding[0], image.height + padding[1]), color)
    padded.paste(image, (padding[0] // 2, padding[1] // 2))
    return padded.reduce((1, factor) if is_wide else (factor, 1))


def value_table(rescale_factor: float | None, mean_std: tuple[Sequence[float], Sequence[float]] | None) -> np.ndarray:
    """What each of the 256 levels becomes, per channel (3, 256): the arithmetic is done once, not per pixel."""
    values = np.arange(COLOR_LEVELS, dtype=np.float64)
    values = (values if rescale_factor is None else values * rescale_factor).astype(np.float32)
    table = np.repeat(values[None], 3, axis=0)
    if mean_std is not None:
        mean, std = (np.asarray(value, dtype=np.float32)[:, None] for value in mean_std)
        table = (table - mean) / std
    return table


def apply_table(levels_IVHWC: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Pixels (I, V, C, H, W) float32 of levels (I, V, H, W, C) uint8, by the table of `value_table`."""
    pixels_IVCHW = np.empty((*levels_IVHWC.shape[:2], 3, *levels_IVHWC.shape[2:4]), dtype=np.float32)
    for index in np.ndindex(levels_IVHWC.shape[:2]):
        for channel, values in enumerate(table):
            # All levels are in the table: "clip" only spares the check.
            np.take(values, levels_IVHWC[index][..., channel], out=pixels_IVCHW[index][channel], mode="clip")
    return pixels_IVCHW

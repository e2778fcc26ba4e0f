"""From the size of an image to patches and visual tokens, by each model's default preprocessing.

A rule is a pure function of width and height in pixels. It answers with the patch grid of every view the encoder sees
and with the number of visual tokens the language model reads. Marks around the image (row separators, start and end
tokens, chat templates) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class VisualInput:
    """What one image becomes.

    Attributes:
        grids: (rows, columns) of encoder patches of every view, in the order they are encoded.
        tokens: visual tokens of all views together.
    """

    grids: tuple[tuple[int, int], ...]
    tokens: int

    @property
    def views(self) -> int:
        """Images the encoder sees."""
        return len(self.grids)

    @property
    def patches_of_views(self) -> tuple[int, ...]:
        """Encoder patches of each view, class tokens not counted."""
        return tuple(rows * columns for rows, columns in self.grids)

    @property
    def patches(self) -> int:
        """Encoder patches of all views."""
        return sum(self.patches_of_views)


TokenRule = Callable[[int, int], VisualInput]


def _nearest_multiple(length: float, factor: int) -> int:
    """The multiple nearest to a length, at least one (Python rounds halves to even, as the processors do)."""
    return max(round(length / factor), 1) * factor


def fixed(grid: int, tokens_per_view: int, views: int = 1) -> TokenRule:
    """Every image is resized to the encoder's size.

    Args:
        grid: patches on a side of one view.
        tokens_per_view: visual tokens of one view.
        views: images made of one image, whatever its size.
    """
    return lambda width, height: VisualInput(((grid, grid),) * views, views * tokens_per_view)


def native_resolution(patch: int, merge: int, min_pixels: int, max_pixels: int) -> TokenRule:
    """Qwen-VL: sides are rounded to whole merged patches; the area is kept within two bounds.

    Args:
        patch: side of a patch in pixels.
        merge: patches on a side of one visual token.
        min_pixels, max_pixels: smallest and largest area.
    """
    factor = patch * merge

    def rule(width: int, height: int) -> VisualInput:
        sides = [_nearest_multiple(side, factor) for side in (height, width)]
        if sides[0] * sides[1] > max_pixels:
            shrink = math.sqrt(height * width / max_pixels)
            sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
        elif sides[0] * sides[1] < min_pixels:
            grow = math.sqrt(min_pixels / (height * width))
            sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
        rows, columns = (side // patch for side in sides)
        return VisualInput(((rows, columns),), rows * columns // merge**2)

    return rule


def closest_tiling(width: int, height: int, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows of the grid of tiles whose aspect ratio is nearest to the image's.

    Among equal ratios more tiles win while the image covers more than half of their area.
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if min_tiles <= columns * rows <= max_tiles
    ]
    best, smallest = (1, 1), math.inf
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        covers = width * height > 0.5 * tile * tile * columns * rows
        if difference < smallest or (difference == smallest and covers):
            best, smallest = (columns, rows), difference
    return best


def tiles_of_nearest_ratio(tile_grid: int, tokens_per_tile: int, tile: int, max_tiles: int) -> TokenRule:
    """InternVL: the image is resized to a grid of square tiles; a thumbnail is added to more than one.

    Args:
        tile_grid: patches on a side of a tile.
        tokens_per_tile: visual tokens of a tile.
        tile: side of a tile in pixels.
        max_tiles: largest number of tiles, thumbnail not counted.
    """

    def rule(width: int, height: int) -> VisualInput:
        columns, rows = closest_tiling(width, height, tile, 1, max_tiles)
        views = columns * rows + (columns * rows > 1)
        return VisualInput(((tile_grid, tile_grid),) * views, views * tokens_per_tile)

    return rule


def tiles_of_long_side(tile_grid: int, tokens_per_tile: int, tile: int, long_side: int) -> TokenRule:
    """SmolVLM: the long side is scaled to a fixed length, the image cut in tiles, a global view added.

    Small images are scaled up, so that they cost as much as large ones.

    Args:
        tile_grid: patches on a side of a tile.
        tokens_per_tile: visual tokens of a tile.
        tile: side of a tile in pixels.
        long_side: length in pixels of the long side.
    """

    def rule(width: int, height: int) -> VisualInput:
        short = int(long_side * min(width, height) / max(width, height))
        short = max(short + short % 2, 1)
        tiles = math.ceil(long_side / tile) * math.ceil(short / tile)
        views = tiles + (tiles > 1)
        return VisualInput(((tile_grid, tile_grid),) * views, views * tokens_per_tile)

    return rule


def _slice_grids(slices: int, max_slices: int) -> Iterator[tuple[int, int]]:
    for count in (slices - 1, slices, slices + 1):
        if 1 < count <= max_slices:
            yield from ((rows, count // rows) for rows in range(1, count + 1) if count % rows == 0)


def adaptive_slices(
    patch: int, side_factor: int, slice_side: int, max_slices: int, tokens: Callable[[int, int], int]
) -> TokenRule:
    """MiniCPM-V: an overview, and for large images slices of about the area of a square, of free aspect ratio.

    Args:
        patch: side of a patch in pixels.
        side_factor: sides of a view are multiples of this many pixels.
        slice_side: side in pixels of the square whose area a slice has.
        max_slices: largest number of slices, overview not counted.
        tokens: visual tokens of a view from its rows and columns of patches.
    """

    def view(width: float, height: float, upscale: bool) -> tuple[int, int]:
        if upscale or width * height > slice_side**2:
            ratio = width / height
            height = int(slice_side / math.sqrt(ratio))
            width = int(height * ratio)
        return _nearest_multiple(height, side_factor) // patch, _nearest_multiple(width, side_factor) // patch

    def rule(width: int, height: int) -> VisualInput:
        slices = min(math.ceil(width * height / slice_side**2), max_slices)
        if slices <= 1:
            grids = [view(width, height, upscale=True)]
        else:
            best, smallest = (1, 1), math.inf
            for rows, columns in _slice_grids(slices, max_slices):
                error = abs(math.log(width / height) - math.log(columns / rows))
                if error < smallest or (error == smallest and rows > best[0]):
                    best, smallest = (rows, columns), error
            rows, columns = best
            slice_width = _nearest_multiple(width, columns) / columns
            slice_height = _nearest_multiple(height, rows) / rows
            grids = [view(width, height, upscale=False)]
            grids += [view(slice_width, slice_height, upscale=True)] * (rows * columns)
        return VisualInput(tuple(grids), sum(tokens(*grid) for grid in grids))

    return rule


def native_then_tiles(
    patch: int,
    merge: int,
    min_tokens: int,
    max_tokens: int,
    tile: int,
    min_tiles: int,
    max_tiles: int,
    tolerance: float,
) -> TokenRule:
    """LFM2-VL: native resolution up to a bound; above it tiles of one size and a thumbnail of native aspect.

    Args:
        patch: side of a patch in pixels.
        merge: patches on a side of one visual token.
        min_tokens, max_tokens: of a view at native resolution.
        tile: side of a tile in pixels.
        min_tiles, max_tiles: numbers of tiles, thumbnail not counted.
        tolerance: an image is cut when its area exceeds this many times that of `max_tokens`.
    """
    pixels_of_token = (patch * merge) ** 2
    whole = native_resolution(patch, merge, min_tokens * pixels_of_token, max_tokens * pixels_of_token)

    def rule(width: int, height: int) -> VisualInput:
        rounded = math.prod(_nearest_multiple(side, patch * merge) for side in (width, height))
        thumbnail = whole(width, height)
        if rounded <= max_tokens * pixels_of_token * tolerance:
            return thumbnail
        columns, rows = closest_tiling(width, height, tile, min_tiles, max_tiles)
        side = tile // patch
        tiles = columns * rows
        tokens = tiles * (side // merge) ** 2
        if tiles == 1:
            return VisualInput(((side, side),), tokens)
        return VisualInput(((side, side),) * tiles + thumbnail.grids, tokens + thumbnail.tokens)

    return rule


def overlapping_crops(crop: int, patch: int, margin: int, max_crops: int, tokens: int) -> TokenRule:
    """Moondream: crops that overlap by a margin, and a global view; always the same number of visual tokens.

    Args:
        crop: side of a crop in pixels.
        patch: side of a patch in pixels.
        margin: patches on each side of a crop that its neighbours see too.
        max_crops: largest number of crops, global view not counted.
        tokens: visual tokens of an image.
    """
    overlap = 2 * margin * patch
    window = crop - overlap

    def rule(width: int, height: int) -> VisualInput:
        inner_width, inner_height = width - overlap, height - overlap
        rows = columns = 1
        if inner_height > window and inner_width > window:
            least_rows, least_columns = math.ceil(inner_height / window), math.ceil(inner_width / window)
            if least_rows * least_columns > max_crops:
                shrink = math.sqrt(max_crops / (least_rows * least_columns))
                rows, columns = (max(1, math.floor(least * shrink)) for least in (least_rows, least_columns))
            else:
                rows = max(math.floor(math.sqrt(max_crops * inner_height / inner_width)), least_rows)
                columns = max(math.floor(math.sqrt(max_crops * inner_width / inner_height)), least_columns)
                if rows * columns > max_crops:
                    if columns > rows:
                        columns = max_crops // rows
                    else:
                        rows = max_crops // columns
        side = crop // patch
        return VisualInput(((side, side),) * (rows * columns + 1), tokens)

    return rule

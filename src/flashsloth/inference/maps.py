"""Maps over the encoder's grid, laid over the image in its own geometry.

Shape suffixes: V views of an image, R rows and C columns of the encoder's grid, H W rows and columns of a picture.
"""

from collections.abc import Sequence

import numpy as np

Rectangle = tuple[float, float, float, float]


def overlaps(edges_from: np.ndarray, edges_to: np.ndarray) -> np.ndarray:
    """How much of each interval of one line lies in each of another: (to, from), parts of the interval.

    Args:
        edges_from: ascending ends of neighbouring intervals, one more than there are.
        edges_to: the same of the other line.
    """
    low = np.maximum(edges_to[:-1, None], edges_from[None, :-1])
    high = np.minimum(edges_to[1:, None], edges_from[None, 1:])
    return np.clip(high - low, 0, None) / np.diff(edges_from)[None]


def spread(
    maps_VRC: np.ndarray, rectangles: Sequence[Rectangle], image_size: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """The maps of all views added up over the image, each cell's amount spread evenly over what the cell shows.

    What lies on padding is left out, so that the sum is that of the maps less the padding's share.

    Args:
        maps_VRC: amounts, such as weights of attention.
        rectangles: of the views in pixels of the image, as `FlashSlothImageProcessor.view_rectangles` has them.
        image_size: (width, height) of the image in pixels.
        shape: (H, W) of the result, which covers the whole image.

    Returns:
        (H, W) float64.
    """
    width, height = image_size
    rows_to, columns_to = np.linspace(0, height, shape[0] + 1), np.linspace(0, width, shape[1] + 1)
    total_HW = np.zeros(shape)
    for map_RC, (left, top, right, bottom) in zip(maps_VRC, rectangles, strict=True):
        rows_HR = overlaps(np.linspace(top, bottom, map_RC.shape[0] + 1), rows_to)
        columns_WC = overlaps(np.linspace(left, right, map_RC.shape[1] + 1), columns_to)
        total_HW += rows_HR @ map_RC.astype(np.float64) @ columns_WC.T
    return total_HW


def spread_windows(tokens_VM: np.ndarray, window: int, grid: tuple[int, int]) -> np.ndarray:
    """Amounts of visual tokens, each divided evenly among the patches of its window.

    Args:
        tokens_VM: (views, tokens of a view), row-major.
        window: side of a window in patches; windows at the end may be cut.
        grid: (R, C).

    Returns:
        (V, R, C) float64; the sum stays.
    """
    rows, columns = grid
    down, across = -(-rows // window), -(-columns // window)
    tokens_VRC = tokens_VM.reshape(-1, down, across).astype(np.float64)
    spread_VRC = tokens_VRC.repeat(window, axis=1).repeat(window, axis=2)[:, :rows, :columns]
    row_sizes = np.minimum(window, rows - window * np.arange(down))
    column_sizes = np.minimum(window, columns - window * np.arange(across))
    patches_RC = np.outer(row_sizes, column_sizes).repeat(window, axis=0).repeat(window, axis=1)[:rows, :columns]
    return spread_VRC / patches_RC


def join_windows(weights_VMK: np.ndarray, window: int, grid: tuple[int, int]) -> np.ndarray:
    """Weights of the patches of each window, row-major, put in their places on the grid: (V, R, C)."""
    rows, columns = grid
    down, across = -(-rows // window), -(-columns // window)
    blocks = weights_VMK.reshape(-1, down, across, window, window).transpose(0, 1, 3, 2, 4)
    return blocks.reshape(-1, down * window, across * window)[:, :rows, :columns]


def brightest_place(map_HW: np.ndarray) -> tuple[float, float]:
    """(x, y) of the maximum in parts of the width and height; the middle of all places that share it."""
    rows, columns = np.nonzero(map_HW >= map_HW.max() - 1e-12 * abs(map_HW.max()))
    return float(columns.mean() + 0.5) / map_HW.shape[1], float(rows.mean() + 0.5) / map_HW.shape[0]

"""From values of any type and range to the 256 levels of an 8-bit picture.

A range that must be told from the values is told so that no picture turns black in silence: values a little beyond the
end of a range belong to it, and a picture that comes out nearly black is reported.
"""

import warnings
from collections.abc import Sequence

import numpy as np

EIGHT_BIT_MAX = 255
SIXTEEN_BIT_MAX = 65535
# Resampling with negative lobes (bicubic, Lanczos) passes both ends of a range by up to about a quarter of it.
OVERSHOOT = 0.25
# A picture whose brightest level is below this looks black, such as 12 bits in uint16.
NEARLY_BLACK = 20


def to_eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    """Levels (uint8) of an array of any shape.

    uint8 is taken as it is, bool is black and white, and uint16 spans 0..65535. Other integers hold levels of 0..255.
    Floats hold 0..1 or levels of 0..255: up to 1.25 they are of the first kind.

    Values beyond the range by more than rounding are clipped with a warning, and a picture that comes out nearly black
    gives a warning, also where a few large values alone speak for the larger range.

    Raises:
        ValueError: another type, values that are not finite, or values of neither range.
    """
    kind = array.dtype.kind
    if array.dtype == bool:
        return array.astype(np.uint8) * EIGHT_BIT_MAX
    if kind not in "iuf":
        raise ValueError(f"{name} has values of type {array.dtype}; pass uint8, uint16, bool, or floats in 0..1")
    if array.dtype == np.uint8:
        if array.max() == 1:
            _warn_of_black(name, array, 1, EIGHT_BIT_MAX)
        return array
    lowest, highest = _extremes(array, name)
    if kind == "u" and array.dtype.itemsize == 2:
        return _scaled(array, SIXTEEN_BIT_MAX, lowest, highest, name)
    end, lesser = _told_range((1, EIGHT_BIT_MAX) if kind == "f" else (EIGHT_BIT_MAX,), lowest, highest)
    if end is None:
        raise ValueError(
            f"{name} has {array.dtype} values from {lowest:g} to {highest:g}; pass uint8, uint16, or floats in 0..1 "
            "(pixels that are already normalised cannot be processed again)"
        )
    return _scaled(array, end, lowest, highest, name, lesser)


def deep_grey_to_eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    """Levels (uint8) of a grey picture of Pillow's modes I and F, (H, W) int32 or float32, which carry no range.

    0..1 (floats only), 0..255 and 0..65535 are told apart by the largest value, as in `to_eight_bits`; whatever fits
    none of them is stretched to 0..255, with a warning.

    Raises:
        ValueError: values that are not finite, or one value everywhere that fits no range.
    """
    lowest, highest = _extremes(array, name)
    ends = (EIGHT_BIT_MAX, SIXTEEN_BIT_MAX) if array.dtype.kind in "iu" else (1, EIGHT_BIT_MAX, SIXTEEN_BIT_MAX)
    end, lesser = _told_range(ends, lowest, highest)
    if end is not None:
        return _scaled(array, end, lowest, highest, name, lesser)
    if lowest == highest:
        raise ValueError(f"{name} is {lowest:g} everywhere, which is in none of 0..1, 0..255 and 0..65535")
    warnings.warn(f"{name} has grey values from {lowest:g} to {highest:g}; they are stretched to 0..255", stacklevel=2)
    return np.rint((array.astype(np.float64) - lowest) * (EIGHT_BIT_MAX / (highest - lowest))).astype(np.uint8)


def _extremes(array: np.ndarray, name: str) -> tuple[float, float]:
    lowest, highest = float(array.min()), float(array.max())
    if not np.isfinite(lowest) or not np.isfinite(highest):
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity)")
    return lowest, highest


def _told_range(ends: Sequence[int], lowest: float, highest: float) -> tuple[int | None, int]:
    """The end of the least range (0..end) that holds the values, up to rounding and what resampling adds.

    Returns:
        the end, or None; and the end of the range before it, 0 if there is none.
    """
    lesser = 0
    for end in ends:
        if highest <= end * (1 + OVERSHOOT):
            return (end if lowest >= -max(OVERSHOOT * highest, _half_level(end)) else None), lesser
        lesser = end
    return None, lesser


def _half_level(end: int) -> float:
    return end / EIGHT_BIT_MAX / 2


def _scaled(array: np.ndarray, end: int, lowest: float, highest: float, name: str, lesser: int = 0) -> np.ndarray:
    if lowest < -_half_level(end) or highest > end + _half_level(end):
        warnings.warn(
            f"{name} has {array.dtype} values from {lowest:g} to {highest:g}; they are clipped to 0..{end}",
            stacklevel=3,
        )
    if end == SIXTEEN_BIT_MAX:
        values = np.clip(np.rint(array), 0, end).astype(np.uint32)
        levels = ((values * EIGHT_BIT_MAX + end // 2) // end).astype(np.uint8)
    else:
        values = np.rint(array * EIGHT_BIT_MAX if end == 1 else array)
        levels = np.clip(values, 0, EIGHT_BIT_MAX).astype(np.uint8)
    few_are_bright = lesser > 0 and 2 * np.count_nonzero(array > lesser * (1 + OVERSHOOT)) < np.count_nonzero(
        array > 0
    )
    if few_are_bright or (highest > 0 and levels.max() < NEARLY_BLACK):
        _warn_of_black(name, array, highest, end)
    return levels


def _warn_of_black(name: str, array: np.ndarray, highest: float, end: int) -> None:
    warnings.warn(
        f"{name} is nearly black: its {array.dtype} values reach {highest:g}, on a scale of 0..{end}. If it is meant "
        "brighter, clip outliers and scale it: bool is black and white, floats are 0..1, uint8 is 0..255, and uint16 "
        "0..65535",
        stacklevel=4,
    )

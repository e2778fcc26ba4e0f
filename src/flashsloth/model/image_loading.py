"""Turns whatever a user calls an image (path, URL, bytes, array, tensor, PIL image) into an upright 8-bit RGB image.

Everything that may fail on a user's file is checked here, before pixels are decoded where that is possible.
"""

import base64
import binascii
import io
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_to_bytes, urlparse
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .image_download import download

DEFAULT_MAX_PIXELS = 100_000_000
DEFAULT_MAX_BYTES = 256 * 1024 * 1024
DEFAULT_TIMEOUT_SECONDS = 20.0
EXIF_ORIENTATION_TAG = 0x0112
# Decoders of these start another program or need one.
REFUSED_FORMATS = frozenset({"EPS", "WMF", "EMF", "FPX", "MIC", "GRIB", "HDF5", "BUFR", "MPEG"})
# What Pillow's decoders raise on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)
SIXTEEN_BIT_MAX = 65535


def load_image(
    source: Any,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_bytes: int = DEFAULT_MAX_BYTES,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    allow_private_urls: bool = False,
    alpha_background: Sequence[int] | None = None,
    input_data_format: str | None = None,
) -> Image.Image:
    """Loads one image as 8-bit RGB, EXIF orientation applied.

    Args:
        source: PIL image; numpy array or torch tensor, (H, W), (H, W, C) or (C, H, W), uint8, uint16, bool or float
            in 0..1 (or 0..255); local path (`str`, `Path`, `file://`); `http(s)://` URL; `data:` URL; `bytes`; or an
            open binary file.
        max_pixels: larger images are refused from their header, before decoding.
        max_bytes: limit of the encoded file, whatever it comes from.
        timeout: seconds to wait for a URL's server, in all.
        allow_private_urls: also fetch from loopback, private and link-local addresses.
        alpha_background: colour (red, green, blue in 0..255) under transparent pixels. `None` drops the alpha channel
            and keeps the colours stored beneath it, which is what the published models were trained with.
        input_data_format: "channels_first" or "channels_last" for arrays whose shape leaves it open.

    Animated files give their first frame (with a warning); a PIL image gives the frame it stands at. Grey images of
    16 and 32 bits are scaled to 8 bits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything else that is wrong with the image; names it and the cause.
    """
    if isinstance(source, Image.Image):
        return _finish(source, "the given PIL image", max_pixels, alpha_background)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        image = image_from_array(source, input_data_format)
        return _finish(image, "the given array", max_pixels, alpha_background)
    data, name = _read(source, max_bytes, timeout, allow_private_urls)
    return _decode(io.BytesIO(data), name, max_pixels, alpha_background)


def image_from_array(array: np.ndarray | torch.Tensor, input_data_format: str | None = None) -> Image.Image:
    """Makes a PIL image of an array of any of the shapes and value types `load_image` takes."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    shape = tuple(array.shape)
    if 0 in shape or array.ndim not in (2, 3):
        raise ValueError(f"the given array has shape {shape}; an image is (H, W), (H, W, C) or (C, H, W), none zero")
    if array.ndim == 3:
        if input_data_format is None:
            input_data_format = "channels_last" if shape[-1] in (1, 2, 3, 4) else "channels_first"
        array = array if input_data_format == "channels_last" else np.moveaxis(array, 0, -1)
        if array.shape[-1] not in (1, 2, 3, 4):
            raise ValueError(f"the given array has shape {shape}; no axis of it holds 1, 2, 3 or 4 channels")
        array = array[..., 0] if array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_to_eight_bits(array, "the given array")))


def _to_eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) * 255 + SIXTEEN_BIT_MAX // 2) // SIXTEEN_BIT_MAX).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} has values of type {array.dtype}; pass uint8, uint16, bool, or floats in 0..1")
    lowest, highest = array.min(), array.max()
    if not (lowest >= 0 and highest <= 255):
        raise ValueError(
            f"{name} has {array.dtype} values from {lowest} to {highest}; pass uint8, uint16, or floats in 0..1 "
            "(pixels that are already normalised cannot be processed again)"
        )
    if array.dtype.kind == "f" and highest <= 1:
        array = array * 255
    return np.rint(array).astype(np.uint8)


def _read(source: Any, max_bytes: int, timeout: float, allow_private_urls: bool) -> tuple[bytes, str]:
    """The encoded file and how to call it in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _limit(bytes(source), "the given bytes", max_bytes)
    if hasattr(source, "read"):
        return _limit(source.read(max_bytes + 1), f"file {getattr(source, 'name', 'object')!r}", max_bytes)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"cannot read an image from {type(source).__name__}; pass a PIL image, a numpy or torch array, a path, "
            "a URL, a data URL, or the bytes of an image file"
        )
    text = os.fspath(source)
    scheme = urlparse(text[:16]).scheme.lower() if isinstance(source, str) else ""
    if scheme in ("http", "https"):
        name = f"image {text!r}"
        return _limit(download(text, max_bytes, timeout, allow_private_urls), name, max_bytes)
    if scheme == "data":
        return _limit(_decode_data_url(text, max_bytes), "the given data URL", max_bytes)
    if scheme == "file":
        text = url2pathname(urlparse(text).path)
    elif "://" in text[:16]:
        raise ValueError(f"image {text!r}: URLs of scheme {scheme!r} are not supported; use http, https, file or data")
    return _read_file(Path(text), max_bytes)


def _read_file(path: Path, max_bytes: int) -> tuple[bytes, str]:
    name = f"image {_shorten(str(path))!r}"
    try:
        if not path.exists():
            raise FileNotFoundError(f"{name}: there is no such file")
        if not path.is_file():
            raise ValueError(f"{name} is not a file")
        with path.open("rb") as file:
            return _limit(file.read(max_bytes + 1), name, max_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error


def _shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _limit(data: bytes, name: str, max_bytes: int) -> tuple[bytes, str]:
    if len(data) > max_bytes:
        raise ValueError(f"{name} is larger than the limit of {max_bytes:,} bytes (max_bytes)")
    if not data:
        raise ValueError(f"{name} is empty (zero bytes)")
    return data, name


def _decode_data_url(text: str, max_bytes: int) -> bytes:
    header, comma, payload = text.partition(",")
    if not comma:
        raise ValueError("the given data URL has no comma before its data")
    if len(payload) > max_bytes * 4:  # base64 needs 4/3, per cent encoding at most 3 characters a byte
        raise ValueError(f"the given data URL is larger than the limit of {max_bytes:,} bytes (max_bytes)")
    data = unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the given data URL is not valid base64: {error}") from error


def _decode(file: IO[bytes], name: str, max_pixels: int, alpha_background: Sequence[int] | None) -> Image.Image:
    Image.init()
    formats = [identifier for identifier in Image.ID if identifier not in REFUSED_FORMATS]
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image Pillow can read, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large, make it smaller first: {error}") from error
    except DECODE_ERRORS as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    with image:
        if (frames := _num_frames(image)) > 1:
            warnings.warn(f"{name} has {frames} frames; only the first is used", stacklevel=3)
        return _finish(image, name, max_pixels, alpha_background)


def _num_frames(image: Image.Image) -> int:
    if image.format == "MPO":  # a photograph with previews
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except DECODE_ERRORS:  # a later frame is damaged
        image.seek(0)
        return 1


def _finish(image: Image.Image, name: str, max_pixels: int, alpha_background: Sequence[int] | None) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width:,} x {height:,} = {width * height:,} pixels, more than the limit of {max_pixels:,} "
            "(max_pixels); make it smaller first"
        )
    if width == 0 or height == 0:
        raise ValueError(f"{name} has no pixels ({width} x {height})")
    try:
        image.load()
        upright = _upright(image)
    except DECODE_ERRORS as error:
        raise ValueError(f"{name} is truncated or damaged: {error}") from error
    return _to_rgb(upright, name, alpha_background)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION_TAG, 1)
    except DECODE_ERRORS:  # pixels are fine even where the EXIF block is not
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _to_rgb(image: Image.Image, name: str, alpha_background: Sequence[int] | None) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_to_eight_bits(np.asarray(image), name))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_deep_grey_to_eight_bits(np.asarray(image), name))
    elif image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as a direct conversion, which warns
    if alpha_background is not None and image.mode in ("RGBA", "LA", "PA"):
        canvas = Image.new("RGBA", image.size, tuple(alpha_background))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has colour mode {image.mode}, which cannot be turned into RGB: {error}") from error


def _deep_grey_to_eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    """Modes I and F carry no range: 0..1 (F only), 0..255 and 0..65535 are told apart by the largest value."""
    lowest, highest = array.min(), array.max()
    if not np.isfinite(lowest) or not np.isfinite(highest):
        raise ValueError(f"{name} holds values that are not finite")
    if lowest >= 0 and highest <= 255:
        return _to_eight_bits(array, name)
    if lowest >= 0 and highest <= SIXTEEN_BIT_MAX:
        return _to_eight_bits(np.rint(array).astype(np.uint16), name)
    warnings.warn(f"{name} has grey values from {lowest} to {highest}; they are stretched to 0..255", stacklevel=2)
    return np.rint((array.astype(np.float64) - lowest) * (255 / (float(highest) - float(lowest)))).astype(np.uint8)

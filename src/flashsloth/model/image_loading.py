"""Turns whatever a user calls an image (path, URL, bytes, array, tensor, PIL image) into an upright 8-bit RGB image.

Reads the source within its limits; `image_decoding` makes pixels of it.
"""

import base64
import os
import stat
import sys
from collections.abc import Sequence
from typing import IO, Any
from urllib.parse import unquote_to_bytes, urlparse
from urllib.request import url2pathname

import numpy as np
from PIL import Image

from .image_decoding import check_size, decode_image, describe, shorten
from .image_download import download
from .pixel_values import to_eight_bits

DEFAULT_MAX_PIXELS = 100_000_000
DEFAULT_MAX_BYTES = 256 * 1024 * 1024
DEFAULT_TIMEOUT_SECONDS = 20.0
READ_BYTES = 1 << 20


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
            in 0..1 (or 0..255; see `to_eight_bits`); local path (`str`, `Path`, `file://`); `http(s)://` URL; `data:`
            URL; `bytes`; or an open binary file, which is read from its start and left where it stood.
        max_pixels: larger images are refused from their header, before decoding. So are sides of more than a million
            pixels, and files whose decoding takes far more work than their pixels tell.
        max_bytes: limit of the encoded file, whatever it comes from.
        timeout: seconds to wait for a URL's server, in all.
        allow_private_urls: also fetch from loopback, private and link-local addresses.
        alpha_background: colour (red, green, blue in 0..255) under transparent pixels. `None` drops the alpha channel
            and keeps the colours stored beneath it, which is what the published models were trained with.
        input_data_format: "channels_first" or "channels_last" for arrays whose shape leaves it open.

    Animated files give their first frame (with a warning); a PIL image gives the frame it stands at. Grey images of
    16 and 32 bits are scaled to 8 bits. Values that had to be clipped or stretched, and pictures that their type makes
    nearly black, give a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything else that is wrong with the image; names it and the cause.
    """
    if alpha_background is not None and (
        len(alpha_background) != 3 or not all(value in range(256) for value in alpha_background)
    ):
        raise ValueError(f"alpha_background must be None or three values in 0..255, got {alpha_background!r}")
    if isinstance(source, Image.Image):
        return decode_image(source, "the given PIL image", max_pixels, alpha_background)
    if isinstance(source, np.ndarray) or _is_tensor(source):
        image = _image_from_array(source, input_data_format, max_pixels)
        return decode_image(image, "the given array", max_pixels, alpha_background)
    data, name = _read(source, max_bytes, timeout, allow_private_urls)
    return decode_image(data, name, max_pixels, alpha_background)


def _is_tensor(source: Any) -> bool:
    """Whether it is a tensor of torch, which is not imported for that: who has a tensor has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _image_from_array(array: Any, input_data_format: str | None, max_pixels: int) -> Image.Image:
    if _is_tensor(array):
        try:
            array = array.detach().cpu()
            array = (array.float() if array.is_floating_point() else array).numpy()
        except (RuntimeError, TypeError) as error:  # sparse, quantized, without storage, ...
            raise ValueError(f"the given tensor cannot be read: {describe(error)}") from error
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
    check_size((array.shape[1], array.shape[0]), "the given array", max_pixels)
    if array.ndim == 3 and array.shape[-1] in (2, 4) and array.dtype != np.uint8:  # alpha may be of another range
        alpha = to_eight_bits(array[..., -1:], "the alpha channel of the given array")
        levels = np.concatenate([to_eight_bits(array[..., :-1], "the given array"), alpha], axis=-1)
    else:
        levels = to_eight_bits(array, "the given array")
    return Image.fromarray(np.ascontiguousarray(levels))


def _read(source: Any, max_bytes: int, timeout: float, allow_private_urls: bool) -> tuple[bytes, str]:
    """The encoded file and how to call it in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _limit(bytes(source), "the given bytes", max_bytes)
    if hasattr(source, "read"):
        return _read_stream(source, max_bytes)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"cannot read an image from {type(source).__name__}; pass a PIL image, a numpy or torch array, a path, "
            "a URL, a data URL, or the bytes of an image file"
        )
    text = os.fsdecode(source)
    # A path object is never a URL. Whole URLs are not parsed here: a data URL may be long.
    scheme, separator, rest = text[:16].lstrip().partition(":") if isinstance(source, str) else ("", "", "")
    scheme = scheme.lower()
    if scheme == "data" and separator:
        return _limit(_decode_data_url(text, max_bytes), "the given data URL", max_bytes)
    name = f"image {shorten(text)!r}"
    if scheme in ("http", "https") and separator:
        return _limit(download(text, max_bytes, timeout, allow_private_urls), name, max_bytes)
    if scheme == "file" and separator:
        text = _path_of_url(text, name)
    elif rest.startswith("//"):
        raise ValueError(f"{name}: URLs of scheme {scheme!r} are not supported; use http, https, file or data")
    return _read_file(text, name, max_bytes)


def _path_of_url(url: str, name: str) -> str:
    try:
        parts = urlparse(url)
        # A path's bytes need not be UTF-8.
        path = url2pathname(parts.path) if os.name == "nt" else os.fsdecode(unquote_to_bytes(os.fsencode(parts.path)))
    except ValueError as error:
        raise ValueError(f"{name} is not a valid URL: {describe(error)}") from error
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError(f"{name} names a file on another machine, {shorten(parts.netloc)!r}; use file:///path")
    return path


def _read_file(path: str, name: str, max_bytes: int) -> tuple[bytes, str]:
    try:
        # Asked before opening: a pipe or a device may never answer.
        is_file = stat.S_ISREG(os.stat(path).st_mode)
        data = b""
        if is_file:
            with open(path, "rb") as file:
                data = _read_at_most(file, max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{name}: there is no such file") from error
    except (OSError, MemoryError, ValueError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"{name} cannot be read: {getattr(error, 'strerror', None) or describe(error)}") from error
    if not is_file:
        raise ValueError(f"{name} is not a file (but a folder, a device or a pipe)")
    return _limit(data, name, max_bytes)


def _read_stream(stream: Any, max_bytes: int) -> tuple[bytes, str]:
    """Reads an open file from its start, as Pillow does, and leaves it where it stood."""
    name = f"file {shorten(str(getattr(stream, 'name', 'object')))!r}"
    try:
        position = stream.tell()
        stream.seek(0)
    except Exception:  # a pipe, a response of a server, an object with `read` alone
        position = None
    try:
        data = _read_at_most(stream, max_bytes + 1)
        if position is not None:
            stream.seek(position)
    except Exception as error:  # whatever the user's object raises
        raise ValueError(f"{name} cannot be read: {describe(error)}") from error
    if not data and position is None:
        raise ValueError(f"{name} is at its end and cannot be read again; pass the bytes read from it instead")
    return _limit(data, name, max_bytes)


def _read_at_most(stream: IO[bytes], num_bytes: int) -> bytes:
    data = bytearray()
    while chunk := stream.read(min(READ_BYTES, num_bytes - len(data))):
        if not isinstance(chunk, (bytes, bytearray)):
            raise TypeError(f"it gives {type(chunk).__name__} instead of bytes; open it in binary mode")
        data += chunk
    return bytes(data)


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
    is_base64 = header.rstrip().lower().endswith(";base64")
    try:
        data = unquote_to_bytes(payload)
        return base64.b64decode(b"".join(data.split()), validate=True) if is_base64 else data
    except ValueError as error:  # binascii's, and text that has no bytes
        encoding = "base64" if is_base64 else "per cent encoding"
        raise ValueError(f"the given data URL is not valid {encoding}: {describe(error)}") from error

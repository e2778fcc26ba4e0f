"""From an encoded file or a PIL image to upright 8-bit RGB, within limits that a small file cannot get around.

Pillow's decoders raise whatever they please on a damaged file: `run_decoder` alone decides what that means.
"""

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from PIL import IcnsImagePlugin, IcoImagePlugin, Image, UnidentifiedImageError

from .pixel_values import deep_grey_to_eight_bits, to_eight_bits

# Decoders of these start another program, need one, or open whatever lies inside with every decoder there is.
REFUSED_FORMATS = frozenset({"EPS", "WMF", "EMF", "FPX", "MIC", "GRIB", "HDF5", "BUFR", "MPEG", "IPTC"})
# In these the first frame is the picture, and the others are previews or layers of it.
ONE_PICTURE_FORMATS = frozenset({"MPO", "PSD"})
INNER_FORMATS = ("PNG", "JPEG2000", "DIB")
MAX_SIDE = 1_000_000
# Scans of a progressive JPEG, each of which passes over all pixels: as much work as this many times `max_pixels`.
MAX_SCANS = 32
# Decoders written in Python take about a second for this many pixels, or for the pixels a file of honest size holds.
SLOW_PIXELS = 1 << 22
SLOW_PIXELS_PER_BYTE = 64

# Modes of grey, where PNG can make one value transparent.
KEYED_MODES = ("1", "L", "I", "I;16")

EXIF_ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_TILE_TAGS = (322, 323)
JPEG_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
JPEG_START_OF_SCAN, JPEG_END = 0xDA, 0xD9

T = TypeVar("T")
_pillow_switches = threading.Lock()


class ImageError(ValueError):
    """An image that is refused for a reason found here: the message says all."""


def decode_image(
    source: bytes | Image.Image, name: str, max_pixels: int, alpha_background: Sequence[int] | None
) -> Image.Image:
    """Decodes an encoded file, or takes a PIL image at the frame where it stands, to 8-bit RGB that is upright.

    Args:
        name: how to call it in messages.
        max_pixels, alpha_background: see `load_image`.

    Raises:
        ValueError: names the image and what is wrong with it.
    """

    def decode() -> tuple[Image.Image, int | tuple[int, ...] | None, list[str]]:
        notes = []
        if isinstance(source, Image.Image):
            image = source
        else:
            image = _open(source, name, max_pixels)
            try:
                several = image.format not in ONE_PICTURE_FORMATS and getattr(image, "is_animated", False)
            except Warning:
                raise
            except Exception:  # a later frame is damaged, and the decoder stands in the middle of it
                several, image = False, _open(source, name, max_pixels)
            if several:
                notes.append("has several frames; only the first is used")
            _check_work(image, source, name, max_pixels)
        check_size(image.size, name, max_pixels)
        key = _transparent_value(image)
        image.load()
        check_size(image.size, name, max_pixels)
        try:
            turn = TURNS.get(image.getexif().get(EXIF_ORIENTATION_TAG))
        except Warning:
            raise
        except Exception:  # pixels are fine even where the EXIF block is not
            turn = None
            notes.append("has an EXIF block that cannot be read; it is taken to be upright")
        return image if turn is None else image.transpose(turn), key, notes

    image, key, notes = run_decoder(decode, name, max_pixels)
    for note in notes:
        warnings.warn(f"{name} {note}", stacklevel=3)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _grey_of_eight_bits(image, name, key if alpha_background is not None else None)
        key = None
    return run_decoder(lambda: _to_rgb(image, name, key, alpha_background), name, max_pixels)


def run_decoder(step: Callable[[], T], name: str, max_pixels: int) -> T:
    """Runs a step of Pillow's on a user's image; whatever it raises means that the image is bad.

    Warnings of a decoder stay warnings, also where warnings are made errors, and `max_pixels` decides where Pillow has
    a lower limit of its own: the step is then run again.
    """
    try:
        try:
            return step()
        except (Warning, Image.DecompressionBombError):
            with _lenient_pillow(max_pixels):
                return step()
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image Pillow can read, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is larger than the limit of {max_pixels:,} pixels (max_pixels)") from error
    except MemoryError as error:
        raise ValueError(f"{name} needs more memory than there is; make it smaller first") from error
    except Exception as error:
        raise ValueError(f"{name} is truncated or damaged: {describe(error)}") from error


@contextmanager
def _lenient_pillow(max_pixels: int) -> Iterator[None]:
    """Both are switches of the whole process. They are turned for a moment and only where a step failed otherwise;
    other users of Pillow meanwhile see a limit that is never lower than their own.
    """
    with _pillow_switches, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own_limit = Image.MAX_IMAGE_PIXELS
        if own_limit is not None:  # Pillow refuses above twice its limit
            Image.MAX_IMAGE_PIXELS = max(own_limit, (max_pixels + 1) // 2)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = own_limit


def describe(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    return shorten(" ".join(str(error).split())) or type(error).__name__


def shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raises ValueError for an image (width, height) that is empty or beyond the limits."""
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width:,} x {height:,} = {width * height:,} pixels, more than the limit of {max_pixels:,} "
            "(max_pixels); make it smaller first"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name} has {width:,} x {height:,} pixels; no side may be longer than {MAX_SIDE:,}")
    if width == 0 or height == 0:
        raise ImageError(f"{name} has no pixels ({width} x {height})")


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    Image.init()
    # Pillow decodes the picture inside an icon whatever its size.
    for start in _starts_inside_icon(data):
        try:
            inner = Image.open(io.BytesIO(data[start:]), formats=INNER_FORMATS)
        except UnidentifiedImageError:  # bare pixels of at most 256 x 256
            continue
        width, height = inner.size
        check_size((width, height // 2 if inner.format == "DIB" else height), name, max_pixels)
    formats = [identifier for identifier in Image.ID if identifier not in REFUSED_FORMATS]
    image = Image.open(io.BytesIO(data), formats=formats)
    if not isinstance(image.info.get("xmp", b""), (bytes, str)):  # Pillow looks for an orientation in it
        del image.info["xmp"]
    return image


def _starts_inside_icon(data: bytes) -> list[int]:
    """Where the pictures lie that Pillow would take from an icon."""
    if data.startswith(b"\0\0\1\0"):
        return [IcoImagePlugin.IcoFile(io.BytesIO(data)).entry[0].offset]
    if data.startswith(b"icns"):
        icon = IcnsImagePlugin.IcnsFile(io.BytesIO(data))
        codes = [code for code, _ in icon.SIZES[icon.bestsize()]]
        return [icon.dct[code][0] for code in codes if code in icon.dct]
    return []


def _check_work(image: Image.Image, data: bytes, name: str, max_pixels: int) -> None:
    """Refuses a file whose decoding takes far more than its pixels tell."""
    num_pixels = image.width * image.height
    if image.format == "TIFF":  # tiles are decoded whole, however little of them shows
        width, height = (int(image.tag_v2.get(tag, 1)) for tag in TIFF_TILE_TAGS)
        check_size((width, height), name, max_pixels)
    if image.format in ("JPEG", "MPO") and (scans := _num_scans(data)) * num_pixels > MAX_SCANS * max_pixels:
        raise ImageError(f"{name} has {scans:,} scans of {num_pixels:,} pixels, too many to decode; save it again")
    in_python = any(tile[0] in Image.DECODERS for tile in image.tile)
    if in_python and num_pixels > max(SLOW_PIXELS, SLOW_PIXELS_PER_BYTE * len(data)):
        raise ImageError(f"{name} claims {num_pixels:,} pixels in a file of {len(data):,} bytes; save it as PNG")


def _num_scans(data: bytes) -> int:
    """Scans of the first picture in a JPEG file."""
    scans, place = 0, 2
    while (segment := JPEG_SEGMENT.search(data, place)) is not None and segment[1][0] != JPEG_END:
        scans += segment[1][0] == JPEG_START_OF_SCAN
        place = segment.end() + int.from_bytes(data[segment.end() : segment.end() + 2], "big")
    return scans


def _transparent_value(image: Image.Image) -> int | tuple[int, ...] | None:
    """The one value or colour that is transparent in an image without alpha, in the scale of its pixels.

    PNG states it in the depth of the file, and Pillow leaves it so where it turns 2, 4 or 16 bits into 8.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    raw_mode = tiles[0][3] if tiles and image.format == "PNG" else ""
    if isinstance(key, int) and image.mode in KEYED_MODES:
        return key * {"L;2": 85, "L;4": 17}.get(raw_mode, 1)
    if isinstance(key, tuple) and image.mode == "RGB" and [type(value) for value in key] == [int] * 3:
        return tuple(value >> 8 for value in key) if raw_mode == "RGB;16B" or max(key) > 255 else key
    return None


def _grey_of_eight_bits(image: Image.Image, name: str, key: int | tuple[int, ...] | None) -> Image.Image:
    values_HW = np.asarray(image)
    convert = deep_grey_to_eight_bits if image.mode in ("I", "F") else to_eight_bits
    grey = Image.fromarray(convert(values_HW, name))
    if key is not None:
        grey.putalpha(_alpha(values_HW, key))
    return grey


def _alpha(values: np.ndarray, key: int | tuple[int, ...]) -> Image.Image:
    shows = values != np.asarray(key)
    return Image.fromarray((shows.any(-1) if shows.ndim == 3 else shows).astype(np.uint8) * 255)


def _to_rgb(
    image: Image.Image, name: str, key: int | tuple[int, ...] | None, background: Sequence[int] | None
) -> Image.Image:
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    elif image.mode == "P" and (background is not None or "transparency" in image.info):
        image = image.convert("RGBA")  # the same colours as a direct conversion, which warns of transparency
    elif image.mode in ("1", "L", "RGB") and "transparency" in image.info:
        values = np.asarray(image)
        image = image.convert("L") if image.mode == "1" else image.copy()
        del image.info["transparency"]  # a conversion looks for its colour, and may fail to find it
        if background is not None and key is not None:
            image.putalpha(_alpha(values, key))
    if background is not None and image.mode in ("RGBA", "LA", "PA"):
        canvas = Image.new("RGBA", image.size, tuple(map(int, background)))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"{name} has colour mode {image.mode}, which cannot be turned into RGB: {describe(error)}"
        ) from error

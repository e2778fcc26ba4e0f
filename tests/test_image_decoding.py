"""Decoders that fail, files that are small and cost much, orientation and transparency."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageOps, PngImagePlugin

from flashsloth.model import image_decoding
from flashsloth.model.image_loading import load_image

LEVELS = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
PICTURE = Image.fromarray(LEVELS)
WHITE = (255, 255, 255)
Image.init()


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, bits, color_type, rows, *chunks):
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    body = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def black_png(side):
    return png(side, side, 1, 0, bytes(1 + -(-side // 8)) * side)


def icon(data):
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(data), 22) + data


def apple_icon(data):
    return b"icns" + struct.pack(">I", 16 + len(data)) + b"ic10" + struct.pack(">I", 8 + len(data)) + data


# Decoders that fail


@pytest.mark.parametrize(
    "kind",
    [
        AssertionError,
        AttributeError,
        Image.DecompressionBombError,
        MemoryError,
        NotImplementedError,
        RecursionError,
        RuntimeError,
        SystemError,
        ZeroDivisionError,
        type("NewError", (Exception,), {}),
    ],
)
@pytest.mark.parametrize("step", ["_open", "load"])
def test_whatever_a_decoder_raises_is_a_bad_image(kind, step, monkeypatch, tmp_path):
    def fail(self):
        raise kind("because\n" * 10_000)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, step, fail)
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(PICTURE))
    with pytest.raises(ValueError, match="picture.png") as caught:
        load_image(path)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_stops_the_program_passes(kind, monkeypatch):
    def stop(self):
        raise kind

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", stop)
    with pytest.raises(kind):
        load_image(encoded(PICTURE))


@pytest.mark.filterwarnings("error")
def test_a_warning_of_a_decoder_is_no_failure():
    data = icon(encoded(PICTURE))  # whose picture has another size than the icon says
    with pytest.warns(UserWarning, match="expected size"):
        Image.open(io.BytesIO(data))
    filters = list(warnings.filters)
    np.testing.assert_array_equal(np.asarray(load_image(data)), LEVELS)
    assert warnings.filters == filters


def test_a_later_frame_that_is_damaged_does_not_spoil_the_first(monkeypatch):
    def fail(self):
        self._seek(1, False)
        raise RuntimeError

    frames = [Image.new("L", (4, 4), level) for level in (50, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "is_animated", property(fail))
    assert load_image(data).getpixel((0, 0)) == (50, 50, 50)


SMALL = PICTURE.resize((8, 8))
SAVED = {
    "AVIF": {},
    "BLP": {},
    "BMP": {},
    "DDS": {},
    "GIF": {},
    "ICNS": {},
    "ICO": {},
    "JPEG": {"progressive": True},
    "JPEG2000": {},
    "MPO": {"save_all": True, "append_images": [SMALL]},
    "PCX": {},
    "PNG": {"save_all": True, "append_images": [SMALL.convert("P")]},
    "PPM": {},
    "QOI": {},
    "SGI": {},
    "SPIDER": {},
    "TGA": {"compression": "tga_rle"},
    "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {"save_all": True, "append_images": [SMALL]},
}
MODES = {"BLP": "P", "DDS": "RGBA", "GIF": "P", "SPIDER": "F"}
SEEDS = {
    format: encoded(SMALL.convert(MODES.get(format, "RGB")), format, **options)
    for format, options in SAVED.items()
    if format in Image.SAVE
}
PATCHES = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    format=st.sampled_from(sorted(SEEDS)),
    patches=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), PATCHES, st.booleans()), min_size=1, max_size=5),
    keep=st.one_of(st.just(1.0), st.floats(0.1, 1)),
    background=st.sampled_from([None, WHITE]),
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_gives_an_image_or_a_value_error(format, patches, keep, background):
    data = bytearray(SEEDS[format])
    for place, patch, near_the_start in patches:
        start = int(place * (min(64, len(data)) if near_the_start else len(data)))
        data[start : start + len(patch)] = patch
    try:
        image = load_image(bytes(data[: int(len(data) * keep) + 1]), max_pixels=10**6, alpha_background=background)
    except ValueError as error:
        assert str(error).startswith("the given bytes ") and len(str(error)) < 500
    else:
        assert image.mode == "RGB" and min(image.size) > 0
        image.tobytes()


# Files that are small and cost much


@pytest.mark.parametrize("format", ["TIFF", "GIF"])
def test_pages_are_not_counted(format, monkeypatch):
    data = encoded(PICTURE.convert("L"), format, save_all=True, append_images=[PICTURE.convert("L").rotate(180)] * 3)
    module = Image.open(io.BytesIO(data)).__class__
    visited = []
    seek = module._seek

    def counted(self, frame, *args):
        visited.append(frame)
        return seek(self, frame, *args)

    monkeypatch.setattr(module, "_seek", counted)
    with pytest.warns(UserWarning, match="several frames"):
        load_image(data)
    assert max(visited) <= 1


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
@pytest.mark.parametrize("wrap", [icon, apple_icon], ids=["ico", "icns"])
def test_a_picture_inside_an_icon_is_held_to_the_limit_before_it_is_decoded(wrap, monkeypatch):
    assert load_image(wrap(black_png(1024)), max_pixels=1024**2).size == (1024, 1024)

    def load(self):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ValueError, match="2,000 x 2,000 .*max_pixels"):
        load_image(wrap(black_png(2000)), max_pixels=1024**2)


def test_an_icon_of_bare_pixels_counts_once():
    data = encoded(Image.new("RGBA", (32, 32)), "ICO", bitmap_format="bmp")
    assert load_image(data, max_pixels=32 * 32).size == (32, 32)
    with pytest.raises(ValueError, match="max_pixels"):
        load_image(data, max_pixels=32 * 32 - 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "data",
    [black_png(64), icon(black_png(64)), encoded(Image.new("RGB", (64, 64)), "WEBP")],
    ids=["png", "ico", "webp"],
)
@pytest.mark.parametrize("own_limit", [10, 64 * 64 - 1])
def test_max_pixels_decides_above_pillows_own_limit(data, own_limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", own_limit)
    assert load_image(data, max_pixels=64 * 64).size == (64, 64)
    with pytest.raises(ValueError, match="max_pixels"):
        load_image(data, max_pixels=64 * 64 - 1)
    assert own_limit == Image.MAX_IMAGE_PIXELS


def dib(width, height, compression, body):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + header + bytes(1024) + body


def tiled_tiff(tile):
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def jpeg_of_many_scans(side, scans):
    data = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (png(1, 1_000_001, 1, 0, b""), "no side may be longer"),
        (png(99_999_999, 1, 1, 0, b""), "no side may be longer"),
        (jpeg_of_many_scans(64, 400), "scans"),
        (dib(4000, 4000, 1, b"\1\1\0\0" * 4000), "claims 16,000,000 pixels"),
        (tiled_tiff(1 << 20), "pixels"),
        (png(1, 1, 8, 0, b"\0\0", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**7)))), "damaged"),
        (png(1, 1, 8, 0, b"\0\0", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))), "damaged"),
    ],
    ids=["tall", "wide", "scans", "runs", "tile", "profile", "text"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_that_costs_much_is_refused(data, cause, monkeypatch):
    if cause == "scans":
        monkeypatch.setattr(image_decoding, "MAX_SCANS", 2)
    with pytest.raises(ValueError, match=cause):
        load_image(data, **({"max_pixels": 64 * 64 * 100} if cause == "scans" else {}))


def test_an_honest_file_of_the_same_kind_is_read():
    assert load_image(jpeg_of_many_scans(64, 20)).size == (64, 64)
    runs = dib(20, 4, 1, b"\x14\1\0\0" * 4)
    assert isinstance(Image.open(io.BytesIO(runs)), BmpImagePlugin.BmpImageFile)
    assert load_image(runs).size == (20, 4)
    assert image_decoding._num_scans(encoded(PICTURE, "JPEG", progressive=True) + b"\xff\xda" * 9) == 10


def test_a_file_within_a_file_of_any_format_is_refused():
    def record(number, data, kind=3):
        return bytes([0x1C, kind, number]) + struct.pack(">H", len(data)) + data

    picture = encoded(PICTURE, "PPM")
    fields = {60: b"\1\0", 20: b"\0\x0c", 30: b"\0\x10", 120: b"\0\5"}
    data = b"".join(record(number, value) for number, value in fields.items()) + record(10, picture, kind=8)
    assert Image.open(io.BytesIO(data)).format == "IPTC"
    with pytest.raises(ValueError, match="not an image"):
        load_image(data)


# Orientation


def exif_block(*entries):
    """An EXIF block of (tag, type, count, data), big-endian."""
    body, blob, start = struct.pack(">H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, data in entries:
        value = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(">L", start + len(blob))
        blob += data if len(data) > 4 else b""
        body += struct.pack(">HHL", tag, kind, count) + value
    return b"MM\0*\0\0\0\x08" + body + bytes(4) + blob


def turned(value, kind=3, count=1):
    return (0x112, kind, count, value)


SIDEWAYS = turned(b"\0\6")
ODD_ENTRIES = {
    "rational 0/0": (282, 5, 1, struct.pack(">LL", 0, 0)),
    "signed rational": (283, 10, 1, struct.pack(">ll", -1, 0)),
    "negative": (296, 9, 1, struct.pack(">l", -5)),
    "text for a number": (282, 2, 6, b"hello\0"),
    "nan": (282, 12, 1, struct.pack(">d", float("nan"))),
    "offset beyond the end": (0x8769, 4, 1, b"\xff\xff\xff\xf0"),
    "offset as text": (0x8825, 2, 6, b"hello\0"),
    "number for XMP": (700, 4, 1, b"\0\0\0\1"),
    "unknown type": (0x9999, 77, 3, b"abc"),
}


def tiff_of(*entries):
    width, height = PICTURE.size
    own = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 1000, 277: 1, 278: height, 279: width * height}
    own = [(tag, 4, 1, struct.pack(">L", value)) for tag, value in own.items()]
    return exif_block(*sorted(own + list(entries))).ljust(1000, b"\0") + PICTURE.convert("L").tobytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("entry", ODD_ENTRIES)
def test_an_odd_entry_does_not_spoil_the_picture_or_its_orientation(entry, format):
    entries = sorted([SIDEWAYS, ODD_ENTRIES[entry]])
    data = tiff_of(*entries) if format == "TIFF" else encoded(PICTURE, format, exif=b"Exif\0\0" + exif_block(*entries))
    assert load_image(data).size == PICTURE.size[::-1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_equals_pillows(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(PICTURE, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(expected))
    given = Image.open(io.BytesIO(data))
    load_image(given)
    assert given.size == PICTURE.size and given.getexif()[0x112] == orientation  # left as it was


def test_orientation_in_xmp():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    assert load_image(encoded(PICTURE, pnginfo=info)).size == PICTURE.size[::-1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
@pytest.mark.parametrize(
    "entry",
    [
        turned(b"6\0", kind=2, count=2),
        turned(struct.pack(">d", float("nan")), kind=12),
        turned(struct.pack(">LL", 6, 0), kind=5),
        turned(b"\6\6\6\6", kind=7, count=4),
        turned(b"\xff\xff"),
        turned(b"", count=0),
    ],
)
def test_an_orientation_that_is_none_leaves_the_picture(entry, format):
    data = tiff_of(entry) if format == "TIFF" else encoded(PICTURE, format, exif=b"Exif\0\0" + exif_block(entry))
    assert load_image(data).size == PICTURE.size


def test_an_exif_block_that_cannot_be_read_is_said():
    profile = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nno hex\n"))
    with pytest.warns(UserWarning, match="EXIF block that cannot be read"):
        assert load_image(png(2, 1, 8, 0, b"\0\1\2", profile)).size == (2, 1)


# Transparency


def key(*values):
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


RED = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
# Pictures of transparent pixels alone.
TRANSPARENT = {
    "1": encoded(Image.new("1", (2, 2)), transparency=0),
    "L": encoded(Image.new("L", (2, 2), 9), transparency=9),
    "2 bits": png(4, 1, 2, 0, b"\0\x55", key(1)),
    "4 bits": png(2, 1, 4, 0, b"\0\x77", key(7)),
    "16 bits": png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 33000, 33000), key(33000)),
    "RGB": encoded(Image.new("RGB", (2, 2), (200, 0, 0)), transparency=(200, 0, 0)),
    "RGB of 16 bits": png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 260, 40000, 7), key(260, 40000, 7)),
    "P": encoded(Image.new("P", (2, 2)), transparency=0),
    "P of bytes": encoded(Image.new("P", (2, 2)), transparency=b"\0"),
    "GIF": encoded(Image.new("P", (2, 2)), "GIF", transparency=0),
    "palette of RGBA": RED.quantize(4),
    "LA": RED.convert("LA"),
    "La": RED.convert("LA").convert("La"),
    "RGBa": RED.convert("RGBa"),
    "PA": Image.merge("PA", (Image.new("P", (2, 2)), Image.new("L", (2, 2)))),
    "WEBP": encoded(RED, "WEBP", lossless=True),
    "ICO": encoded(Image.new("RGBA", (16, 16)), "ICO"),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_a_background_shows_through_transparency_of_every_kind(kind):
    data = TRANSPARENT[kind]
    pictures = [data]
    if isinstance(data, bytes):
        pictures.append(Image.open(io.BytesIO(data)))
        assert pictures[1].has_transparency_data
    for picture in pictures:
        assert np.asarray(load_image(picture, alpha_background=WHITE)).min() == 255
        assert np.asarray(load_image(picture)).min(axis=-1).max() < 255


def test_only_the_transparent_value_is_covered():
    data = png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 33000, 33001, 0), key(33000))
    assert np.asarray(load_image(data, alpha_background=WHITE))[0, :, 0].tolist() == [255, 128, 0]
    picture = Image.fromarray(LEVELS)
    picture.info["transparency"] = tuple(map(int, LEVELS[3, 4]))
    expected = LEVELS.copy()
    expected[3, 4] = 1, 2, 3
    np.testing.assert_array_equal(np.asarray(load_image(picture, alpha_background=[1, 2, 3])), expected)
    np.testing.assert_array_equal(np.asarray(load_image(picture)), LEVELS)


@pytest.mark.parametrize("value", [(0, 0, 0), b"\0", None, "0", -1, 10**30, (0.5, 1, 2)])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I", "F", "I;16", "CMYK"])
def test_a_transparency_that_is_none_of_the_mode_is_left_out(mode, value):
    picture = Image.new(mode, (2, 2))
    expected = load_image(picture).tobytes()
    picture.info["transparency"] = value
    if not (mode == "RGB" and value == (0, 0, 0)):
        assert load_image(picture, alpha_background=WHITE).tobytes() == expected
    assert load_image(picture).tobytes() == expected


@pytest.mark.parametrize("background", [(1, 2), (1, 2, 300), "red"])
def test_a_background_that_is_no_colour(background):
    with pytest.raises(ValueError, match="alpha_background"):
        load_image(PICTURE, alpha_background=background)

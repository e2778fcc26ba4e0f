"""Pixels equal to the authors', and every kind of image a user may hand over."""

import base64
import hashlib
import io
import json
import os
import struct
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flashsloth.model import image_views
from flashsloth.model.image_loading import load_image
from flashsloth.model.image_processing_flashsloth import FlashSlothImageProcessor

PARITY_DIR = os.environ.get("FLASHSLOTH_PARITY_DIR")
RNG = np.random.default_rng(0)
LEVELS = RNG.integers(0, 256, (9, 14, 3), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PNG = encoded(Image.fromarray(LEVELS))


@pytest.mark.parity
@pytest.mark.skipif(PARITY_DIR is None, reason="FLASHSLOTH_PARITY_DIR is not set")
@pytest.mark.parametrize("name", ["a_640x427", "b_300x500", "c_1024x768"])
@pytest.mark.parametrize(("kind", "view_grid"), [("square", None), ("hd", [2, 2])])
def test_pixels_equal_the_authors(name, kind, view_grid):
    folder = Path(PARITY_DIR) / "official-tiny"
    expected = json.loads((folder / "cases.json").read_text())["pixels_sha256"][f"{kind}.{name}"]
    processor = FlashSlothImageProcessor(view_grid=view_grid)
    pixels = processor(folder / f"{name}.png", return_tensors="np")["pixel_values"]
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, processor.num_views, 3, 384, 384)
    levels = np.round((pixels * 0.5 + 0.5) * 255).astype(np.uint8)
    assert hashlib.sha256(levels.tobytes()).hexdigest() == expected


def padded_by_hand(image, mean):
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    strip_pixels=st.sampled_from([1, 100, 10_000]),
    seed=st.integers(0, 99),
)
def test_views_equal_a_plain_computation(width, height, rows, columns, strip_pixels, seed):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, mean, std, view = Image.fromarray(levels), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), (7, 9)
    vertical_first = height > view[0] and height - view[0] > 2 * (width - view[1])
    between = image.resize((width, view[0]) if vertical_first else (view[1], height), Image.Resampling.BICUBIC)
    expected = [np.asarray(between.resize((view[1], view[0]), Image.Resampling.BICUBIC))]
    square = padded_by_hand(image, mean)
    square = square.resize((view[1] * columns, square.height), Image.Resampling.BICUBIC)
    square = square.resize((view[1] * columns, view[0] * rows), Image.Resampling.BICUBIC)
    for row in range(rows):
        for column in range(columns):
            left, top = column * view[1], row * view[0]
            expected.append(np.asarray(square.crop((left, top, left + view[1], top + view[0]))))
    expected = (np.stack(expected) * (1 / 255)).astype(np.float32).transpose(0, 3, 1, 2)
    expected = (expected - np.float32(mean)[:, None, None]) / np.float32(std)[:, None, None]
    processor = FlashSlothImageProcessor(
        size={"height": view[0], "width": view[1]}, view_grid=[rows, columns], image_mean=mean, image_std=std
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_views, "STRIP_PIXELS", strip_pixels)
        pixels = processor(image)["pixel_values"]
    np.testing.assert_array_equal(pixels[0], expected)


def test_long_image_needs_no_long_square():
    processor = FlashSlothImageProcessor(size={"height": 4, "width": 4}, view_grid=[1, 1])
    pixels = processor(Image.new("RGB", (60_000, 1), (255, 255, 255)))["pixel_values"]
    assert pixels.shape == (1, 2, 3, 4, 4)


@pytest.mark.parametrize("size", [(200, 9), (9, 200), (200, 150), (1, 200)])
def test_an_image_beyond_the_largest_square_gives_about_the_same_tiles(size, monkeypatch):
    column, row = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = Image.fromarray(np.dstack([column % 256, row % 256, (column + row) // 2 % 256]).astype(np.uint8))
    processor = FlashSlothImageProcessor(
        size={"height": 8, "width": 8}, view_grid=[2, 2], do_normalize=False, do_rescale=False
    )
    exact = processor(image)["pixel_values"]
    monkeypatch.setattr(image_views, "MAX_PADDED_SIDE", 64)
    averaged = processor(image)["pixel_values"]
    assert averaged.shape == exact.shape
    np.testing.assert_array_equal(averaged[:, 0], exact[:, 0])
    assert np.abs(averaged - exact).max() < 24
    assert np.abs(averaged - exact).mean() < 2


def test_a_very_long_image_costs_no_square_of_its_length():
    processor = FlashSlothImageProcessor(size={"height": 4, "width": 4}, view_grid=[1, 1])
    for size in ((1, 500_000), (500_000, 1)):
        pixels = processor(Image.new("RGB", size, (255, 255, 255)))["pixel_values"]
        assert pixels[0, 0].min() == 1 and np.isfinite(pixels[0, 1]).all()


@pytest.fixture
def png_path(tmp_path):
    path = tmp_path / "picture of a cat.png"
    path.write_bytes(PNG)
    return path


SOURCES = {
    "pil": lambda path: Image.open(path),
    "channels last": lambda path: LEVELS,
    "channels first": lambda path: LEVELS.transpose(2, 0, 1),
    "float": lambda path: LEVELS / 255,
    "float32 levels": lambda path: LEVELS.astype(np.float32),
    "uint16": lambda path: LEVELS.astype(np.uint16) * 257,
    "int64": lambda path: LEVELS.astype(np.int64),
    "torch": lambda path: torch.from_numpy(LEVELS).permute(2, 0, 1),
    "torch half": lambda path: (torch.from_numpy(LEVELS) / 255).half(),
    "path": lambda path: path,
    "string": str,
    "file url": lambda path: path.as_uri(),
    "bytes": lambda path: PNG,
    "open file": lambda path: io.BytesIO(PNG),
    "data url": lambda path: "data:image/png;base64," + base64.b64encode(PNG).decode(),
    "wrapped data url": lambda path: "data:image/png;base64," + base64.encodebytes(PNG).decode(),
    "per cent data url": lambda path: "data:image/png," + quote(PNG),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_pixels(kind, png_path):
    np.testing.assert_array_equal(np.asarray(load_image(SOURCES[kind](png_path))), LEVELS)


def test_nesting_and_stacks_are_flattened_in_order():
    processor = FlashSlothImageProcessor(size={"height": 9, "width": 14}, do_normalize=False, do_rescale=False)
    images = [LEVELS, 255 - LEVELS, LEVELS[::-1]]
    expected = np.stack(images).transpose(0, 3, 1, 2)[:, None]
    for given_images in (images, [[images[0]], [], images[1:]], np.stack(images), torch.from_numpy(np.stack(images))):
        pixels = processor(given_images, return_tensors="pt")["pixel_values"]
        assert pixels.dtype == torch.float32
        np.testing.assert_array_equal(pixels.numpy(), expected)
    with pytest.raises(ValueError, match="no images"):
        processor([[], []])


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(LEVELS), exif=exif)
    expected = np.rot90(LEVELS, turns)
    np.testing.assert_array_equal(np.asarray(load_image(data)), expected)
    np.testing.assert_array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_spoil_the_image():
    data = encoded(Image.fromarray(LEVELS), exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    np.testing.assert_array_equal(np.asarray(load_image(data)), LEVELS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LA"])
def test_eight_bit_modes_are_converted_as_pillow_does(mode):
    image = Image.fromarray(LEVELS).convert(mode)
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency():
    image = Image.fromarray(LEVELS).quantize(16)
    data = encoded(image, transparency=bytes(range(0, 256, 16)))
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_unless_a_background_is_named():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(load_image(image)).tolist() == [[[10, 20, 30]] * 2]
    on_white = load_image(image, alpha_background=(255, 255, 255))
    assert np.asarray(on_white).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    fetched = FlashSlothImageProcessor(alpha_background=(255, 255, 255)).fetch_images([image])
    np.testing.assert_array_equal(np.asarray(fetched[0]), np.asarray(on_white))
    premultiplied = image.convert("RGBa")
    assert load_image(premultiplied).getpixel((1, 0)) == (10, 20, 30)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 257, 65535]], dtype=np.uint16), [0, 1, 255]),
        (np.array([[0, 300, 65535]], dtype=np.int32), [0, 1, 255]),
        (np.array([[0, 100, 255]], dtype=np.int32), [0, 100, 255]),
        (np.array([[0, 0.5, 1]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], dtype=np.float32), [0, 100, 255]),
    ],
)
def test_deep_grey_is_scaled_not_clipped(array, expected):
    image = Image.fromarray(array)
    assert np.asarray(load_image(image))[0, :, 0].tolist() == expected
    data = encoded(image, "TIFF")
    assert np.asarray(load_image(data))[0, :, 0].tolist() == expected


def test_grey_beyond_sixteen_bits_is_stretched_with_a_warning():
    with pytest.warns(UserWarning, match="stretched"):
        image = load_image(Image.fromarray(np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(format):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **LOSSLESS.get(format, {}))
    with pytest.warns(UserWarning, match="several frames"):
        assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


LOSSLESS = {"WEBP": {"lossless": True}}


def png_header(width, height):
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b"")}
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"this is no image at all", "not an image"),
    "truncated png": (PNG[: len(PNG) // 2], "damaged"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "cut in the header": (PNG[:20], "damaged"),
    "corrupt": (PNG[:60] + bytes(40) + PNG[100:], "damaged"),
    "20,000 x 20,000": (png_header(20_000, 20_000), "pixels"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named_with_their_cause(kind, tmp_path):
    data, cause = BAD_FILES[kind]
    path = tmp_path / "bad picture"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=cause) as caught:
        load_image(path)
    assert "bad picture" in str(caught.value)


def test_limit_of_pixels_is_checked_before_decoding():
    with pytest.raises(ValueError, match=r"9,000 x 9,000 .*max_pixels"):
        load_image(png_header(9000, 9000), max_pixels=80_000_000)
    with pytest.raises(ValueError, match="max_pixels"):
        FlashSlothImageProcessor(max_pixels=100)(LEVELS)


def test_limit_of_bytes(png_path):
    limit = {"max_bytes": len(PNG) - 1}
    for source in (png_path, PNG, io.BytesIO(PNG), "data:;base64," + base64.b64encode(PNG).decode()):
        with pytest.raises(ValueError, match="max_bytes"):
            load_image(source, **limit)
    load_image(png_path, max_bytes=len(PNG))


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        FlashSlothImageProcessor()([LEVELS, str(tmp_path / "nowhere.png")])
    with pytest.raises(ValueError, match="not a file"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_image("a" * 5000)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,a", "base64"),
        ("data:image/png;base64,", "empty"),
        ("ftp://example.com/a.png", "ftp"),
        (None, "NoneType"),
        ({"url": "x"}, "dict"),
        (np.zeros((0, 3, 3)), "shape"),
        (np.zeros((2, 2, 2, 3)), "shape"),
        (np.zeros((5, 5, 5)), "channels"),
        (np.full((2, 2, 3), -1.0), "normalised"),
        (np.full((2, 2, 3), np.nan), "not finite"),
        (np.full((2, 2), "a"), "values of type"),
    ],
)
def test_what_is_no_image(source, cause):
    with pytest.raises(ValueError, match=cause):
        load_image(source)


def test_one_of_several_images_is_named():
    with pytest.raises(ValueError, match="image 2 of 3"):
        FlashSlothImageProcessor()([LEVELS, b"", LEVELS])


def test_saved_settings_come_back(tmp_path):
    processor = FlashSlothImageProcessor(
        size={"height": 32, "width": 48}, view_grid=[1, 2], image_mean=0.4, image_std=(0.1, 0.2, 0.3), max_pixels=1000
    )
    processor.save_pretrained(tmp_path)
    loaded = FlashSlothImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    np.testing.assert_array_equal(loaded(LEVELS)["pixel_values"], processor(LEVELS)["pixel_values"])
    changed = FlashSlothImageProcessor.from_pretrained(tmp_path, view_grid=[2, 2])
    assert changed.num_views == 5


def test_settings_are_checked():
    with pytest.raises(ValueError, match="view_grid"):
        FlashSlothImageProcessor(view_grid=[2])
    with pytest.raises(ValueError, match="size"):
        FlashSlothImageProcessor(size={"shortest_edge": 3})
    with pytest.raises(ValueError, match="image_mean"):
        FlashSlothImageProcessor(image_mean=[0.5, 0.5])
    with pytest.raises(ValueError, match="do_center_crop"):
        FlashSlothImageProcessor()(LEVELS, do_center_crop=True)


def test_counts_for_serving_engines():
    assert FlashSlothImageProcessor().get_number_of_image_patches(10, 20) == 1
    assert FlashSlothImageProcessor(view_grid=[2, 3]).get_number_of_image_patches(10, 20) == 7

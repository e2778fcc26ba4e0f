"""Seeded changes that make a drawn image look photographed, scanned or compressed."""

import io
import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from .sample import REFERENCE_SIZE, Box, Glyph, around

BANK_SIZE = 512
AUGMENTED_SHARE = 0.6


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """(BANK_SIZE, BANK_SIZE, 3) float32, standard normal; crops replace a fresh draw, which is ten times slower."""
    return np.random.default_rng(0).standard_normal((BANK_SIZE, BANK_SIZE, 3), dtype=np.float32)


def add_noise(image: Image.Image, rng: random.Random, strength: float) -> Image.Image:
    """Adds Gaussian noise with a standard deviation of `strength` grey levels."""
    width, height = image.size
    repeats = (-(-height // BANK_SIZE) + 1, -(-width // BANK_SIZE) + 1, 1)
    bank = _noise_bank() if max(width, height) < BANK_SIZE else np.tile(_noise_bank(), repeats)
    top, left = rng.randrange(bank.shape[0] - height), rng.randrange(bank.shape[1] - width)
    noisy = np.asarray(image) + strength * bank[top : top + height, left : left + width]
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def compress(image: Image.Image, quality: int) -> Image.Image:
    """JPEG and back."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def shade(image: Image.Image, rng: random.Random, depth: float) -> Image.Image:
    """Darkens linearly towards one side, by at most `depth`."""
    corners = [round(255 * (1 - depth * rng.random())) for _ in range(4)]
    mask = Image.new("L", (2, 2))
    mask.putdata(corners)
    mask = mask.resize(image.size, Image.Resampling.BILINEAR)
    return ImageChops.multiply(image, Image.merge("RGB", (mask, mask, mask)))


def change_levels(image: Image.Image, contrast: float, brightness: float) -> Image.Image:
    """Scales around mid grey and shifts by `brightness` grey levels."""
    table = np.clip((np.arange(256) - 128) * contrast + 128 + brightness, 0, 255).astype(np.uint8)
    return Image.fromarray(table[np.asarray(image)])


def rotate(
    image: Image.Image,
    angle: float,
    background: tuple[int, int, int],
    glyphs: list[Glyph],
    boxes: list[Box] | None = None,
) -> Image.Image:
    """Turns the image counter-clockwise around its middle by an angle in degrees; `glyphs` and `boxes` go with it, in
    place."""
    middle_x, middle_y = image.width / 2, image.height / 2
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def turned(x: float, y: float) -> tuple[float, float]:
        right, down = x - middle_x, y - middle_y
        return middle_x + cosine * right + sine * down, middle_y - sine * right + cosine * down

    for index, glyph in enumerate(glyphs):
        glyphs[index] = Glyph(glyph.character, *turned(glyph.x, glyph.y))
    boxes = [] if boxes is None else boxes
    for index, box in enumerate(boxes):
        corners = [turned(x, y) for x in (box.left, box.right) for y in (box.top, box.bottom)]
        boxes[index] = around(Box(x, y, x, y) for x, y in corners)
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=background)


def augment(
    image: Image.Image,
    rng: random.Random,
    background: tuple[int, int, int],
    glyphs: list[Glyph] | None = None,
    boxes: list[Box] | None = None,
) -> Image.Image:
    """Rotation up to 4 degrees, levels, shading, blur, noise and JPEG, each moderate and each only sometimes.

    Args:
        glyphs: what is written on the image; moved where it is rotated.
        boxes: around what is on the image; moved with it.
    """
    if rng.random() >= AUGMENTED_SHARE:
        return image
    if rng.random() < 0.4:
        image = rotate(
            image, rng.uniform(-4, 4), background, [] if glyphs is None else glyphs, [] if boxes is None else boxes
        )
    if rng.random() < 0.4:
        image = change_levels(image, rng.uniform(0.75, 1.15), rng.uniform(-20, 20))
    if rng.random() < 0.25:
        image = shade(image, rng, 0.35)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.8) * image.width / REFERENCE_SIZE))
    if rng.random() < 0.4:
        image = add_noise(image, rng, rng.uniform(2, 10))
    if rng.random() < 0.35:
        image = compress(image, rng.randint(50, 95))
    return image

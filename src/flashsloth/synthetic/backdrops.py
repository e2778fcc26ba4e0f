"""Grounds for pictures: plain, shaded, patterned or littered with shapes, and what stands out on them."""

import colorsys
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .colours import BACKGROUNDS, RGB, distance, jitter, luminance

MIN_CONTRAST = 75  # between a picture's mean colour and every colour of its ground
PATTERNS = {"plain": 5, "gradient": 2, "horizon": 1, "dots": 1, "grid": 1, "clutter": 2}
TEST_PATTERNS = ("stripes", "checks", "rings")  # never seen in training


@dataclass
class Backdrop:
    """An empty image and the colours that make it up; `held_out` where its pattern is kept for the test."""

    image: Image.Image
    colours: tuple[RGB, ...]
    held_out: bool = False

    @property
    def edge(self) -> RGB:
        """A colour for what a rotation leaves empty."""
        return self.colours[0]


def any_colour(rng: random.Random) -> RGB:
    """Mostly pale, sometimes strong or dark."""
    if rng.random() < 0.5:
        return jitter(rng, rng.choice(BACKGROUNDS), 8)
    saturation, value = rng.choice(((0.25, 0.95), (0.55, 0.9), (0.7, 0.6), (0.3, 0.5), (0.5, 0.25)))
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(rng.random(), saturation, value))
    return red, green, blue


def near(rng: random.Random, colour: RGB, amount: int = 26) -> RGB:
    """A neighbour of a colour, lighter or darker."""
    shift = amount if luminance(colour) < 128 else -amount
    red, green, blue = (min(255, max(0, part + shift + rng.randint(-8, 8))) for part in colour)
    return red, green, blue


def choose_backdrop(rng: random.Random, test: bool, width: int, height: int) -> Backdrop:
    """Draws a ground of a size."""
    first = (255, 255, 255) if rng.random() < 0.2 else any_colour(rng)
    second = near(rng, first)
    held_out = test and rng.random() < 0.5
    pattern = rng.choice(TEST_PATTERNS) if held_out else rng.choices(list(PATTERNS), list(PATTERNS.values()))[0]
    image = Image.new("RGB", (width, height), first)
    draw = ImageDraw.Draw(image)
    step = max(width, height) / rng.uniform(7, 18)
    if pattern == "gradient":
        second = near(rng, first, 50)
        mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
        image.paste(second, (0, 0), mask)
    elif pattern == "horizon":
        second = near(rng, first, 60)
        draw.rectangle((0, height * rng.uniform(0.4, 0.75), width, height), second)
    elif pattern in ("dots", "grid", "checks"):
        for row in range(int(height / step) + 1):
            for column in range(int(width / step) + 1):
                x, y = column * step, row * step
                if pattern == "dots":
                    draw.ellipse((x, y, x + step * 0.4, y + step * 0.4), second)
                elif pattern == "grid":
                    draw.rectangle((x, y, x + step, y + step), None, second)
                elif (row + column) % 2:
                    draw.rectangle((x, y, x + step - 1, y + step - 1), second)
    elif pattern == "stripes":
        slope = rng.choice((0.0, 0.6, -0.6))
        for index in range(-12, int(width / step) + 13):
            x = index * step
            draw.line((x, 0, x + slope * height, height), second, max(1, round(step * 0.45)))
    elif pattern == "rings":
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        for index in range(int((width + height) / step), 0, -1):
            radius = index * step
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), second if index % 2 else first)
    elif pattern == "clutter":
        _litter(rng, draw, width, height, second)
    return Backdrop(image, (first,) if pattern == "plain" else (first, second), held_out)


def _litter(rng: random.Random, draw: ImageDraw.ImageDraw, width: int, height: int, colour: RGB) -> None:
    """Simple shapes here and there, in neighbours of a colour."""
    extent = max(width, height)
    for _ in range(rng.randint(4, 14)):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), extent * rng.uniform(0.01, 0.06)
        fill = jitter(rng, colour, 10)
        box = (x - radius, y - radius, x + radius, y + radius)
        shape = rng.randrange(4)
        if shape == 0:
            draw.ellipse(box, fill)
        elif shape == 1:
            draw.rectangle(box, fill)
        elif shape == 2:
            draw.regular_polygon((x, y, radius), 3, rng.uniform(0, 120), fill)
        else:
            draw.line((x - 2 * radius, y, x + 2 * radius, y + rng.uniform(-2, 2) * radius), fill, max(1, extent // 90))


def mean_colour(sprite: Image.Image) -> RGB:
    """Of what is not transparent."""
    red, green, blue, _ = sprite.convert("RGBa").resize((1, 1), Image.Resampling.BOX).convert("RGBA").getpixel((0, 0))
    return red, green, blue


def stands_out(colour: RGB, grounds: tuple[RGB, ...], least: float = MIN_CONTRAST) -> bool:
    """Whether a colour is far from every colour of its ground."""
    return all(distance(colour, ground) >= least for ground in grounds)


def ink_for(rng: random.Random, grounds: tuple[RGB, ...]) -> RGB:
    """A colour for pictures and words of one colour on a ground."""
    light = sum(map(luminance, grounds)) / len(grounds) > 128
    for _ in range(8):
        hue, saturation = rng.random(), rng.uniform(0, 1)
        value = rng.uniform(0.0, 0.45) if light else rng.uniform(0.85, 1.0)
        parts = colorsys.hsv_to_rgb(hue, saturation if light else saturation * 0.4, value)
        red, green, blue = (round(255 * part) for part in parts)
        if all(abs(luminance((red, green, blue)) - luminance(ground)) > 95 for ground in grounds):
            return red, green, blue
    return (0, 0, 0) if light else (255, 255, 255)

"""Heat maps as pictures: colours, and a map laid over an image.

Shape suffixes: H W rows and columns of a picture.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# dark violet over red to pale yellow, told apart also without colour; (red, green, blue), 0 to 1 in equal steps
HEAT_STOPS = ((20, 11, 52), (132, 32, 107), (229, 92, 48), (246, 215, 70), (252, 255, 164))
FAINTEST, STRONGEST = 0.5, 0.7  # share of the heat's colour where there is none of it, and most
PANEL = 360  # pixels of the longer side of an image in a picture
MARGIN, LINE = 12, 22  # pixels
INK, PAPER = (20, 20, 30), (255, 255, 255)
FONT_SIZE = 15


def heat_colours(values_HW: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) float64 in 0..255 of values in 0..1."""
    at = np.linspace(0, 1, len(HEAT_STOPS))
    return np.stack([np.interp(values_HW, at, channel) for channel in zip(*HEAT_STOPS, strict=True)], axis=-1)


def lay_over(image: Image.Image, map_HW: np.ndarray) -> Image.Image:
    """The image under a map of amounts that covers it; the largest has the brightest colour.

    The map is smoothed between the middles of its cells, for the eye: cells are all that the model knows.
    """
    most = float(map_HW.max())
    scaled = (map_HW / most if most > 0 else map_HW).astype(np.float32)
    smooth = Image.fromarray(scaled).resize(image.size, Image.Resampling.BILINEAR)
    values_HW = np.clip(np.asarray(smooth), 0, 1)
    share_HW1 = (FAINTEST + (STRONGEST - FAINTEST) * values_HW)[..., None]
    mixed = np.asarray(image.convert("RGB")) * (1 - share_HW1) + heat_colours(values_HW) * share_HW1
    return Image.fromarray(mixed.round().astype(np.uint8))


def fit(image: Image.Image, side: int = PANEL) -> Image.Image:
    """The image, enlarged or reduced so that its longer side has so many pixels."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def panels(rows: list[tuple[str, list[tuple[str, Image.Image]]]]) -> Image.Image:
    """Pictures with a line of text above each, in rows with a headline each."""
    font = ImageFont.load_default(FONT_SIZE)
    width = max(sum(picture.width + MARGIN for _, picture in pictures) for _, pictures in rows) + MARGIN
    heights = [max(picture.height for _, picture in pictures) + 2 * LINE + 2 * MARGIN for _, pictures in rows]
    page = Image.new("RGB", (math.ceil(width), sum(heights)), PAPER)
    draw = ImageDraw.Draw(page)
    top = 0
    for (headline, pictures), height in zip(rows, heights, strict=True):
        draw.text((MARGIN, top + MARGIN / 2), _cut(headline, font, width - 2 * MARGIN), INK, font)
        left = MARGIN
        for caption, picture in pictures:
            draw.text((left, top + MARGIN / 2 + LINE), _cut(caption, font, picture.width), INK, font)
            page.paste(picture, (left, top + MARGIN + 2 * LINE))
            left += picture.width + MARGIN
        top += height
    return page


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."

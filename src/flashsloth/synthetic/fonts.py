"""Fonts from installed Python packages, in a fixed order, sized by the height of their capitals."""

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .colours import RGB
from .sample import Glyph

INSTALL_COMMAND = "pip install 'flashsloth[train]'"

# face -> (package, file inside the package)
FACES: dict[str, tuple[str, str]] = {
    "roboto": ("font_roboto", "files/Roboto-Regular.ttf"),
    "roboto-medium": ("font_roboto", "files/Roboto-Medium.ttf"),
    "roboto-bold": ("font_roboto", "files/Roboto-Bold.ttf"),
    "source-sans": ("font_source_sans_pro", "files/SourceSansPro-Regular.ttf"),
    "source-sans-bold": ("font_source_sans_pro", "files/SourceSansPro-Bold.ttf"),
    "source-serif": ("font_source_serif_pro", "files/SourceSerifPro-Regular.ttf"),
    "source-serif-bold": ("font_source_serif_pro", "files/SourceSerifPro-Bold.ttf"),
    "hanken-grotesk": ("font_hanken_grotesk", "files/HankenGrotesk-Regular.otf"),
    "hanken-grotesk-bold": ("font_hanken_grotesk", "files/HankenGrotesk-Bold.otf"),
    "caladea": ("font_caladea", "files/Caladea-Regular.ttf"),
    "caladea-bold": ("font_caladea", "files/Caladea-Bold.ttf"),
    "lato": ("font_lato", "files/Lato-Regular.ttf"),
    "lato-bold": ("font_lato", "files/Lato-Bold.ttf"),
    "fredoka-one": ("font_fredoka_one", "files/FredokaOne-Regular.ttf"),
    "dejavu-sans": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    "dejavu-sans-bold": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf"),
    "dejavu-serif": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif.ttf"),
    "dejavu-serif-bold": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif-Bold.ttf"),
    "dejavu-mono": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono.ttf"),
    "dejavu-mono-bold": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf"),
}
FACE_NAMES = tuple(FACES)
SHORT_TEXT = 3  # longest text whose pixels are kept


@cache
def font_path(face: str) -> str:
    """The file of a face; ValueError when its package is missing."""
    package, file = FACES[face]
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder) / file
        if path.is_file():
            return str(path)
    raise ValueError(f"Font {face!r} needs the package {package!r}; install it with {INSTALL_COMMAND}.")


@lru_cache(maxsize=4096)
def load_font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A face at a size in points (= pixels of the em square)."""
    # the basic layout engine is faster and the same on every machine
    return ImageFont.truetype(font_path(face), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _capital_ratio(face: str) -> float:
    left, top, right, bottom = load_font(face, 200).getbbox("H")
    return (bottom - top) / 200


@lru_cache(maxsize=4096)
def font_of_height(face: str, capital_height: int) -> ImageFont.FreeTypeFont:
    """A face whose capitals are `capital_height` pixels high."""
    return load_font(face, max(6, round(capital_height / _capital_ratio(face))))


@lru_cache(maxsize=65536)
def text_width(face: str, capital_height: int, text: str) -> float:
    """Advance width of a text in pixels."""
    return font_of_height(face, capital_height).getlength(text)


def fit_height(face: str, texts: tuple[str, ...], capital_height: int, width: float) -> int:
    """The largest capital height up to `capital_height` at which every text is at most `width` pixels wide."""
    widest = max(text_width(face, capital_height, text) for text in texts)
    return capital_height if widest <= width else int(capital_height * width / widest)


@lru_cache(maxsize=16384)
def _short_text(face: str, capital_height: int, text: str) -> tuple[Image.Image, int, int]:
    """(mask, left, top) of a text drawn from a baseline at the origin."""
    font = font_of_height(face, capital_height)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text, anchor="ls"))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font, anchor="ls")
    return mask, left, top


class TextDraw(ImageDraw.ImageDraw):
    """Draws on an image and keeps in `glyphs` what `draw_text` has written where."""

    def __init__(self, image: Image.Image) -> None:
        super().__init__(image)
        self.glyphs: list[Glyph] = []


def draw_text(
    draw: TextDraw,
    position: tuple[float, float],
    text: str,
    face: str,
    capital_height: int,
    fill: tuple[int, int, int],
    anchor: str = "mm",
) -> None:
    """Draws a text with the middle of its capitals at a height; horizontally `l`, `m` or `r` of the position.

    Args:
        anchor: `lm`, `mm` or `rm`.
    """
    x, y = position
    start = x - {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]] * text_width(face, capital_height, text)
    end = start
    for character in text:
        advance = text_width(face, capital_height, character)
        draw.glyphs.append(Glyph(character, end + advance / 2, y))
        end += advance
    y += capital_height / 2
    if len(text) > SHORT_TEXT:
        draw.text((x, y), text, fill, font_of_height(face, capital_height), anchor=f"{anchor[0]}s")
    elif text:  # numbers and labels come again and again; FreeType takes a tenth of a millisecond for each
        mask, left, top = _short_text(face, capital_height, text)
        draw.bitmap((round(start) + left, round(y) + top), mask, fill)


@dataclass(frozen=True)
class Style:
    """Face, case and colours of an image."""

    face: str
    case: str
    ink: RGB
    paper: RGB

    def cased(self, text: str) -> str:
        return getattr(text, self.case)()

"""Where pictures stand: one alone, a few scattered, rows and grids, and a page with a word or lines of text."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageOps

from .backdrops import Backdrop, choose_backdrop, ink_for, mean_colour, stands_out
from .colours import RGB
from .fonts import FACE_NAMES, TextDraw, draw_text, fit_height
from .sample import Glyph
from .words import HELD_OUT, HELD_OUT_WORDS, TRAIN_WORDS, choose_words

ASPECTS = ((1.0, 6), (4 / 3, 2), (3 / 4, 2), (1.7, 1), (0.6, 1))  # (width / height, weight)
ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "", "bottom")}
COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "", "right")}
BORDER = 0.05  # of the image around thirds, where a place has no clear name
TEXT_HEIGHT = 0.045  # of the longer side, height of capitals: 13 pixels of 288

Draw = Callable[[random.Random, float], Image.Image]


@dataclass(frozen=True)
class Subject:
    """What is shown: its name, a noun for questions, the name of its like, and how it is drawn at a size."""

    name: str
    noun: str
    like: str
    draw: Draw = field(repr=False, compare=False)
    one_colour: bool = False
    mirrored: bool = False  # may be mirrored
    turned: float = 10  # degrees it may be turned by


@dataclass(frozen=True)
class Shown:
    """A subject on the image: the middle and size of its box in pixels, and the name of its place, if it has one."""

    subject: Subject
    x: float
    y: float
    width: float
    height: float
    place: str


@dataclass
class Arrangement:
    """An image with what it shows; `shape` is (rows, columns) of a grid, (0, 0) of what lies anywhere."""

    image: Image.Image
    edge: RGB
    shown: list[Shown]
    shape: tuple[int, int] = (0, 0)
    word: str = ""
    lines: list[str] = field(default_factory=list)
    glyphs: list[Glyph] = field(default_factory=list)
    held_out: bool = False


def canvas_size(rng: random.Random, image_size: int) -> tuple[int, int]:
    """(width, height), the longer one `image_size`."""
    aspect = rng.choices([ratio for ratio, _ in ASPECTS], [weight for _, weight in ASPECTS])[0]
    return round(image_size * min(1.0, aspect)), round(image_size * min(1.0, 1 / aspect))


def third(x: float, y: float, width: float, height: float) -> str:
    """The ninth of the image in words, empty where it is not clear."""
    across, down = x / width, y / height
    if any(abs(part - edge) < BORDER for part in (across, down) for edge in (1 / 3, 2 / 3)):
        return ""
    return place_of(min(2, int(3 * down)), min(2, int(3 * across)), 3, 3)


def place_of(row: int, column: int, rows: int, columns: int) -> str:
    """The place of a cell in words: `top left`, `right`, ..., `center`."""
    return f"{ROWS[rows][row]} {COLUMNS[columns][column]}".strip() or "center"


def _paste(
    rng: random.Random, backdrop: Backdrop, subject: Subject, x: float, y: float, size: float, ink: RGB | None
) -> tuple[float, float]:
    """Draws a subject around a middle and returns its width and height; on a tile where the ground is too alike."""
    sprite = subject.draw(rng, size)
    if subject.mirrored and rng.random() < 0.5:
        sprite = ImageOps.mirror(sprite)
    if rng.random() < 0.5:
        sprite = sprite.rotate(rng.uniform(-subject.turned, subject.turned), Image.Resampling.BILINEAR, expand=True)
        sprite.thumbnail((round(size), round(size)))
    if subject.one_colour:
        flat = Image.new("RGBA", sprite.size, ink or ink_for(rng, backdrop.colours))
        flat.putalpha(sprite.getchannel("A"))
        sprite = flat
    else:
        colour = mean_colour(sprite)
        if not stands_out(colour, backdrop.colours):
            tiles = [tile for tile in ((252, 252, 252), (40, 44, 52), (120, 170, 220)) if stands_out(colour, (tile,))]
            half = size * 0.54
            ImageDraw.Draw(backdrop.image).rounded_rectangle(
                (x - half, y - half, x + half, y + half), size * rng.choice((0.1, 0.3, 0.54)), rng.choice(tiles)
            )
            if sprite.width == sprite.height or max(sprite.size) > size * 0.9:  # corners stay on the tile
                sprite.thumbnail((round(size * 0.84), round(size * 0.84)))
    backdrop.image.paste(sprite, (round(x - sprite.width / 2), round(y - sprite.height / 2)), sprite)
    return sprite.width, sprite.height


def alone(rng: random.Random, test: bool, image_size: int, subjects: list[Subject]) -> Arrangement:
    """One subject, large or small, anywhere."""
    width, height = canvas_size(rng, image_size)
    backdrop = choose_backdrop(rng, test, width, height)
    size = min(width, height) * rng.triangular(0.25, 0.95, 0.7)
    x, y = (
        rng.uniform(size * 0.55, side - size * 0.55) if side > size * 1.1 else side / 2 for side in (width, height)
    )
    box = _paste(rng, backdrop, subjects[0], x, y, size, None)
    # what fills the image is nowhere in particular
    place = third(x, y, width, height) if size < 0.5 * min(width, height) else ""
    shown = [Shown(subjects[0], x, y, *box, place)]
    return Arrangement(backdrop.image, backdrop.edge, shown, held_out=backdrop.held_out)


def scattered(rng: random.Random, test: bool, image_size: int, subjects: list[Subject]) -> Arrangement:
    """Two to four subjects that do not touch."""
    width, height = canvas_size(rng, image_size)
    backdrop = choose_backdrop(rng, test, width, height)
    ink = ink_for(rng, backdrop.colours)
    shown: list[Shown] = []
    for subject in subjects:
        for attempt in range(60):
            size = min(width, height) * rng.uniform(0.2, 0.42 - 0.003 * attempt)
            x, y = rng.uniform(size * 0.55, width - size * 0.55), rng.uniform(size * 0.55, height - size * 0.55)
            if all(max(abs(x - o.x), abs(y - o.y)) > 0.56 * (size + max(o.width, o.height)) for o in shown):
                box = _paste(rng, backdrop, subject, x, y, size, ink)
                shown.append(Shown(subject, x, y, *box, third(x, y, width, height)))
                break
    return Arrangement(backdrop.image, backdrop.edge, shown, held_out=backdrop.held_out)


def grid_shape(rng: random.Random) -> tuple[int, int]:
    """(rows, columns) of a grid, or of a row or column of two or three."""
    shapes = ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2), (3, 3))
    return rng.choices(shapes, (2, 1, 2, 1, 5, 1, 1, 4))[0]


def gridded(
    rng: random.Random, test: bool, image_size: int, subjects: list[Subject], shape: tuple[int, int]
) -> Arrangement:
    """One subject in each cell."""
    rows, columns = shape
    cell = image_size / max(rows, columns)
    width, height = round(cell * columns), round(cell * rows)
    if min(width, height) < image_size * 0.5:  # no strips
        width, height = max(width, round(image_size * 0.5)), max(height, round(image_size * 0.5))
    backdrop = choose_backdrop(rng, test, width, height)
    ink = ink_for(rng, backdrop.colours)
    wide, high = width / columns, height / rows
    if rng.random() < 0.4:
        draw, thick = ImageDraw.Draw(backdrop.image), max(1, image_size // 144)
        for column in range(1, columns):
            draw.line((column * wide, 0, column * wide, height), ink, thick)
        for row in range(1, rows):
            draw.line((0, row * high, width, row * high), ink, thick)
    shown = []
    for index, subject in enumerate(subjects):
        row, column = divmod(index, columns)
        size = min(wide, high) * rng.uniform(0.6, 0.86)
        x, y = (column + 0.5) * wide, (row + 0.5) * high
        box = _paste(rng, backdrop, subject, x, y, size, ink)
        shown.append(Shown(subject, x, y, *box, place_of(row, column, rows, columns)))
    return Arrangement(backdrop.image, backdrop.edge, shown, shape, held_out=backdrop.held_out)


def _written(rng: random.Random, test: bool, subject: Subject, others: list[str]) -> str:
    """The word under a picture: its name, that of something else, or any other."""
    draw = rng.random()
    name = subject.name if draw < 0.3 else rng.choice(others) if draw < 0.45 else ""
    if name and " " not in name and (test or name not in HELD_OUT):
        return name
    return rng.choice(HELD_OUT_WORDS) if test and rng.random() < 0.4 else choose_words(rng, 1, False)[0]


def page(rng: random.Random, test: bool, image_size: int, subjects: list[Subject], others: list[str]) -> Arrangement:
    """A subject with one word above or below it, or with lines of words beside it."""
    beside = rng.random() < 0.4
    width, height = (image_size, round(image_size * rng.uniform(0.6, 1))) if beside else canvas_size(rng, image_size)
    backdrop = choose_backdrop(rng, test, width, height)
    ink = ink_for(rng, backdrop.colours)
    draw, face = TextDraw(backdrop.image), rng.choice(FACE_NAMES)
    case = rng.choice((str.lower, str.lower, str.upper, str.title))
    found = Arrangement(backdrop.image, backdrop.edge, [], held_out=backdrop.held_out)
    if beside:
        size = min(width * 0.42, height * 0.8) * rng.uniform(0.75, 1)
        left = rng.random() < 0.5
        x = width * (0.26 if left else 0.74)
        y = height * rng.uniform(0.42, 0.58)
        found.lines = [rng.choice(TRAIN_WORDS) for _ in range(rng.randint(2, 5))]
        text_height = round(image_size * rng.uniform(TEXT_HEIGHT, 0.06))
        start = width * (0.54 if left else 0.06)
        pitch = text_height * rng.uniform(1.8, 2.4)
        top = (height - pitch * (len(found.lines) - 1)) / 2
        for index, line in enumerate(found.lines):
            draw_text(draw, (start, top + index * pitch), case(line), face, text_height, ink, "lm")
    else:
        found.word = _written(rng, test, subjects[0], others)
        text_height = round(image_size * rng.uniform(TEXT_HEIGHT, 0.1))
        text_height = fit_height(face, (case(found.word),), text_height, width * 0.86)
        room = height - 2.6 * text_height
        size = min(width, room) * rng.uniform(0.6, 0.92)
        above = rng.random() < 0.3
        x, y = width / 2, (2.6 * text_height if above else 0) + room / 2
        baseline = text_height * 1.4 if above else height - text_height * 1.4
        draw_text(draw, (x, baseline), case(found.word), face, text_height, ink)
        found.held_out = found.held_out or found.word in HELD_OUT
    box = _paste(rng, backdrop, subjects[0], x, y, size, ink)
    found.shown = [Shown(subjects[0], x, y, *box, "")]
    found.glyphs = draw.glyphs
    return found

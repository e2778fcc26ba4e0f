"""Draws a window of the world: land and sea, coloured countries, letters or names on them, and a legend."""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from .colours import COLOURS, RGB, distance, jitter, luminance
from .fonts import FACE_NAMES, TextDraw, draw_text, text_width
from .outlines import PROJECTIONS, TEST_PROJECTION, Outline, project
from .sample import Glyph

# window -> (west, south, east, north)
WINDOWS: dict[str, tuple[float, float, float, float]] = {
    "europe": (-11, 35, 41, 70),
    "asia": (30, -8, 145, 62),
    "africa": (-19, -36, 52, 38),
    "north america": (-130, 7, -58, 68),
    "south america": (-83, -56, -33, 13),
    "oceania": (110, -48, 180, 0),
}
CLOSER_SHARE = 0.4  # of maps, those that show a part of a continent
SUPERSAMPLING = 2
NAME_HEIGHT = 0.031  # of the longer side, height of capitals: 9 pixels of 288
SEAS: tuple[RGB, ...] = (
    (200, 224, 240),
    (170, 208, 232),
    (255, 255, 255),
    (226, 234, 240),
    (52, 74, 104),
    (236, 232, 222),
)
LANDS: tuple[RGB, ...] = (
    (232, 226, 208),
    (214, 214, 210),
    (222, 234, 210),
    (240, 238, 232),
    (190, 186, 176),
    (245, 224, 190),
)


@dataclass(frozen=True)
class Place:
    """A country on the map: the middle of what is seen of its mainland, and its seen area, in pixels."""

    name: str
    x: float
    y: float
    pixels: int
    share: float  # of its area that lies in the image


@dataclass
class WorldMap:
    """A drawn map: its colour for each coloured country, by name, and what is written on countries."""

    image: Image.Image
    sea: RGB
    continent: str
    places: dict[str, Place]
    areas: dict[str, float]
    in_view: frozenset[str]  # countries of which anything may be seen
    coloured: dict[str, str] = field(default_factory=dict)
    letters: dict[str, str] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)
    legend: bool = False
    glyphs: list[Glyph] = field(default_factory=list)


def _window(rng: random.Random, continent: str) -> tuple[float, float, float, float]:
    west, south, east, north = WINDOWS[continent]
    if rng.random() < CLOSER_SHARE and continent != "oceania":
        part = rng.uniform(0.5, 0.75)
        wide, high = (east - west) * part, (north - south) * part
        west, south = rng.uniform(west, east - wide), rng.uniform(south, north - high)
        return west, south, west + wide, south + high
    pad_x, pad_y = (east - west) * 0.06, (north - south) * 0.06
    return west - rng.uniform(-0.3, 1) * pad_x, south - rng.uniform(-0.3, 1) * pad_y, east + pad_x, north + pad_y


class _View:
    """From degrees to pixels of a supersampled image, with what of each country falls into it."""

    def __init__(
        self, rng: random.Random, outlines: tuple[Outline, ...], continent: str, test: bool, size: int
    ) -> None:
        west, south, east, north = _window(rng, continent)
        center = ((west + east) / 2, (south + north) / 2)
        projection = TEST_PROJECTION if test and rng.random() < 0.5 else rng.choice(PROJECTIONS)
        edges = np.array([(west, center[1]), (east, center[1]), (center[0], south), (center[0], north)])
        (left, _), (right, _), (_, bottom), (_, top) = project(edges, center, projection)
        aspect = min(1.6, max(0.625, (right - left) / (bottom - top)))
        self.width, self.height = round(size * min(1, aspect)), round(size * min(1, 1 / aspect))
        self.scale = SUPERSAMPLING * max(self.width / (right - left), self.height / (bottom - top))
        # the smaller side is cut to the window, the other one shows a little more
        self.scale = min(
            self.scale, SUPERSAMPLING * 1.15 * min(self.width / (right - left), self.height / (bottom - top))
        )
        middle = np.array([SUPERSAMPLING * self.width / 2, SUPERSAMPLING * self.height / 2])
        offset = np.array([(left + right) / 2, (top + bottom) / 2])
        # a margin, as parallels bend
        reach_x, reach_y = max(15.0, 0.4 * (east - west)), max(12.0, 0.4 * (north - south))
        found: list[tuple[Outline, np.ndarray, bool]] = []
        for outline in outlines:
            for index, ring in enumerate(outline.rings):
                low_x, low_y, high_x, high_y = outline.bounds[index]
                turn = 360 * round(((low_x + high_x) / 2 - center[0]) / 360)
                across = low_x - turn < east + reach_x and high_x - turn > west - reach_x
                if across and low_y < north + reach_y and high_y > south - reach_y:
                    found.append((outline, ring - (turn, 0) if turn else ring, index == outline.main))
        projected = project(np.concatenate([ring for _, ring, _ in found]), center, projection)
        ends = np.cumsum([len(ring) for _, ring, _ in found])[:-1]
        rings: dict[str, tuple[Outline, list[np.ndarray]]] = {}
        self.mainlands: set[str] = set()  # French Guiana does not make France a country of South America
        for (outline, _, main), points in zip(
            found, np.split((projected - offset) * self.scale + middle, ends), strict=True
        ):
            low, high = points.min(axis=0), points.max(axis=0)
            if (high > 0).all() and (low < 2 * middle).all():
                rings.setdefault(outline.name or str(id(outline)), (outline, []))[1].append(points)
                if main:
                    self.mainlands.add(outline.name)
        self.polygons = list(rings.values())

    def draw(self, sea: RGB, lands: dict[str, RGB], land: RGB, border: RGB, thick: int) -> Image.Image:
        image = Image.new("RGB", (SUPERSAMPLING * self.width, SUPERSAMPLING * self.height), sea)
        draw = ImageDraw.Draw(image)
        for outline, rings in self.polygons:
            fill = lands.get(outline.name, land)
            for points in rings:
                draw.polygon(points.ravel().tolist(), fill)
        for _, rings in self.polygons:
            for points in rings:
                flat = points.ravel().tolist()
                draw.line([*flat, *flat[:2]], border, thick)
        return image.reduce(SUPERSAMPLING)

    def places(self) -> dict[str, Place]:
        """Every named country that is seen, with the most inner place of its largest part."""
        index = Image.new("L", (self.width, self.height))
        draw = ImageDraw.Draw(index)
        found: dict[str, Place] = {}
        shown = [(outline, rings) for outline, rings in self.polygons if outline.name in self.mainlands - {""}]
        for number, (_, rings) in enumerate(shown, 1):
            for points in rings:
                draw.polygon((points / SUPERSAMPLING).ravel().tolist(), number)
        grid = np.asarray(index)
        counts = np.bincount(grid.ravel(), minlength=len(shown) + 1)
        for number, (outline, rings) in enumerate(shown, 1):
            if counts[number] < 12:
                continue
            low = np.maximum(0, np.min([points.min(axis=0) for points in rings], axis=0) // SUPERSAMPLING).astype(int)
            high = (np.max([points.max(axis=0) for points in rings], axis=0) // SUPERSAMPLING).astype(int) + 1
            own = np.pad(grid[low[1] : high[1] + 1, low[0] : high[0] + 1] == number, 1)
            inner = own[1:-1, 1:-1] & own[:-2, 1:-1] & own[2:, 1:-1] & own[1:-1, :-2] & own[1:-1, 2:]
            rows, columns = np.nonzero(inner if inner.any() else own[1:-1, 1:-1])  # rather no islet
            rows, columns = rows + low[1], columns + low[0]
            whole = sum(_flat_area(points) for points in rings) / SUPERSAMPLING**2
            # of the pixels of the country, the one nearest to their median lies on it
            nearest = np.argmin(np.abs(rows - np.median(rows)) + np.abs(columns - np.median(columns)))
            x, y = float(columns[nearest]) + 0.5, float(rows[nearest]) + 0.5
            share = min(1.0, float(counts[number]) / max(1.0, whole))
            found[outline.name] = Place(outline.name, x, y, int(counts[number]), share)
        return found


def _flat_area(points: np.ndarray) -> float:
    x, y = points[:, 0], points[:, 1]
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def draw_map(rng: random.Random, outlines: tuple[Outline, ...], test: bool, image_size: int) -> WorldMap:
    """Draws a continent or a part of it with one to four countries coloured, lettered or named."""
    while True:
        continent = rng.choices(list(WINDOWS), (5, 5, 5, 2, 3, 1))[0]
        view = _View(rng, outlines, continent, test, image_size)
        places = view.places()
        least = 0.0035 * view.width * view.height
        fit = [name for name, place in places.items() if place.pixels >= least and place.share > 0.85]
        if len(fit) >= 2:
            break
    sea = jitter(rng, rng.choice(SEAS), 6)
    land = jitter(rng, rng.choice([land for land in LANDS if distance(land, sea) > 40]), 6)
    border = (255, 255, 255) if rng.random() < 0.4 and luminance(land) < 235 else (110, 110, 110)
    palette = [name for name in COLOURS if name != "white" and distance(COLOURS[name], sea) > 110]
    count = min(len(fit), len(palette), rng.choice((1, 1, 2, 3, 4)))
    chosen = rng.sample(fit, count)
    areas = {outline.name: outline.area for outline in outlines if outline.name}
    in_view = frozenset(outline.name for outline, _ in view.polygons)
    found = WorldMap(Image.new("RGB", (1, 1)), sea, continent, places, areas, in_view)
    kind = rng.choices(("coloured", "lettered", "named"), (6, 2, 2))[0]
    lands: dict[str, RGB] = {}
    if kind == "coloured":
        found.coloured = dict(zip(chosen, rng.sample(palette, count), strict=True))
        lands = {name: jitter(rng, COLOURS[colour], 10) for name, colour in found.coloured.items()}
    else:
        lands = {outline.name: jitter(rng, land, 16) for outline, _ in view.polygons if outline.name}
    found.image = view.draw(sea, lands, land, border, rng.choice((1, 2, 2, 3)))
    draw, face = TextDraw(found.image), rng.choice([face for face in FACE_NAMES if "mono" not in face])
    if kind == "lettered":
        found.letters = dict(zip(chosen, rng.sample("abcdefghk", count), strict=True))
        _write_letters(draw, found, face, image_size, land)
    elif kind == "named":
        _write_names(rng, draw, found, chosen, face, image_size, land)
    elif count > 1 and rng.random() < 0.35:
        found.legend = _write_legend(draw, found, face, image_size)
    found.glyphs = draw.glyphs
    return found


def _write_letters(draw: TextDraw, found: WorldMap, face: str, image_size: int, land: RGB) -> None:
    height = max(8, round(image_size * 0.035))
    for name, letter in found.letters.items():
        place = found.places[name]
        box = (place.x - height, place.y - height, place.x + height, place.y + height)
        draw.ellipse(box, (250, 250, 250), (30, 30, 30))
        draw_text(draw, (place.x, place.y), letter.upper(), face, height, (20, 20, 20))


def _write_names(
    rng: random.Random, draw: TextDraw, found: WorldMap, chosen: list[str], face: str, image_size: int, land: RGB
) -> None:
    """Names that neither leave the image nor touch each other."""
    height = max(8, round(image_size * NAME_HEIGHT))
    case = rng.choice((str.upper, str.title, str.title))
    taken: list[tuple[float, float, float]] = []
    for name in chosen:
        place, text = found.places[name], case(name)
        half = text_width(face, height, text) / 2 + 3
        x = min(max(place.x, half), found.image.width - half)
        free = all(abs(y - place.y) > 2 * height or abs(x - other) > half + room for other, y, room in taken)
        # the middle of the name lies near the middle of the country
        if (
            free
            and half < found.image.width / 2
            and abs(x - place.x) < 0.5 * half
            and height < place.y < found.image.height - height
        ):
            ink = (20, 20, 20) if luminance(land) > 110 else (250, 250, 250)
            draw_text(draw, (x, place.y), text, face, height, ink)
            taken.append((x, place.y, half))
            found.named.append(name)


def _write_legend(draw: TextDraw, found: WorldMap, face: str, image_size: int) -> bool:
    """Names beside squares of their colours in the corner that hides least; False where it would hide a country."""
    height = max(8, round(image_size * NAME_HEIGHT))
    pitch, pad = 2 * height, height * 0.7
    width = max(text_width(face, height, name.title()) for name in found.coloured) + 3.2 * height
    tall = pitch * len(found.coloured) + pad
    image = found.image
    right, bottom = image.width - width - 3, image.height - tall - 3
    for left, top in ((3, 3), (right, 3), (3, bottom), (right, bottom)):
        middles = [(found.places[name].x - left, found.places[name].y - top) for name in found.coloured]
        covered = any(-25 < x < width + 25 and -25 < y < tall + 25 for x, y in middles)
        if covered:
            continue
        draw.rectangle((left, top, left + width, top + tall), (252, 252, 252), (90, 90, 90))
        for index, (name, colour) in enumerate(found.coloured.items()):
            y = top + pad / 2 + pitch * (index + 0.5)
            draw.rectangle((left + pad, y - height / 2, left + pad + height, y + height / 2), COLOURS[colour])
            draw_text(draw, (left + 2.4 * height, y), name.title(), face, height, (20, 20, 20), "lm")
        return True
    return False

"""Named pictures and flags of npm packages, rasterised once into a folder and read from there.

`scripts/fetch_pictures.sh FOLDER` installs the packages and calls `rasterise_pictures`; drawing needs the folder that
the environment variable FLASHSLOTH_PICTURES_DIR names, and of it only `sprites/` (and `node_modules/world-atlas` for
maps). None of it is part of this project; `PACKAGES` gives the licences.
"""

import io
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

DIRECTORY_VARIABLE = "FLASHSLOTH_PICTURES_DIR"
FILL_COMMAND = "scripts/fetch_pictures.sh FOLDER"
SPRITE_SIZE = 224  # longer side of a sprite, transparent border cut off
RENDER_SIZE = 256

# style -> (package, version, licence, pictures taken from it); a style is drawn by one hand
PACKAGES: dict[str, tuple[str, str, str, int]] = {
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", 596),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", 494),
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7", "MIT", 596),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", 596),
    "fluent-line": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", 596),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", 265),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", 681),
    "mdi": ("@mdi/svg", "7.4.47", "Apache-2.0", 353),
    "flag-icons": ("flag-icons", "7.5.0", "MIT", 85),
    "circle-flags": ("@iconify-json/circle-flags", "1.2.11", "MIT", 85),
    "maps": ("world-atlas", "2.0.2", "ISC, of Natural Earth's public-domain data", 230),
}
TEST_STYLE = "twemoji"
# how often a training style is drawn; the first four have colours
STYLE_WEIGHTS = {"noto": 4, "fluent": 4, "fluent-flat": 4, "noto-v1": 3, "fxemoji": 2, "fluent-line": 2, "mdi": 2}
ONE_COLOUR = frozenset({"fluent-line", "mdi"})
FLAG_STYLES = ("flag-icons", "circle-flags")
# pictures of fxemoji that show something else than the others of that name
OTHER_IN_FXEMOJI = frozenset({"construction", "keyboard", "sunglasses", "ticket", "window"})


@dataclass(frozen=True)
class Named:
    """A thing and its pictures: keys of the emoji styles and of `mdi`; `like` is shared by things that look alike."""

    name: str
    kind: str
    article: str
    like: str
    emoji: tuple[str, ...]
    mdi: tuple[str, ...]

    def keys(self, style: str) -> tuple[str, ...]:
        """The names of its pictures in a style."""
        if style == "mdi":
            return self.mdi
        if style == "fxemoji":
            return tuple(key.replace("-", "") for key in self.emoji if key not in OTHER_IN_FXEMOJI)
        return self.emoji

    @property
    def noun(self) -> str:
        """The name with its article."""
        return f"{self.article} {self.name}".strip()


@dataclass(frozen=True)
class Country:
    """A country: its name in `world-atlas`, and the keys of its flag, empty where another one looks like it."""

    name: str
    continent: str
    atlas: str
    flag: str
    emoji: str


def _rows(file: str) -> Iterator[list[str]]:
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        yield ["" if cell == "-" else cell for cell in line.split("\t")]


def _keys(cell: str) -> tuple[str, ...]:
    return tuple(cell.split(",")) if cell else ()


@lru_cache(maxsize=1)
def vocabulary() -> tuple[Named, ...]:
    """Everything that can be shown, of pictures.tsv."""
    return tuple(
        Named(name, kind, article, like or name, _keys(emoji), _keys(mdi))
        for name, kind, article, like, emoji, mdi in _rows("pictures.tsv")
    )


@lru_cache(maxsize=1)
def countries() -> tuple[Country, ...]:
    """The countries of maps and flags, of countries.tsv."""
    return tuple(Country(*row) for row in _rows("countries.tsv"))


def pictures_folder() -> Path:
    """The folder that FLASHSLOTH_PICTURES_DIR names; ValueError where it is unset."""
    folder = os.environ.get(DIRECTORY_VARIABLE)
    if not folder:
        raise ValueError(
            f"Pictures and maps are drawn from npm packages: fill a folder with `{FILL_COMMAND}` and set "
            f"{DIRECTORY_VARIABLE} to it."
        )
    return Path(folder)


@lru_cache(maxsize=64)
def _style_keys(folder: Path, style: str) -> frozenset[str]:
    place = folder / "sprites" / style
    if not place.is_dir():
        raise ValueError(f"{place} does not exist; fill the folder of {DIRECTORY_VARIABLE} with `{FILL_COMMAND}`.")
    return frozenset(path.stem for path in place.iterdir() if path.suffix == ".png")


@lru_cache(maxsize=16384)
def _encoded(folder: Path, style: str, key: str) -> bytes:
    return (folder / "sprites" / style / f"{key}.png").read_bytes()


@lru_cache(maxsize=4096)
def _small(folder: Path, style: str, key: str) -> Image.Image:
    image = _decode(folder, style, key)
    image.thumbnail((SPRITE_SIZE // 2, SPRITE_SIZE // 2), Image.Resampling.BOX)
    return image


def _decode(folder: Path, style: str, key: str) -> Image.Image:
    return Image.open(io.BytesIO(_encoded(folder, style, key))).convert("RGBA")


@lru_cache(maxsize=16)
def things_of(folder: Path, style: str) -> tuple[Named, ...]:
    """The things that a style shows."""
    present = _style_keys(folder, style)
    return tuple(thing for thing in vocabulary() if not present.isdisjoint(thing.keys(style)))


@lru_cache(maxsize=4)
def flags_of(folder: Path, style: str) -> tuple[Country, ...]:
    """The countries whose flag a style has."""
    present = _style_keys(folder, style)
    return tuple(country for country in countries() if flag_key(country, style) in present)


def flag_key(country: Country, style: str) -> str:
    """The name of a country's flag in a style."""
    return country.emoji if style == TEST_STYLE else country.flag


def thing_sprite(rng: random.Random, thing: Named, style: str, size: float) -> Image.Image:
    """One of a thing's pictures in a style, its longer side `size` pixels."""
    present = _style_keys(pictures_folder(), style)
    return sprite(style, rng.choice([key for key in thing.keys(style) if key in present]), size)


def sprite(style: str, key: str, size: float) -> Image.Image:
    """A picture with transparency, its longer side `size` pixels."""
    folder = pictures_folder()
    image = _small(folder, style, key) if size <= SPRITE_SIZE // 2 else _decode(folder, style, key)
    scale = size / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


class _Icons:
    """One `icons.json` of Iconify: SVG bodies by name, and other names for them."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path} does not exist; fill the folder with `{FILL_COMMAND}`.")
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

    def svg(self, key: str) -> str | None:
        """The picture as an SVG document; None where there is none of that name."""
        for _ in range(4):
            if key in self.data["icons"]:
                icon = self.data["icons"][key]
                width, height = (icon.get(side, self.data.get(side, 16)) for side in ("width", "height"))
                return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'  # fmt: skip # noqa: E501
            alias = self.data.get("aliases", {}).get(key)
            if alias is None or len(alias) > 1:  # turned or mirrored ones
                return None
            key = alias["parent"]
        return None


def _documents(packages: Path, style: str) -> Iterator[tuple[str, str]]:
    """(key, SVG document) of everything that a style is asked for."""
    package = packages / PACKAGES[style][0]
    if style == "flag-icons":
        for country in countries():
            if country.flag:
                yield country.flag, (package / "flags" / "4x3" / f"{country.flag}.svg").read_text(encoding="utf-8")
        return
    wanted = [key for thing in vocabulary() for key in thing.keys(style)] if style != "circle-flags" else []
    if style == "mdi":
        for key in wanted:
            yield key, (package / "svg" / f"{key}.svg").read_text(encoding="utf-8")
        return
    if style in (TEST_STYLE, *FLAG_STYLES):
        wanted += [flag_key(country, style) for country in countries() if country.emoji]
    icons = _Icons(package / "icons.json")
    for key in wanted:
        document = icons.svg(key)
        if document is not None:
            yield key, document


def rasterise_pictures(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Writes every picture of `folder/node_modules` to `folder/sprites`; returns how many each style has.

    Pictures that are there already stay.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError("Rasterising pictures needs resvg-py; pip install 'flashsloth[draw]'.") from error
    counts: dict[str, int] = {}
    for style in PACKAGES:
        if style == "maps":
            continue
        place = Path(folder) / "sprites" / style
        place.mkdir(parents=True, exist_ok=True)
        for key, document in _documents(Path(folder) / "node_modules", style):
            counts[style] = counts.get(style, 0) + 1
            target = place / f"{key}.png"
            if target.exists():
                continue
            data = bytes(resvg_py.svg_to_bytes(svg_string=document, width=RENDER_SIZE, skip_system_fonts=True))
            image = Image.open(io.BytesIO(data)).convert("RGBA")
            image = image.crop(image.getchannel("A").getbbox())
            image = image.resize([round(side * SPRITE_SIZE / max(image.size)) for side in image.size])
            partial = place / f"{key}.part"
            image.save(partial, "PNG")
            os.replace(partial, target)
    return counts

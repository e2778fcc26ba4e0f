"""CIFAR-10 photographs, alone and in mosaics: what it is, what is where, how many there are."""

import io
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .augment import change_levels, compress
from .sample import REFERENCE_SIZE, Sample, Turn, TurnMaker, choose_turns, phrase, split_id, with_article, yes_no_maker

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ANIMALS = frozenset({"bird", "cat", "deer", "dog", "frog", "horse"})
HUB_NAME = "uoft-cs/cifar10"
DIRECTORY_VARIABLE = "FLASHSLOTH_CIFAR10_DIR"
SINGLE_SHARE, QUAD_SHARE = 0.6, 0.34
PLACES = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"),
}  # fmt: skip


@dataclass
class _Store:
    """The encoded files of one split in one buffer, and their labels (N,) as indices of CLASS_NAMES."""

    buffer: bytes
    offsets: np.ndarray
    labels: np.ndarray
    by_class: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.by_class = [np.flatnonzero(self.labels == label) for label in range(len(CLASS_NAMES))]


class Photographs:
    """CIFAR-10 from `train.parquet` and `test.parquet` in a folder, or from the hub.

    Args:
        directory: folder of the parquet files; default the environment variable FLASHSLOTH_CIFAR10_DIR, and where
            that is unset the hub dataset `uoft-cs/cifar10`.

    A split is read at its first use and is left out of pickles. Each split uses its own file only.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        directory = directory or os.environ.get(DIRECTORY_VARIABLE)
        self.directory = Path(directory) if directory else None
        self._stores: dict[str, _Store] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stores": {}}

    def count(self, split: str) -> int:
        """Number of photographs in a split."""
        return len(self._store(split).labels)

    def choose(self, rng: random.Random, split: str, name: str) -> int:
        """The index of a random photograph of a class."""
        return int(rng.choice(self._store(split).by_class[CLASS_NAMES.index(name)]))

    def load(self, split: str, index: int) -> tuple[Image.Image, str]:
        """A photograph (RGB, 32 x 32) and the name of its class."""
        store = self._store(split)
        data = store.buffer[store.offsets[index] : store.offsets[index + 1]]
        return Image.open(io.BytesIO(data)).convert("RGB"), CLASS_NAMES[store.labels[index]]

    def _store(self, split: str) -> _Store:
        split_id(split)
        if split not in self._stores:
            self._stores[split] = self._read(split)
        return self._stores[split]

    def _read(self, split: str) -> _Store:
        if self.directory is None:
            table = self._read_hub(split)
        else:
            import pyarrow.parquet

            path = self.directory / f"{split}.parquet"
            if not path.is_file():
                raise ValueError(f"{path} does not exist; {DIRECTORY_VARIABLE} must name a folder with that file.")
            table = pyarrow.parquet.read_table(path).to_pydict()
        images = table["image"] if "image" in table else table["img"]
        unknown = {label for label in table["label"] if isinstance(label, str)} - set(CLASS_NAMES)
        if unknown:
            raise ValueError(f"{split} holds the labels {sorted(unknown)}; CIFAR-10 has {', '.join(CLASS_NAMES)}.")
        labels = [label if isinstance(label, int) else CLASS_NAMES.index(label) for label in table["label"]]
        offsets = np.cumsum([0, *(len(image["bytes"]) for image in images)])
        return _Store(b"".join(image["bytes"] for image in images), offsets, np.array(labels))

    @staticmethod
    def _read_hub(split: str) -> dict[str, list]:
        import datasets

        try:
            data = datasets.load_dataset(HUB_NAME, split=split)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"CIFAR-10 could not be loaded from {HUB_NAME!r} ({error}); set {DIRECTORY_VARIABLE} to a folder with "
                "train.parquet and test.parquet."
            ) from error
        return data.cast_column("img", datasets.Image(decode=False)).to_dict()


def _prepare(photo: Image.Image, rng: random.Random, test: bool, size: int) -> Image.Image:
    """Enlarged to size x size; in training also flipped, shifted by up to 3 of 32 pixels and slightly re-coloured."""
    box = (0.0, 0.0, float(photo.width), float(photo.height))
    if not test:
        if rng.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = photo.width - rng.uniform(0, 5)
        left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
        box = (left, top, left + side, top + side)
        if rng.random() < 0.5:
            photo = change_levels(photo, rng.uniform(0.85, 1.15), rng.uniform(-15, 15))
    return photo.resize((size, size), Image.Resampling.BICUBIC, box)


def _single_makers(rng: random.Random, name: str) -> list[tuple[float, TurnMaker]]:
    others = [other for other in CLASS_NAMES if other != name]

    def naming(rng: random.Random) -> Turn:
        return phrase(rng, "photo_name", ("what is it?", "what is this?", "what is in the picture?"), name)

    def either(rng: random.Random) -> Turn:
        pair = [name, rng.choice(others)]
        rng.shuffle(pair)
        question = f"is this {with_article(pair[0])} or {with_article(pair[1])}?"
        return Turn("photo_choice", question, name)

    def kind(rng: random.Random) -> Turn:
        questions = ("is it an animal or a vehicle?", "does this show an animal or a vehicle?")
        return phrase(rng, "photo_kind", questions, "animal" if name in ANIMALS else "vehicle")

    wordings = ("is this {}?", "is it {}?", "is there {}?")
    check = yes_no_maker(rng, "photo_is", wordings, [with_article(name)], [with_article(other) for other in others])
    # six classes of animals against four of vehicles
    kind_weight = 0.0 if name in ANIMALS and rng.random() < 1 / 3 else 0.6
    return [(4.0, naming), (1.2, check), (0.7, either), (kind_weight, kind)]


def _plural(name: str) -> str:
    return {"deer": "deer"}.get(name, f"{name}s")


def _mosaic_makers(rng: random.Random, names: list[str], places: tuple[str, ...]) -> list[tuple[float, TurnMaker]]:
    exists = yes_no_maker(
        rng,
        "mosaic_exists",
        ("is there {}?", "do you see {}?"),
        [with_article(name) for name in CLASS_NAMES if name in names],
        [with_article(name) for name in CLASS_NAMES if name not in names],
    )

    def count(rng: random.Random) -> Turn:
        groups: dict[int, list[str]] = {}
        for name in CLASS_NAMES:
            groups.setdefault(names.count(name), []).append(name)
        numbers = sorted(groups)
        number = rng.choices(numbers, [0.6 if number == 0 else 1.0 for number in numbers])[0]
        name = rng.choice(groups[number])
        questions = (f"how many show {with_article(name)}?", f"how many {_plural(name)} are there?")
        return phrase(rng, "mosaic_count", questions, str(number))

    def cell(rng: random.Random) -> Turn:
        index = rng.randrange(len(places))
        questions = (f"what is at the {places[index]}?", f"what does the {places[index]} picture show?")
        return phrase(rng, "mosaic_cell", questions, names[index])

    def where(rng: random.Random) -> Turn | None:
        lone = [index for index, name in enumerate(names) if names.count(name) == 1]
        if not lone:
            return None
        index = rng.choice(lone)
        return Turn("mosaic_where", f"where is the {names[index]}?", places[index])

    return [(1.0, exists), (1.0, count), (2.0, cell), (0.8, where)]


def render_photo(rng: random.Random, test: bool, image_size: int, turns: int, photos: Photographs) -> Sample:
    """Shows one photograph or a mosaic of four or nine, and asks about it."""
    split = "test" if test else "train"
    draw = rng.random()
    side = 1 if draw < SINGLE_SHARE else 2 if draw < SINGLE_SHARE + QUAD_SHARE else 3
    pool = rng.sample(CLASS_NAMES, rng.randint(1, 4) if side > 1 and rng.random() < 0.6 else len(CLASS_NAMES))
    names = [rng.choice(pool) for _ in range(side * side)]
    pictures = [photos.load(split, photos.choose(rng, split, name))[0] for name in names]
    if side == 1:
        image = _prepare(pictures[0], rng, test, image_size)
        caption, makers = f"a photo of {with_article(names[0])}.", _single_makers(rng, names[0])
    else:
        gap = rng.choice((0, 2, 4)) * image_size // REFERENCE_SIZE
        grey = rng.choice((0, 255, 128))
        image = Image.new("RGB", (image_size, image_size), (grey, grey, grey))
        edges = [round(index * (image_size + gap) / side) for index in range(side + 1)]
        for index, picture in enumerate(pictures):
            row, column = divmod(index, side)
            cell = _prepare(picture, rng, test, edges[1] - gap)
            image.paste(cell, (edges[column], edges[row]))
        rows = "; ".join(", ".join(names[start : start + side]) for start in range(0, side * side, side))
        caption, makers = f"{side * side} photos: {rows}.", _mosaic_makers(rng, names, PLACES[side])
    if rng.random() < 0.15:
        image = compress(image, rng.randint(60, 95))
    return Sample(image, "photos", caption, choose_turns(rng, makers, turns))


PHOTO_TASKS = (
    "photo_name", "photo_is", "photo_choice", "photo_kind",
    "mosaic_exists", "mosaic_count", "mosaic_cell", "mosaic_where",
)  # fmt: skip

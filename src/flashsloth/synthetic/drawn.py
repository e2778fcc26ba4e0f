"""Families drawn into files beforehand, by programs that are too slow to draw while a model trains."""

import functools
import io
import json
import multiprocessing
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from .augment import augment
from .sample import Glyph, Sample, Turn, split_id

SAMPLES_OF_A_FILE = 200


def _path(folder: Path, family: str, split: str, number: int) -> Path:
    return folder / f"{family}-{split}-{number:05d}.arrow"


def _row(sample: Sample) -> dict[str, Any]:
    buffer = io.BytesIO()
    sample.image.save(buffer, "PNG")
    rest = {
        "caption": sample.caption,
        "turns": [asdict(turn) for turn in sample.turns],
        "glyphs": [(glyph.character, round(glyph.x, 1), round(glyph.y, 1)) for glyph in sample.glyphs],
        "held_out": sample.held_out,
    }
    return {"image": buffer.getvalue(), "sample": json.dumps(rest)}


def _draw_file(number: int, folder: Path, family: str, split: str, options: dict[str, Any], seed: int) -> int:
    import pyarrow

    from .dataset import render

    path = _path(folder, family, split, number)
    if not path.exists():
        first = 2 * (seed * 10**9 + number * SAMPLES_OF_A_FILE) + split_id(split)
        rows = [_row(render(family, first + 2 * index, split, **options)) for index in range(SAMPLES_OF_A_FILE)]
        table = pyarrow.Table.from_pylist(rows)
        part = path.with_suffix(f".{os.getpid()}.part")
        with pyarrow.OSFile(str(part), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        part.replace(path)
    return SAMPLES_OF_A_FILE


def draw(
    family: str, folder: Path, count: int, split: str = "train", seed: int = 0, workers: int = 1, **options: Any
) -> Iterator[int]:
    """Draw at least `count` images of a family into a folder; files that are there already are kept.

    Args:
        workers: processes.
        options: of `render`: image_size, turns.

    Yields:
        images done, file by file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    one = functools.partial(_draw_file, folder=folder, family=family, split=split, options=options, seed=seed)
    numbers = range(-(-count // SAMPLES_OF_A_FILE))
    if workers <= 1:
        yield from map(one, numbers)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(one, numbers)


def drawn_families(folder: Path, families: Sequence[str], split: str) -> dict[str, "DrawnFamily"]:
    """Those of the families that a folder holds for a split.

    Raises:
        ValueError: it holds none of them.
    """
    found = {family: folder.glob(f"{family}-{split}-*.arrow") for family in families}
    drawn = {family: DrawnFamily(sorted(paths), family) for family, paths in found.items()}
    drawn = {family: images for family, images in drawn.items() if images.paths}
    if not drawn:
        raise ValueError(
            f"{folder} holds no drawn images of {', '.join(families)} ({split}); make them with: flashsloth data draw"
        )
    return drawn


class DrawnFamily:
    """Images of one family and split that `draw` has written; left out of pickles, and read as they are needed."""

    def __init__(self, paths: Sequence[Path], family: str) -> None:
        self.family, self.paths = family, list(paths)
        self._tables: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def __len__(self) -> int:
        return len(self.paths) * SAMPLES_OF_A_FILE

    def sample(self, rng: random.Random, turns: int) -> Sample:
        """A random image, with `turns` of its questions in random order, and degraded as rendered images are."""
        row = self._read(rng.randrange(len(self)))
        rest = json.loads(row["sample"].as_py())
        image = Image.open(io.BytesIO(row["image"].as_py())).convert("RGB")
        glyphs = [Glyph(*glyph) for glyph in rest["glyphs"]]
        image = augment(image, rng, image.getpixel((0, 0)), glyphs)
        asked = [Turn(**turn) for turn in rest["turns"]]
        rng.shuffle(asked)
        return Sample(image, self.family, rest["caption"], asked[:turns], rest["held_out"], glyphs)

    def _read(self, index: int) -> dict[str, Any]:
        import pyarrow

        number, row = divmod(index, SAMPLES_OF_A_FILE)
        if number not in self._tables:
            with pyarrow.memory_map(str(self.paths[number])) as file:
                self._tables[number] = pyarrow.ipc.open_file(file).read_all()
        table = self._tables[number]
        return {name: table.column(name)[row] for name in table.column_names}

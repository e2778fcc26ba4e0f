"""Families that `drawing` has drawn into files beforehand."""

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .augment import augment
from .sample import Glyph, Sample, Turn

SAMPLES_OF_A_FILE = 200


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

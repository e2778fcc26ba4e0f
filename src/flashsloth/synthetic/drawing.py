"""Draw families into files, for programs that are too slow to draw while a model trains."""

import functools
import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .dataset import render
from .drawn import SAMPLES_OF_A_FILE
from .sample import Sample, split_id


def _path(folder: Path, family: str, split: str, number: int) -> Path:
    return folder / f"{family}-{split}-{number:05d}.arrow"


def _row(sample: Sample) -> dict[str, Any]:
    buffer = io.BytesIO()
    sample.image.save(buffer, "PNG")
    rest = {
        "caption": sample.caption,
        # boxes would have to move with the image, which is rotated when it is read
        "turns": [asdict(replace(turn, boxes=())) for turn in sample.turns],
        "glyphs": [(glyph.character, round(glyph.x, 1), round(glyph.y, 1)) for glyph in sample.glyphs],
        "held_out": sample.held_out,
    }
    return {"image": buffer.getvalue(), "sample": json.dumps(rest)}


def _draw_file(number: int, folder: Path, family: str, split: str, options: dict[str, Any], seed: int) -> int:
    import pyarrow

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

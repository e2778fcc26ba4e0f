"""Sources with an index: rendered images, LLaVA files and data sets of messages."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from .broken import BrokenSamples
from .cache import EncodedSample, SampleCache
from .records import ReadRecord, RecordFile
from .rows import JsonRows, TableRows, json_files
from .schema import Origin, Record, Sample, make_record, named

if TYPE_CHECKING:
    from .recipe import LlavaData, MessagesData, SyntheticData


class SyntheticSamples(Dataset):
    """Rendered images with their questions; a new one for every index."""

    is_independent = True
    """Samples are drawn independently by index, so that reading in order is already random."""
    num_broken = 0

    def __init__(self, source: "SyntheticData", name: str, split: str, seed: int, image_size: int, turns: int) -> None:
        from ..synthetic import Photographs, SyntheticDataset

        self.name = name
        self.samples = SyntheticDataset(
            split=split,
            size=source.size,
            seed=seed + source.seed,
            weights=source.weights,
            image_size=image_size,
            turns=turns,
            photos=Photographs(resolve_folder(source.photos)),
            question_shares=source.question_shares,
            drawn=resolve_folder(source.drawn),
            absent_share=source.absent_share,
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        item = self.samples[index]
        metadata = {"family": item["family"], "tasks": item["tasks"], "answers": item["answers"]}
        metadata["glyphs"] = [(glyph.character, glyph.x, glyph.y) for glyph in item["glyphs"]]
        origin = Origin(self.name, f"rendered image {index} of {self.name}")
        return Sample(item["images"], item["messages"], item["caption"], metadata, origin)


class RecordedSamples(Dataset):
    """Records by index. Subclasses say how many there are and how one is read."""

    is_independent = False

    def __init__(self, source: "LlavaData | MessagesData", name: str) -> None:
        self.name = name
        self.max_images, self.max_pixels = source.max_images, source.max_pixels
        self.broken = BrokenSamples(source.max_broken)
        self.cache: SampleCache | None = None

    @property
    def num_broken(self) -> int:
        """Different broken samples met so far, in all worker processes of the loader."""
        return self.broken.count

    def __len__(self) -> int:
        raise NotImplementedError

    def record(self, index: int) -> Record:
        """One record, as it is stored."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record | EncodedSample:
        if self.cache is None:
            return self.record(index)
        known = self.cache.get(index)
        if known is not None:
            return known
        record = self.record(index)
        record.keep = partial(self.cache.put, index)
        return record

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Images and characters of every record, in order; images are not read."""
        for index in range(len(self)):
            record = self.record(index)
            yield len(record.images), record.num_characters

    def _record(self, read: ReadRecord, given: list[Any], folder: Path | None) -> Record:
        origin = Origin(self.name, named(read.place, read.value), self.broken)
        return record_of(origin, read, given, folder, self.max_images, self.max_pixels)


class LlavaSamples(RecordedSamples):
    """A LLaVA JSON or JSONL file.

    Raises:
        ValueError: no image folder, or a file that cannot be read; the message names it.
    """

    def __init__(self, source: "LlavaData", name: str = "data") -> None:
        super().__init__(source, name)
        self.image_folder = source.image_folder
        if not self.image_folder.is_dir():
            raise ValueError(f"image_folder {self.image_folder} is not a folder")
        self.records = RecordFile(source.path)

    def __len__(self) -> int:
        return len(self.records)

    def record(self, index: int) -> Record:
        read = self.records.read(index)
        return self._record(read, given_images(read.value, ("image", "images")), self.image_folder)


class MessagesSamples(RecordedSamples):
    """A data set of messages with an index: JSON files, or one of the library `datasets`.

    Raises:
        ValueError: it cannot be opened, or has no column of messages.
    """

    def __init__(self, source: "MessagesData", name: str = "data") -> None:
        super().__init__(source, name)
        self.image_folder = source.image_folder
        files = json_files(source.path)
        self.rows: JsonRows | TableRows = TableRows(source) if files is None else JsonRows(files)

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        read = self.rows.read(int(index))
        return self._record(read, given_images(read.value), self.image_folder)


def given_images(row: Any, keys: Sequence[str] = ("images", "image")) -> list[Any]:
    """Images of a record as it gives them, under the first of two names that has any."""
    images = next((row[key] for key in keys if row.get(key) is not None), None) if isinstance(row, Mapping) else None
    return [] if images is None else images if isinstance(images, list) else [images]


def record_of(
    origin: Origin, read: ReadRecord, given: list[Any], folder: Path | None, max_images: int, max_pixels: int
) -> Record:
    """A record from what was read of it; images that are given by name lie in `folder`."""
    names = [image.get("path") if isinstance(image, Mapping) else image for image in given]
    names = [name if isinstance(name, str) else None for name in names]
    images = [image_source(image, folder) for image in given]
    return make_record(origin, read.value, images, max_images, max_pixels, read.error, names)


def image_source(value: Any, folder: Path | None) -> Any:
    """What `load_image` may read: encoded bytes, a path that is never taken for a URL, or the value itself."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        return Path(value) if folder is None else folder / value
    return value


def resolve_folder(name: str | None) -> Path | None:
    """A folder given as a path or as `$VARIABLE`.

    Raises:
        ValueError: the variable is unset, or there is no such folder.
    """
    if name is None:
        return None
    if name.startswith("$"):
        value = os.environ.get(name[1:])
        if not value:
            raise ValueError(f"the recipe takes a folder from the environment variable {name[1:]}, which is not set")
    else:
        value = name
    folder = Path(value)
    if not folder.is_dir():
        raise ValueError(f"{name}: there is no folder {folder}")
    return folder

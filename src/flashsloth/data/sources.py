"""Sources with an index: rendered images, LLaVA files and data sets of messages."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from .broken import BrokenSamples
from .cache import EncodedSample, SampleCache
from .records import RecordFile
from .schema import Origin, Record, Sample, make_record

if TYPE_CHECKING:
    from .recipe import LlavaData, MessagesData, SyntheticData

# Readers of `datasets` by the ending of a file's name.
FILE_READERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
# Parts of a saved data set that is streamed; as many worker processes may share it.
STREAM_SHARDS = 64


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
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        item = self.samples[index]
        metadata = {"family": item["family"], "tasks": item["tasks"], "answers": item["answers"]}
        size = self.samples.image_size
        metadata["glyphs"] = [(glyph.character, glyph.x / size, glyph.y / size) for glyph in item["glyphs"]]
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

    def _record(self, place: str, raw: Any, images: list[Any], read_error: str | None = None) -> Record:
        origin = Origin(self.name, place, self.broken)
        return make_record(origin, raw, images, self.max_images, self.max_pixels, read_error)


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
        place = self.records.place(index)
        try:
            raw = self.records[index]
        except ValueError as error:
            return self._record(place, None, [], str(error))
        names: Any = []
        if isinstance(raw, Mapping):
            if raw.get("id") is not None:
                place = f"{place} (id {raw['id']})"
            names = raw.get("image")
            names = [] if names is None else names if isinstance(names, list) else [names]
        return self._record(place, raw, [image_source(name, self.image_folder) for name in names])


class MessagesSamples(RecordedSamples):
    """A data set of the library `datasets`, with an index.

    Raises:
        ValueError: it cannot be opened, or has no column of messages.
    """

    def __init__(self, source: "MessagesData", name: str = "data") -> None:
        super().__init__(source, name)
        self.path, self.image_folder = source.path, source.image_folder
        self.dataset = open_messages(source)

    def __len__(self) -> int:
        return len(self.dataset)

    def record(self, index: int) -> Record:
        return self.read(self.dataset[int(index)], index)

    def read(self, row: Mapping[str, Any], index: int) -> Record:
        """The record of a row."""
        place = f"{self.path}: row {index}" + (f" (id {row['id']})" if row.get("id") is not None else "")
        return self._record(place, row, row_images(row, self.image_folder))


def open_messages(source: "MessagesData") -> Any:
    """A `datasets.Dataset` (`IterableDataset` when streaming) whose images stay encoded.

    Raises:
        ValueError: there is no such data set, file or column.
    """
    import datasets

    path = Path(source.path)
    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            dataset = datasets.load_from_disk(str(path))
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[source.split]
            if source.streaming:
                dataset = dataset.to_iterable_dataset(num_shards=max(min(len(dataset), STREAM_SHARDS), 1))
        elif path.exists():
            files = _data_files(path)
            reader = FILE_READERS[files[0].suffix]
            dataset = datasets.load_dataset(
                reader,
                data_files={source.split: list(map(str, files))},
                split=source.split,
                streaming=source.streaming,
            )
        else:
            dataset = datasets.load_dataset(source.path, source.config, split=source.split, streaming=source.streaming)
    except (OSError, KeyError, datasets.exceptions.DatasetsError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"cannot open the data set {source.path} (split {source.split}): {error}") from error
    features = dataset.features
    if features is None:  # a stream of JSON lines does not know its columns before the first line
        return dataset
    if "messages" not in features and "conversations" not in features:
        raise ValueError(f"data set {source.path} has no column messages; it has {', '.join(features)}")
    for column in ("images", "image"):
        if isinstance(features.get(column), datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(features.get(column), "feature", None), datasets.Image):
            dataset = dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return dataset


def _data_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FILE_READERS)
    kinds = sorted({FILE_READERS.get(file.suffix, file.suffix) for file in files})
    if len(kinds) != 1 or kinds[0] not in FILE_READERS.values():
        found = ", ".join(kinds) or "none"
        raise ValueError(f"{path} must hold files of one kind among {', '.join(FILE_READERS)}; found {found}")
    return files


def row_images(row: Mapping[str, Any], folder: Path | None) -> list[Any]:
    """Images of a row of a data set: the column `images`, or `image`."""
    images = row.get("images")
    images = row.get("image") if images is None else images
    images = [] if images is None else images if isinstance(images, list) else [images]
    return [image_source(image, folder) for image in images]


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

"""Rows with messages: those of JSON files, and of what the library `datasets` reads."""

import copy
import itertools
import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import CONVERSATION_KEYS, ReadRecord, RecordFile

if TYPE_CHECKING:
    from .recipe import MessagesData

logger = logging.getLogger(__name__)

# Columns of a table that a record is made of.
COLUMNS = (*CONVERSATION_KEYS, "images", "image", "id")
# Readers by the ending of a file's name; those of tables are called as `datasets` does.
FILE_READERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
# Parts of a saved data set that is streamed; as many worker processes may share it.
STREAM_SHARDS = 64


class JsonRows:
    """Records of JSON and JSONL files, one file after the other, as they are written.

    Readers of tables would make dates of texts that look like some, and refuse files in which values differ in kind.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [RecordFile(file) for file in files]
        self._stops = list(itertools.accumulate(map(len, self.files)))
        check_first(self.read(0))

    def __len__(self) -> int:
        return self._stops[-1]

    def read(self, index: int) -> ReadRecord:
        number = bisect_right(self._stops, index)
        file = self.files[number]
        return file.read(index - self._stops[number] + len(file))


class TableRows:
    """Rows of a data set of the library `datasets`; images stay encoded."""

    def __init__(self, source: "MessagesData") -> None:
        self.path = source.path
        dataset = open_table(source)
        self.features = _without_decoding(dataset.features)
        self.table = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> ReadRecord:
        """A row, or why it cannot be read: a damaged file of a table shows where it is read."""
        place = f"{self.path}: row {index}"
        try:
            return ReadRecord(place, self.features.decode_example(self.table[index : index + 1].to_pylist()[0]))
        except Exception as error:  # of as many kinds as there are formats
            return ReadRecord(place, error=f"the row cannot be read: {error}")


def check_first(read: ReadRecord) -> None:
    """Refuse a file of other records than conversations.

    Raises:
        ValueError: the record has none.
    """
    if isinstance(read.value, Mapping) and not any(key in read.value for key in CONVERSATION_KEYS):
        raise ValueError(f"{read.place}: there is no column messages; it has {', '.join(map(str, read.value))}")


def json_files(path: str) -> list[Path] | None:
    """The JSON files that a path stands for, in order; None where it stands for something else.

    Raises:
        ValueError: a folder without data, or with files of several kinds.
    """
    if not Path(path).exists() or _is_saved(Path(path)):
        return None
    files = data_files(Path(path))
    return files if FILE_READERS[files[0].suffix.lower()] == "json" else None


def open_table(source: "MessagesData") -> Any:
    """A `datasets.Dataset` (`IterableDataset` when streaming) of the columns that records have.

    Raises:
        ValueError: there is no such data set, file or column.
    """
    import datasets

    path = Path(source.path)
    try:
        if _is_saved(path):
            dataset = datasets.load_from_disk(str(path))
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[source.split]
            if source.streaming:
                dataset = dataset.to_iterable_dataset(num_shards=max(min(len(dataset), STREAM_SHARDS), 1))
        elif path.exists():
            files = data_files(path)
            dataset = datasets.load_dataset(
                FILE_READERS[files[0].suffix.lower()],
                data_files={source.split: list(map(str, files))},
                split=source.split,
                streaming=source.streaming,
            )
        else:
            dataset = datasets.load_dataset(source.path, source.config, split=source.split, streaming=source.streaming)
    except Exception as error:  # of as many kinds as there are formats and servers
        raise ValueError(f"cannot open the data set {source.path} (split {source.split}): {error}") from error
    features = dataset.features
    if features is None:  # a stream of JSON lines does not know its columns before the first line
        return dataset
    if not any(key in features for key in CONVERSATION_KEYS):
        raise ValueError(f"data set {source.path} has no column messages; it has {', '.join(features)}")
    # what else a row holds, such as other pictures, is not read
    return dataset.select_columns([name for name in COLUMNS if name in features])


def _is_saved(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _without_decoding(features: Any) -> Any:
    """Features that leave images, wherever they are nested, as they are stored."""
    features = copy.deepcopy(features)
    pending = list(features.values())
    while pending:
        feature = pending.pop()
        if isinstance(feature, Mapping):
            pending += feature.values()
        elif isinstance(feature, (list, tuple)):
            pending += feature
        elif hasattr(feature, "feature"):
            pending.append(feature.feature)
        elif hasattr(feature, "decode"):
            feature.decode = False
    return features


def data_files(path: Path) -> list[Path]:
    """The data files that a path stands for, all of one kind, in order; of a folder also those in linked folders.

    Raises:
        ValueError: none, or files of several kinds.
    """
    files, others = ([path], Counter[str]()) if path.is_file() else _walk(path)
    kinds = sorted({FILE_READERS.get(file.suffix.lower(), file.suffix) for file in files})
    if len(kinds) != 1 or kinds[0] not in FILE_READERS.values():
        found = ", ".join(kinds) or "none"
        raise ValueError(f"{path} must hold files of one kind among {', '.join(FILE_READERS)}; found {found}")
    if others:
        counts = ", ".join(f"{count:,} x {suffix or 'without ending'}" for suffix, count in others.most_common(10))
        logger.warning("%s: files of other kinds than %s hold no records: %s", path, ", ".join(FILE_READERS), counts)
    return files


def _walk(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Data files below a folder, and how many others there are by the ending of their names."""
    files, others, known = [], Counter[str](), set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in known:  # a link to where the walk has been
            folders.clear()
            continue
        known.add(real)
        for name in names:
            file = Path(parent, name)
            if file.suffix.lower() in FILE_READERS:
                files.append(file)
            else:
                others[file.suffix.lower()] += 1
    return sorted(files), others

"""JSON and JSONL files, record by record."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .text_files import parse_json, require_file

LINES_SUFFIX = ".jsonl"
# What a record is known by: one alone may be all that a file holds.
CONVERSATION_KEYS = ("messages", "conversations")


class ReadRecord(NamedTuple):
    """What stands at one place of a file.

    Attributes:
        error: why there is no value.
    """

    place: str
    value: Any = None
    error: str | None = None


class RecordFile:
    """Records of a JSON list or of JSONL lines, parsed when they are asked for.

    A JSONL file stays on the disk. A JSON list is kept as text, which takes a fraction of the memory of parsed records
    and stays shared between the worker processes of a loader. A file of lines whose name ends in .json is one too.

    Raises:
        ValueError: unreadable file, JSON that is not valid or not a list, no record; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._text: bytes | None = None
        try:
            require_file(path)
            self.is_lines = path.suffix.lower() == LINES_SUFFIX or not self._read_list()
            if self.is_lines:
                self._find_lines()
        except OSError as error:
            raise ValueError(f"cannot read data file {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ValueError(f"cannot read data file {error}") from error
        if not len(self):
            raise ValueError(f"{path} must hold a non-empty list of records")

    def _find_lines(self) -> None:
        starts, stops, numbers = [], [], []
        for number, start, line in _lines(self.path):
            starts.append(start)
            stops.append(start + len(line))
            numbers.append(number)
        self._starts, self._stops = np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)
        self._numbers = np.array(numbers, dtype=np.int64)

    def _read_list(self) -> bool:
        """Keep the records of a JSON list; returns whether the file is one, and not lines."""
        data = self.path.read_bytes()
        try:
            records = parse_json(data)
        except ValueError as error:
            if _is_record_alone(data.split(b"\n", 1)[0]):
                return False
            raise ValueError(f"{self.path}: it is {error}") from error
        if _is_record(records):
            records = [records]
        if not isinstance(records, list):
            raise ValueError(f"{self.path}: it must hold a non-empty list of records, not {type(records).__name__}")
        try:
            texts = [json.dumps(record).encode() for record in records]
        except RecursionError as error:
            raise ValueError(f"{self.path}: it is not valid JSON: nested too deeply") from error
        self._stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._starts = self._stops - np.array([len(text) for text in texts], dtype=np.int64)
        self._text = b"".join(texts)
        return True

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        """File and record, to name it in messages."""
        return f"{self.path}: " + (f"line {self._numbers[index]}" if self.is_lines else f"record {index}")

    def __getitem__(self, index: int) -> Any:
        """The parsed record.

        Raises:
            ValueError: a line that is not valid JSON.
        """
        start, stop = int(self._starts[index]), int(self._stops[index])
        if self._text is not None:
            return parse_json(self._text[start:stop])
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(stop - start)
        try:
            return parse_json(line)
        except ValueError as error:
            raise ValueError(f"the line is {error}") from error

    def read(self, index: int) -> ReadRecord:
        """The record with its place, or what is wrong with it."""
        try:
            return ReadRecord(self.place(index), self[index])
        except (ValueError, OSError) as error:
            return ReadRecord(self.place(index), error=str(error))


def iterate_records(path: Path) -> Iterator[ReadRecord]:
    """The records of a file in order; a JSONL file is gone through once, without an index.

    Raises:
        ValueError: as `RecordFile`.
    """
    if path.suffix.lower() != LINES_SUFFIX:
        file = RecordFile(path)
        yield from map(file.read, range(len(file)))
        return
    require_file(path)
    for number, _, line in _lines(path):
        place = f"{path}: line {number}"
        try:
            yield ReadRecord(place, parse_json(line))
        except ValueError as error:
            yield ReadRecord(place, error=f"the line is {error}")


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and bytes of every line that is not empty; only a newline ends a line."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() not in (b"", codecs.BOM_UTF8):
                yield number, position, line
            position += len(line)


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in CONVERSATION_KEYS)


def _is_record_alone(line: bytes) -> bool:
    try:
        return _is_record(parse_json(line))
    except ValueError:
        return False

"""JSON and JSONL files, record by record."""

import json
from pathlib import Path
from typing import Any

import numpy as np


class RecordFile:
    """Records of a JSON list or of JSONL lines, parsed when they are asked for.

    A JSONL file stays on the disk. A JSON list is kept as text, which takes a fraction of the memory of parsed records
    and stays shared between the worker processes of a loader.

    Raises:
        ValueError: unreadable file, JSON that is not valid or not a list, no record; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_lines = path.suffix == ".jsonl"
        self._text: bytes | None = None
        try:
            if self.is_lines:
                self._find_lines()
            else:
                self._read_list()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read data file {path}: {error}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not len(self):
            raise ValueError(f"{path} must hold a non-empty list of records")

    def _find_lines(self) -> None:
        starts, stops, numbers, position = [], [], [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    starts.append(position)
                    stops.append(position + len(line))
                    numbers.append(number)
                position += len(line)
        self._starts, self._stops = np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)
        self._numbers = np.array(numbers, dtype=np.int64)

    def _read_list(self) -> None:
        records = json.loads(self.path.read_text(encoding="utf-8"))
        if not isinstance(records, list):
            raise ValueError(f"{self.path} must hold a non-empty list of records")
        texts = [json.dumps(record).encode() for record in records]
        self._stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._starts = self._stops - np.array([len(text) for text in texts], dtype=np.int64)
        self._text = b"".join(texts)

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
            return json.loads(self._text[start:stop])
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(stop - start)
        try:
            return json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"the line is not valid JSON: {error}") from error

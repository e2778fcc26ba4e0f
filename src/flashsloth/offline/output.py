"""The file of answers: one JSON line a record, added to batch by batch, whole after any kill."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.files import write_whole

SETTINGS_SUFFIX = ".settings.json"


class AnswerFile:
    """Lines of answers, and beside them the settings that made them.

    Args:
        path: JSONL file; made when absent. A last line that a kill cut short is removed.
        settings: what decides about the answers. A file made with others is refused, so that one file never mixes two
            models or two questions.

    Raises:
        ValueError: other settings, or a file that is not one of answers.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings_path = path.with_name(path.name + SETTINGS_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._check_settings(dict(settings))
        self.errors: dict[str, str] = {}
        self.done = self._read()
        self._file = path.open("ab")

    def _check_settings(self, settings: dict[str, Any]) -> None:
        if not self.path.exists():
            write_whole(self.settings_path, json.dumps(settings, indent=2) + "\n")
            return
        if not self.settings_path.exists():
            raise ValueError(
                f"{self.path} exists, but {self.settings_path.name} beside it does not; choose another output file"
            )
        before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.path} was begun with {name}={before.get(name)!r}, now it is {settings.get(name)!r}; "
                    "give the same, or another output file"
                )

    def _read(self) -> set[str]:
        if not self.path.exists():
            return set()
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        done: set[str] = set()
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                row = json.loads(line)
                done.add(row["id"])
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path}, line {number} is not an answer; choose another output file") from error
            if "error" in row:
                self.errors[row["id"]] = row["error"]
        return done

    def forget_errors(self) -> None:
        """Take the failed records out, so that they are asked again."""
        self._file.close()
        lines = [
            line for line in self.path.read_text(encoding="utf-8").splitlines() if "error" not in json.loads(line)
        ]
        write_whole(self.path, "".join(f"{line}\n" for line in lines))
        self.done -= self.errors.keys()
        self.errors = {}
        self._file = self.path.open("ab")

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines; on return they are with the operating system, so that a kill loses none."""
        rows = list(lines)
        start = self._file.tell()
        try:
            self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            self._file.flush()
        except OSError as error:
            os.ftruncate(self._file.fileno(), start)  # a full disk may have taken half a line
            raise OSError(error.errno, f"cannot write answers: {error.strerror}", str(self.path)) from error
        self.done.update(row["id"] for row in rows)
        self.errors.update({row["id"]: row["error"] for row in rows if "error" in row})

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

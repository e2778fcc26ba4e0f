"""The file of answers: one JSON line a record, added to batch by batch, whole after any kill."""

import contextlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..checkpoints.files import write_whole

SETTINGS_SUFFIX = ".settings.json"
LOCK_SUFFIX = ".lock"


class AnswerFile:
    """Lines of answers, and beside them the settings that made them.

    No other process may write the file meanwhile. A file without a line binds nobody: its settings are replaced, and
    it is removed again where nothing was added.

    Args:
        path: JSONL file; made when absent. A last line that a kill cut short is removed.
        settings: what decides about the answers. A file made with others is refused, so that one file never mixes two
            models or two questions.

    Attributes:
        done: what identifies the input of each answered or failed record (its field `input`), by id.
        errors: messages of the failed ones, by id.

    Raises:
        ValueError: other settings, a file that is not one of answers, or one that another run writes.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        path = Path(os.path.realpath(path))  # a link is one more name for a file, whose lock has one
        self.path = path
        self.settings_path = path.with_name(path.name + SETTINGS_SUFFIX)
        self.done: dict[str, str | None] = {}
        self.errors: dict[str, str] = {}
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no regular file; give the answers another output file")
        self._made_folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(path.name + LOCK_SUFFIX), timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(f"another run is writing {path}; wait for it, or give another output file") from error
        self._file: io.FileIO | None = None
        try:
            self._is_new = not path.exists()
            self._read()
            self._check_settings(dict(settings))
            self._file = self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> io.FileIO:
        return self.path.open("ab", buffering=0)  # what a buffer keeps after an error would be written by closing

    def _check_settings(self, settings: dict[str, Any]) -> None:
        if not self.done:
            write_whole(self.settings_path, json.dumps(settings, indent=2) + "\n")
            return
        try:
            before = json.loads(self.settings_path.read_bytes())
        except FileNotFoundError:
            before = None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.settings_path} is damaged; choose another output file") from error
        if not isinstance(before, dict):
            raise ValueError(
                f"{self.path} exists, but {self.settings_path.name} beside it does not; choose another output file"
            )
        if unknown := sorted(settings.keys() - before.keys()):
            raise ValueError(
                f"{self.path} was begun by an earlier version, which did not note {', '.join(unknown)}; "
                "choose another output file"
            )
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.path} was begun with {name}={before.get(name)!r}, now it is {settings.get(name)!r}; "
                    "give the same, or another output file"
                )

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                identifier, source, message = row["id"], row.get("input"), row.get("error")
                if not isinstance(identifier, str):
                    raise TypeError("an id is text")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(f"{self.path}, line {number} is not an answer; choose another output file") from error
            self.done[identifier] = source
            if message is not None:
                self.errors[identifier] = message
        if whole != len(data):
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def forget(self, ids: Iterable[str]) -> None:
        """Take records out, so that they are asked again; an error leaves the file as it was."""
        forgotten = set(ids)
        kept = [line for line in self.path.read_bytes().split(b"\n")[:-1] if json.loads(line)["id"] not in forgotten]
        write_whole(self.path, b"".join(line + b"\n" for line in kept).decode())
        if self._file is not None:
            self._file.close()  # of the file that was replaced
        self._file = self._open()
        self.done = {key: source for key, source in self.done.items() if key not in forgotten}
        self.errors = {key: error for key, error in self.errors.items() if key not in forgotten}

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines; on return they are with the operating system, so that a kill loses none.

        Raises:
            OSError: they cannot be written, as on a full disk; the file is as it was before.
        """
        assert self._file is not None, "closed"
        rows = list(lines)
        start = self._file.seek(0, os.SEEK_END)
        # half surrogate pairs, as in names of files that are not UTF-8, become the escapes that JSON has for them
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), start)  # a full disk may have taken half a line
            raise OSError(error.errno, f"cannot write answers: {error.strerror}", str(self.path)) from error
        self.done.update({row["id"]: row.get("input") for row in rows})
        self.errors.update({row["id"]: row["error"] for row in rows if "error" in row})

    def close(self) -> None:
        """Give the file free; leave nothing behind where nothing was added."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if self._is_new and self.path.exists() and self.path.stat().st_size == 0:
                self.path.unlink()
                self.settings_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a system that removes no open file
            Path(self._lock.lock_file).unlink()
        self._lock.release()
        for folder in self._made_folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

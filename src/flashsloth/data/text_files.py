"""Text and JSON of a user's files, as they are written: UTF-8, with or without a byte-order mark."""

import json
import os
from pathlib import Path
from typing import Any


def require_file(path: Path) -> None:
    """Refuse what cannot be read from its beginning to its end: a pipe would wait for a writer, a device never ends.

    Raises:
        ValueError: there is no such file, or it is no regular one.
    """
    if not os.path.exists(path):
        raise ValueError(f"{path}: there is no such file")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: it is no regular file")


def read_text(path: Path, max_bytes: int | None = None) -> str:
    """The text of a file, its line ends made newlines.

    Raises:
        ValueError: there is no such file, it is no regular one, larger than `max_bytes`, or not UTF-8.
    """
    require_file(path)
    try:
        size = path.stat().st_size
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"{path}: it has {size:,} bytes, more than the limit of {max_bytes:,}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from error


def printable(text: object, length: int) -> str:
    """Text for a line of a log: what a terminal cannot show is escaped, what is longer than `length` cut off."""
    shown = str(text)[: length + 1]
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in shown
    )
    return shown if len(shown) <= length else f"{shown[:length]}..."


def parse_json(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the reason, for a sentence that names the text.
    """
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid JSON: not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:  # also a number of thousands of digits
        raise ValueError(f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error

"""Files that appear whole or not at all, and JSON that others wrote."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# far above any configuration or index; what is larger is none, and would only fill the memory
LARGEST_JSON = 256 * 2**20


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path` and put it in place when it is whole; an error leaves `path` as it was."""
    staging = path.with_name(f"incomplete-{path.name}")  # the ending stays: libraries read the format from it
    try:
        write(staging)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Replace a file by one with this text, or leave it as it was."""
    replace_file(path, lambda staging: staging.write_text(text, encoding="utf-8"))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: there is no such file, or it holds no JSON object in UTF-8; the message names the file.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no regular file" if file.exists() else f"{file} does not exist")
    if file.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{file} is larger than {LARGEST_JSON} bytes; it cannot be what its name says")
    content = file.read_bytes()
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{file} is not valid JSON: it begins with a byte-order mark; save it as UTF-8 without one")
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_nan)
    except RecursionError as error:
        raise ValueError(f"{file} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:  # no UTF-8, no JSON, a number of more digits than Python reads
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _refuse_nan(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)  # infinities, which transformers itself writes


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, to be read by people too."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

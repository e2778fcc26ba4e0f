"""Files that appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


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

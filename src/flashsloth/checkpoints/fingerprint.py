"""What tells one model from another: the content of its files, wherever they lie and whatever they are called."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from . import hub
from .adapters import stack

# of weights, settings, vocabularies and templates
SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})
BLOCK_BYTES = 1 << 20


def fingerprint(name: str | os.PathLike[str]) -> str:
    """Changes with any byte of a model's weights, settings or vocabulary, those of what an adapter stands on included.

    Reads everything, about a second for two gigabytes; loading finds the files in memory then.

    Args:
        name: packaged model, folder or hub id.

    Raises:
        ValueError: no such model.
    """
    folder = hub.resolve(name)
    folders = stack(folder) if hub.is_adapter(folder) else [folder]
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        if path.suffix in SUFFIXES and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            _add(digest, path)
    return digest.hexdigest()[:16]


def _add(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)

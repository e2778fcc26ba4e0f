"""From the name of a model to a folder on this machine.

A name is a packaged model ("nano"), a local folder, or a Hugging Face hub id ("owner/name"), in this order. Only
safetensors, JSON and tokenizer files are ever downloaded or read: pickle checkpoints can run code when loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .folder import restore_replaced
from .untrusted import check_folder, read_config

ASSETS = Path(__file__).parent.parent / "assets"
PACKAGED_MODELS: dict[str, Path] = {"nano": ASSETS / "nano"}
CACHE_VARIABLE = "FLASHSLOTH_CACHE"
ADAPTER_CONFIG = "adapter_config.json"

_CONFIG_FILES = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model")
_WEIGHT_FILES = ("*.safetensors",)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def cache_folder() -> Path:
    """Where converted checkpoints are kept: $FLASHSLOTH_CACHE, or `flashsloth` in the user's cache folder."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashsloth"


def resolve(name: str | os.PathLike[str]) -> Path:
    """The folder of a FlashSloth model, or of an adapter for one.

    An authors' checkpoint is converted into the cache first, once.

    Args:
        name: packaged model, local folder, or hub id.

    Raises:
        ValueError: no such model, or a folder that is none; the message says what to do.
    """
    folder = locate(name)
    if is_adapter(folder):
        return folder
    if not _is_official(read_config(folder)):
        return folder
    return _converted(folder)


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder of a model or checkpoint as it is, downloaded if `name` is a hub id.

    Raises:
        ValueError: no such model, or a folder without config.json and safetensors.
    """
    text = os.fspath(name)
    if text in PACKAGED_MODELS:
        folder = PACKAGED_MODELS[text]
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"the packaged model {text!r} is not in this installation ({folder}); install flashsloth again, or "
                "give --model a folder or a hub id"
            )
    else:
        folder = _as_path(text)
        restore_replaced(folder)
        if not folder.is_dir():
            folder = _download(text)
    _check_files(folder)
    check_folder(folder)
    return folder


def _as_path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError(
            f"no model {text!r}: give a packaged model ({', '.join(PACKAGED_MODELS)}), a folder or a hub id"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no model {text!r}: {error}") from error


def _is_official(config: dict[str, Any]) -> bool:
    from .official_format import is_official

    return is_official(config)


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder} holds pickle weights ({pickles[0]}), which can run code when loaded and are refused; save the "
            "model as safetensors first"
        )
    present = f"an {ADAPTER_CONFIG}" if is_adapter(folder) else "a config.json"
    raise ValueError(f"{folder} has {present} but no *.safetensors weights")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    known = ", ".join(PACKAGED_MODELS)
    unknown = f"no model {name!r}: it is not packaged ({known}), not a folder"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{unknown}, and not a hub id (owner/name)")
    try:
        return Path(snapshot_download(name, allow_patterns=[*_CONFIG_FILES, *_WEIGHT_FILES]))
    except HFValidationError as error:
        raise ValueError(f"{unknown}, and not a hub id (owner/name)") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{unknown}, and not on the hub, or private: run `hf auth login`") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{unknown}, and the hub cannot be reached and has not been before ({reason})") from error


def _fingerprint(folder: Path) -> str:
    """Changes when a file of the checkpoint does; reads no weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            status = path.stat()
            digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _converted(source: Path) -> Path:
    """The cached conversion of an authors' checkpoint; a half-written one is never seen under its final name."""
    from .convert_official import convert_checkpoint

    parent = cache_folder() / "converted"
    destination = parent / _fingerprint(source)
    if (destination / "config.json").is_file():
        return destination
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="unfinished-") as workplace:
        unfinished = Path(workplace) / "model"
        convert_checkpoint(source, unfinished)
        try:
            unfinished.rename(destination)
        except OSError:
            # Another process finished first, or an old broken folder stands in the way.
            if not (destination / "config.json").is_file():
                shutil.rmtree(destination, ignore_errors=True)
                unfinished.rename(destination)
    return destination

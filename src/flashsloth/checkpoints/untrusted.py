"""What is read of a folder that others made: JSON and safetensors in it. Never pickles, code, or files elsewhere."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from .files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# What transformers and peft read of a folder beside weights and vocabularies.
SETTINGS = (
    CONFIG,
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "audio_tokenizer_config.json",
    "adapter_config.json",
)
_CODE_KEY = "auto_map"
_FETCHED_CODE_KEYS = ("attn_implementation", "experts_implementation")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        ValueError: the file is no JSON object.
    """
    return read_json(folder / CONFIG)


def check_folder(folder: Path) -> None:
    """Refuse, before a library reads the folder, settings that would lead it to code or to files elsewhere.

    Raises:
        ValueError: a settings file that is no JSON object; weights or vocabularies that are no plain names of files in
            the folder, or no safetensors; the message names the file.
    """
    for path in folder.iterdir():
        if path.exists() and not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is no regular file")
    for name in SETTINGS:
        if (folder / name).exists():
            _check_settings(folder / name, read_json(folder / name))
    if (folder / INDEX).exists():
        read_weight_map(folder)


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    if file.name.startswith("audio_tokenizer") or settings.get("audio_tokenizer") is not None:
        raise ValueError(f"{file} names an audio tokenizer in another folder, which is refused; remove the entry")
    for key, value in entries(settings):
        if key == "transformers_weights" and value is not None:
            raise ValueError(f"{file} names its weights itself ({key}); remove the key and name them {WEIGHTS}")
        if key.endswith(_FETCHED_CODE_KEYS) and any("/" in name for name in _strings(value)):
            raise ValueError(f"{file} names code to be fetched ({key} {value!r}), which is refused; remove the key")
        if file.name == "tokenizer_config.json" and key.endswith("_file") and isinstance(value, str):
            _check_plain(file, value)


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys of nested objects, with their values."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _strings(value: Any) -> Iterator[str]:
    for item in value.values() if isinstance(value, dict) else [value]:
        if isinstance(item, str):
            yield item


def _check_plain(file: Path, name: str) -> None:
    # Windows' rules know both separators and drives; a name that is plain there is plain everywhere.
    if PureWindowsPath(name).name != name or name in (".", "..") or "\0" in name:
        raise ValueError(f"{file} names {name!r}, which is no plain name of a file in its folder; this is refused")


def read_weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, by its name in the index of sharded weights.

    Raises:
        ValueError: an index that is none; shards that are missing, no safetensors, or not in the folder.
    """
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; download the checkpoint again")
    files = set()
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise ValueError(f"{index} names {file!r} for {tensor}, which is no name of a file")
        files.add(file)
    for file in sorted(files):
        _check_plain(index, file)
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {file!r}, which is no safetensors file; pickles can run code when they are opened and "
                "are refused; save the model as safetensors first"
            )
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; download the checkpoint again")
    return weight_map


def code_hint(folder: Path) -> str:
    """A sentence for an error, where the folder asks for Python code of its own to be run; else nothing."""
    for name in SETTINGS:
        if not (folder / name).is_file():
            continue
        for key, value in entries(read_json(folder / name)):
            if key == _CODE_KEY and value:
                return (
                    f" (the folder asks for Python code of its own in {name}, {_CODE_KEY}: a folder's code is never "
                    "run here; use a model whose classes transformers or this package has)"
                )
    return ""

"""Checkpoint folders on disk: safetensors read one tensor at a time, folders that appear complete or not at all."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "mm_projector.bin")


class TensorFolder:
    """The tensors of a folder of safetensors, read one at a time.

    Raises:
        ValueError: no safetensors, only pickles, a shard that is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: folder / file for name, file in self._weight_map().items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in sorted(set(self._files.values())):
            with self._open(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - not iterable itself
                    if self._files.get(name) == file:
                        piece = handle.get_slice(name)
                        self.shapes[name] = tuple(piece.get_shape())
                        empty = piece[:0] if self.shapes[name] else handle.get_tensor(name)
                        self.dtypes[name] = empty.dtype
        lost = sorted(self._files.keys() - self.shapes.keys())
        if lost:
            raise ValueError(f"{folder / INDEX} lists tensors its shards do not hold: {', '.join(lost)}.")

    def _weight_map(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{self.folder / INDEX} has no weight_map; download the checkpoint again.")
            missing = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
            if missing:
                raise ValueError(f"{self.folder} lacks {', '.join(missing)}; download the checkpoint again.")
            return weight_map
        if (self.folder / WEIGHTS).is_file():
            with self._open(self.folder / WEIGHTS) as handle:
                return dict.fromkeys(handle.keys(), WEIGHTS)
        pickles = [name for name in PICKLES if (self.folder / name).exists()] or sorted(
            path.name for path in self.folder.glob("*.bin")
        )
        if pickles:
            raise ValueError(
                f"{self.folder} holds its weights as a pickle ({', '.join(pickles)}), which can run code when it is "
                "opened; save them as safetensors first."
            )
        raise ValueError(f"{self.folder} holds neither {WEIGHTS} nor {INDEX}.")

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file ({error}); download it again.") from error

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._files[name]) as handle:
            return handle.get_tensor(name)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names the file when it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}, not a JSON object.")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    if destination.resolve() == source.resolve() or source.resolve() in destination.resolve().parents:
        raise ValueError(f"The destination {destination} lies in the source; give another folder.")
    if destination.resolve() in source.resolve().parents:
        raise ValueError(f"The source lies in the destination {destination}; give another folder.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise ValueError(f"{destination} is not empty; give another folder, or overwrite=True to replace it.")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file; give a folder.")


def write_folder(destination: Path, overwrite: bool, write: Callable[[Path], None], num_bytes: int) -> Path:
    """Let `write` fill a folder beside `destination`, then put it in its place in one step."""
    parent = destination.resolve().parent
    partial = parent / f".{destination.name}.partial-{os.getpid()}"
    retired = parent / f".{destination.name}.replaced-{os.getpid()}"
    made_parents = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"{num_bytes} bytes are needed, {free} are free")
        write(partial)
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if overwrite and destination.exists():
            destination.rename(retired)
        partial.rename(destination)
        _flush(parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if retired.exists() and not destination.exists():
            retired.rename(destination)
        for folder in made_parents:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        code = _error_number(error)
        if code is not None:
            reason = "the disk is full" if code == errno.ENOSPC else "writing failed"
            raise OSError(code, f"Cannot write {destination}: {reason} ({error}). Nothing was left behind.") from error
        raise
    shutil.rmtree(retired, ignore_errors=True)
    return destination


def _error_number(error: BaseException) -> int | None:
    """What the system refused, None for other errors. safetensors and tokenizers say it in words only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, Exception) and (number := re.search(r"\(os error (\d+)\)", str(error))):
        return int(number[1])
    return errno.EIO if isinstance(error, OSError | SafetensorError) else None


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, where the system can (Windows cannot for folders)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoint folders on disk: safetensors read one tensor at a time, folders that appear complete or not at all."""

import ctypes
import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .untrusted import INDEX, WEIGHTS, check_folder, read_weight_map

logger = logging.getLogger(__name__)

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "mm_projector.bin")

# of renameat2 (Linux) and renamex_np (macOS): swap two names in one step
_RENAME_EXCHANGE = _RENAME_SWAP = 2
_CURRENT_FOLDER = -100  # AT_FDCWD of Linux


class TensorFolder:
    """The tensors of a folder of safetensors, read one at a time.

    Raises:
        ValueError: no safetensors, only pickles, a shard that is missing, unreadable or not in the folder.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder = folder
        self._files = {name: folder / file for name, file in self._weight_map().items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            with open_safetensors(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - not iterable itself
                    if self._files.get(name) == file:
                        self.shapes[name] = tuple(handle.get_slice(name).get_shape())
        if not self.shapes:
            raise ValueError(f"{folder / WEIGHTS} holds no tensors; download it again.")
        lost = sorted(self._files.keys() - self.shapes.keys())
        if lost:
            raise ValueError(f"{folder / INDEX} lists tensors its shards do not hold: {', '.join(lost)}.")

    def _weight_map(self) -> dict[str, str]:
        # in the order of `from_pretrained`, so that both read the same weights
        if (self.folder / WEIGHTS).is_file():
            with open_safetensors(self.folder / WEIGHTS) as handle:
                return dict.fromkeys(handle.keys(), WEIGHTS)
        if (self.folder / INDEX).is_file():
            return read_weight_map(self.folder)
        pickles = [name for name in PICKLES if (self.folder / name).exists()] or sorted(
            path.name for path in self.folder.glob("*.bin")
        )
        if pickles:
            raise ValueError(
                f"{self.folder} holds its weights as a pickle ({', '.join(pickles)}), which can run code when it is "
                "opened; save them as safetensors first."
            )
        raise ValueError(f"{self.folder} holds neither {WEIGHTS} nor {INDEX}.")

    @property
    def num_bytes(self) -> int:
        """Of all files that hold the tensors."""
        return sum(file.stat().st_size for file in set(self._files.values()))

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of all tensors, which are not read."""
        dtypes = {}
        for file in sorted(set(self._files.values())):
            with open_safetensors(file) as handle:
                for name in [name for name in self.shapes if self._files[name] == file]:
                    piece = handle.get_slice(name)[:0] if self.shapes[name] else handle.get_tensor(name)
                    dtypes[name] = piece.dtype
        return dtypes

    def __getitem__(self, name: str) -> Tensor:
        with open_safetensors(self._files[name]) as handle:
            return handle.get_tensor(name)


def open_safetensors(file: Path) -> Any:
    """A file of safetensors whose header is in order.

    Raises:
        ValueError: it is missing, damaged or something else.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no regular file" if file.exists() else f"{file} does not exist")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}); download it again.") from error


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and its folders."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuse, before any work, a folder that cannot or must not be written.

    Raises:
        ValueError: it lies in the source or around it, is a file, or holds something that must not be replaced.
    """
    restore_replaced(destination)
    if destination.resolve() == source.resolve() or source.resolve() in destination.resolve().parents:
        raise ValueError(f"The destination {destination} lies in the source; give another folder.")
    if destination.resolve() in source.resolve().parents:
        raise ValueError(f"The source lies in the destination {destination}; give another folder.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise ValueError(f"{destination} is not empty; give another folder, or overwrite=True to replace it.")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file; give a folder.")


def restore_replaced(folder: Path) -> None:
    """Put back what stood under this name, where a command was killed between taking it away and replacing it."""
    if folder.exists():
        return
    place = folder.resolve()
    retired = sorted(place.parent.glob(f".{_escape(place.name)}.replaced-*"))
    if retired:
        logger.warning("%s was being replaced when a command was killed; the former folder is put back", folder)
        retired[-1].rename(place)


def write_folder(destination: Path, overwrite: bool, write: Callable[[Path], None], num_bytes: int) -> Path:
    """Let `write` fill a folder beside `destination`, then put it in its place in one step.

    A process that is killed leaves the former folder or the new one under that name, whole.
    """
    place = destination.resolve()
    parent = place.parent
    partial = parent / f".{place.name}.partial-{os.getpid()}"
    retired = parent / f".{place.name}.replaced-{os.getpid()}"
    made_parents = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    if remains := sorted(path.name for path in parent.glob(f".{_escape(place.name)}.partial-*")):
        logger.warning(
            "%s holds what a killed command, or one that still runs, has written: %s; if none runs, remove it",
            parent,
            ", ".join(remains),
        )
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"{num_bytes} bytes are needed, {free} are free")
        write(partial)
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if not overwrite or not place.exists():
            partial.rename(place)
        elif not _exchange(partial, place):
            place.rename(retired)
            partial.rename(place)  # where a process dies just before, `restore_replaced` mends it
        _flush(parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if retired.exists() and not place.exists():
            retired.rename(place)
        for folder in made_parents:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        code = _error_number(error)
        if code is not None:
            reason = "the disk is full" if code == errno.ENOSPC else "writing failed"
            raise OSError(code, f"Cannot write {destination}: {reason} ({error}). Nothing was left behind.") from error
        raise
    for former in (partial, retired):
        shutil.rmtree(former, ignore_errors=True)
    return destination


def _escape(name: str) -> str:
    """A name as a pattern of `glob` that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        return hasattr(libc, "renamex_np") and libc.renamex_np(*names, _RENAME_SWAP) == 0
    if not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _RENAME_EXCHANGE) == 0


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

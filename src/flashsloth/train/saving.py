"""Folders that appear whole or not at all, and a clear word when the disk is full."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A writer that fails for want of space leaves less than this: files are written in pieces that are smaller.
FULL_BYTES = 2**20


@contextmanager
def staged(folder: Path, remove: bool = True) -> Iterator[None]:
    """Inside, files are written to `folder`; an error removes what was written of it.

    Args:
        remove: False in processes that write beside the one that owns the folder.

    Raises:
        OSError: the disk is full; one sentence, whatever library noticed it.
    """
    try:
        yield
    except Exception as error:
        is_full = _is_full(error, folder)
        if remove:
            shutil.rmtree(folder, ignore_errors=True)
        if is_full:
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: cannot write {folder} ({type(error).__name__}: {error}). Nothing of it was left "
                "behind and the last checkpoint is whole; make room, then continue with --resume",
            ) from error
        raise


def replace_folder(source: Path, destination: Path) -> None:
    """Put `source` in the place of `destination`, which is removed first where it exists."""
    shutil.rmtree(destination, ignore_errors=True)
    os.replace(source, destination)


def _is_full(error: Exception, folder: Path) -> bool:
    """Libraries say it in words of their own, and torch not at all; then the file system is asked."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC or "os error 28" in str(error):
        return True
    return folder.exists() and shutil.disk_usage(folder).free < FULL_BYTES

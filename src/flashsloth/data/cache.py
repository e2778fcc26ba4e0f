"""Encoded samples in memory that the workers of a loader share, so that later epochs read and encode nothing again."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

logger = logging.getLogger(__name__)

MEGABYTE = 2**20
_SHARED_MEMORY = Path("/dev/shm")
_USABLE_SHARE = 0.5  # of the shared memory that is free; batches travel in it too


@dataclass(frozen=True)
class EncodedSample:
    """A sample that was encoded in an earlier epoch: arrays by name, without padding, pixels of all its images."""

    arrays: dict[str, np.ndarray]


class SampleCache:
    """Keeps samples until it is full; what it has once, it keeps. Pages are taken as they are filled.

    Args:
        samples: how many there are.
        megabytes: of all samples together.
        writers: worker processes; each fills its share, all read everything.
    """

    def __init__(self, samples: int, megabytes: int, writers: int) -> None:
        size, writers = megabytes * MEGABYTE, max(writers, 1)
        if _SHARED_MEMORY.is_dir():
            usable = int(shutil.disk_usage(_SHARED_MEMORY).free * _USABLE_SHARE)
            if usable < size:
                size = usable
                logger.warning(
                    "loader.cache_mb: %d is lowered to %d, half of what is free in %s",
                    megabytes,
                    size // MEGABYTE,
                    _SHARED_MEMORY,
                )
        self.share = size // writers
        self._block = _shared_bytes(self.share * writers)
        self._used = torch.zeros(writers, dtype=torch.int64).share_memory_()
        self._starts = torch.zeros(samples, dtype=torch.int64).share_memory_()
        self._lengths = torch.zeros(samples, dtype=torch.int64).share_memory_()  # 0: not kept
        self._is_full = False  # as far as this process is concerned

    def get(self, index: int) -> EncodedSample | None:
        """The sample, where it is kept."""
        length = int(self._lengths[index])
        if not length:
            return None
        start = int(self._starts[index])
        return EncodedSample(pickle.loads(self._block.numpy()[start : start + length]))

    def put(self, index: int, arrays: Mapping[str, Any]) -> None:
        """Keep a sample, if there is room."""
        if self._is_full or self._lengths[index]:
            return
        worker = get_worker_info()
        writer = 0 if worker is None else worker.id
        data = pickle.dumps(dict(arrays), protocol=pickle.HIGHEST_PROTOCOL)
        used = int(self._used[writer])
        if used + len(data) > self.share:
            self._is_full = True
            return
        start = writer * self.share + used
        self._block.numpy()[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
        self._used[writer] = used + len(data)
        self._starts[index] = start
        self._lengths[index] = len(data)  # last: from here on others read it


def _shared_bytes(size: int) -> Tensor:
    """Memory shared with every process that gets it, without touching it."""
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def split_rows(batch: Mapping[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """The rows of a batch that is padded at its end, without their padding, each with the pixels of its images."""
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    pixels = arrays.pop("pixel_values", None)
    counts = arrays.pop("image_token_counts", None)
    rows, first_image = [], 0
    for row, mask in enumerate(arrays["attention_mask"]):
        length = int(mask.sum())
        found = {}
        for name, values in arrays.items():
            if name.endswith("_positions"):
                found[name] = values[row][values[row] >= 0]
            else:
                found[name] = values[row, :length]
        images = len(found.get("image_positions", ()))
        if pixels is not None and images:
            found["pixel_values"] = pixels[first_image : first_image + images]
        if counts is not None:
            found["image_token_counts"] = counts[first_image : first_image + images]
        first_image += images
        rows.append(found)
    return rows

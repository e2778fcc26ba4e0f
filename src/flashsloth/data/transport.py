"""How a batch travels from a loader's worker process to the one that trains: as a single block of shared memory.

torch hands every tensor over by itself, and the worker has to answer for each while it makes the next batch.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; that of torch's own allocations


class Batch(dict[str, Tensor]):
    """Tensors by name; a plain dict where it arrives."""


class _Place(NamedTuple):
    name: str
    start: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, block: Tensor) -> Tensor:
        """The tensor that lies in the block."""
        size = self.shape.numel() * self.dtype.itemsize
        return block[self.start : self.start + size].view(self.dtype).view(self.shape)


def _unpack(places: list[_Place], block: Tensor) -> dict[str, Tensor]:
    return {place.name: place.of(block) for place in places}


def _pack(batch: Batch) -> tuple[Callable[..., dict[str, Tensor]], tuple[list[_Place], Tensor]]:
    places, end = [], 0
    for name, tensor in batch.items():
        places.append(_Place(name, end, tensor.dtype, tensor.shape))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(end, dtype=torch.uint8).share_memory_()
    for place, tensor in zip(places, batch.values(), strict=True):
        place.of(block).copy_(tensor)
    return _unpack, (places, block)


ForkingPickler.register(Batch, _pack)

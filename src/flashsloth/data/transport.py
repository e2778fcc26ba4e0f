"""How a batch travels from a loader's worker process to the one that trains: as a single block of shared memory.

torch hands every tensor over by itself, and the worker has to answer for each while it makes the next batch. New
shared memory costs both sides more than what is written into it; so a worker that may (`Batch.slots`) writes into a
few blocks in turn, which the other side knows already and copies from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; that of torch's own allocations
# Of a block that is used again. Each worker keeps some, and for larger batches new memory hardly counts.
_LARGEST_SLOT = 2**26
_ROOM = 1.25  # of a slot for the batch that it is made for: the next may be longer


class Batch(dict[str, Tensor]):
    """Tensors by name; a plain dict where it arrives.

    Args:
        slots: how many blocks a worker may use in turn: one more than the batches that it makes ahead of those that
            have arrived. None: a new one for every batch.
    """

    def __init__(self, tensors: Mapping[str, Tensor], slots: int | None = None) -> None:
        super().__init__(tensors)
        self.slots = slots


class _Place(NamedTuple):
    name: str
    start: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, block: Tensor) -> Tensor:
        """The tensor that lies in the block."""
        size = self.shape.numel() * self.dtype.itemsize
        return block[self.start : self.start + size].view(self.dtype).view(self.shape)


class _Slot(NamedTuple):
    process: int
    number: int


_own: dict[int, Tensor] = {}
"""Blocks of this process, a worker, by the number of their slot."""
_known: dict[_Slot, Tensor] = {}
"""Blocks of workers, where their batches arrive."""
_batches = 0


def forget_slots() -> None:
    """Let go of the blocks of workers that have ended."""
    _known.clear()


def _unpack(places: list[_Place], block: Tensor) -> dict[str, Tensor]:
    return {place.name: place.of(block) for place in places}


def _unpack_slot(places: list[_Place], size: int, slot: _Slot, block: Tensor | None) -> dict[str, Tensor]:
    if block is not None:
        _known[slot] = block
    return _unpack(places, _known[slot][:size].clone())


def _pack(batch: Batch) -> tuple[Callable[..., dict[str, Tensor]], tuple]:
    places, end = [], 0
    for name, tensor in batch.items():
        places.append(_Place(name, end, tensor.dtype, tensor.shape))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    if batch.slots is None or end > _LARGEST_SLOT:
        block = torch.empty(end, dtype=torch.uint8).share_memory_()
        _fill(block, places, batch)
        return _unpack, (places, block)
    global _batches
    number = _batches % batch.slots
    _batches += 1
    known = _own.get(number)
    is_new = known is None or known.numel() < end
    if is_new:
        _own[number] = torch.empty(int(_ROOM * end), dtype=torch.uint8).share_memory_()
    _fill(_own[number], places, batch)
    return _unpack_slot, (places, end, _Slot(os.getpid(), number), _own[number] if is_new else None)


def _fill(block: Tensor, places: list[_Place], batch: Batch) -> None:
    for place, tensor in zip(places, batch.values(), strict=True):
        place.of(block).copy_(tensor)


ForkingPickler.register(Batch, _pack)

"""A batch from a loader's worker: the same tensors, in one block."""

import random

import pytest
import torch
from torch.utils.data import DataLoader

from flashsloth.data import transport
from flashsloth.data.transport import Batch

TENSORS = {
    "input_ids": torch.arange(15).view(3, 5),
    "mask": torch.tensor([[True, False, True]]),
    "nothing": torch.empty(0, 4),
    "pixel_values": torch.randn(2, 3, 5, 7).transpose(2, 3),
    "half": torch.randn(3, dtype=torch.bfloat16),
    "number": torch.tensor(2.5, dtype=torch.float64),
}


def make(items: list[int]) -> Batch:
    return Batch(TENSORS)


def test_tensors_come_out_of_a_worker_as_they_went_in_and_share_a_block() -> None:
    (batch,) = DataLoader([0], collate_fn=make, num_workers=1)
    assert type(batch) is dict and list(batch) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert batch[name].dtype == tensor.dtype and batch[name].shape == tensor.shape, name
        assert torch.equal(batch[name], tensor), name
        batch[name].add_(1) if tensor.dtype != torch.bool else None  # it may be written into, as any batch
    assert len({tensor.untyped_storage().data_ptr() for tensor in batch.values()}) == 1
    assert torch.equal(batch["number"], TENSORS["number"] + 1), "no tensor lies over another"


class Growing:
    """Batches whose sizes vary, all of them numbers that tell which batch it is."""

    def __init__(self, slots: int | None) -> None:
        self.slots = slots

    def __call__(self, items: list[int]) -> Batch:
        (index,) = items
        length = random.Random(index).randint(1, 50_000)
        return Batch({"ids": torch.full((length,), index), "pixels": torch.full((3, 5), index / 2)}, self.slots)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_in_reused_blocks_stay_as_they_arrived(start: str, workers: int) -> None:
    prefetch = 2
    loader = DataLoader(
        range(60),
        collate_fn=Growing(prefetch + 1),
        num_workers=workers,
        prefetch_factor=prefetch,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    transport.forget_slots()
    for _ in range(2):
        batches = list(loader)  # all of them are held on to
        for index, batch in enumerate(batches):
            expected = Growing(None)([index])
            assert torch.equal(batch["ids"], expected["ids"]) and torch.equal(batch["pixels"], expected["pixels"])
        assert len(transport._known) == workers * (prefetch + 1)
    iterator = iter(loader)
    next(iterator)  # an epoch that is left
    assert [int(batch["ids"][0]) for batch in loader] == list(range(60))
    transport.forget_slots()
    assert not transport._known


def test_a_batch_larger_than_a_slot_may_be_gets_a_block_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_LARGEST_SLOT", 64 * 8)
    transport.forget_slots()
    loader = DataLoader(range(6), collate_fn=Growing(3), num_workers=1)
    assert [int(batch["ids"][0]) for batch in loader] == list(range(6))
    assert not transport._known

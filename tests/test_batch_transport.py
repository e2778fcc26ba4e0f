"""A batch from a loader's worker: the same tensors, in one block."""

import torch
from torch.utils.data import DataLoader

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

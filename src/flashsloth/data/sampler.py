"""The order in which samples are drawn when batches are grouped by modality and length."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

# Characters that make one token, roughly: lengths only sort the samples.
CHARACTERS_PER_TOKEN = 4


class ModalityLengthSampler(Sampler[int]):
    """Every batch has samples with images or samples without, of similar length; the batches come in random order.

    An optimiser step (`batch_size` x `batches_per_step` samples) holds one modality and similar lengths. What is left
    of a modality fills whole batches at the end; a last incomplete batch of each modality is left out, others every
    epoch.

    Args:
        sizes: images and characters of every sample, as a source's `sizes()`.
        num_image_tokens: visual tokens of one image.
        batch_size: samples of one forward pass of one process.
        batches_per_step: processes times accumulated batches.

    Raises:
        ValueError: neither modality fills one batch.
    """

    def __init__(
        self,
        sizes: Iterable[tuple[int, int]],
        num_image_tokens: int,
        batch_size: int,
        batches_per_step: int,
        seed: int,
    ) -> None:
        table = np.array(list(sizes), dtype=np.int64).reshape(-1, 2)
        self.lengths = table[:, 0] * num_image_tokens + table[:, 1] // CHARACTERS_PER_TOKEN
        self.modalities = [np.flatnonzero(table[:, 0] > 0), np.flatnonzero(table[:, 0] == 0)]
        self.batch_size, self.batches_per_step, self.seed, self.epoch = batch_size, batches_per_step, seed, 0
        if not len(self):
            raise ValueError(
                f"group_by: modality_length has {len(self.modalities[0])} samples with and {len(self.modalities[1])} "
                f"without images, and batch_size is {batch_size}: neither fills a batch"
            )

    def set_epoch(self, epoch: int) -> None:
        """Draw another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(indices) // self.batch_size * self.batch_size for indices in self.modalities)

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.default_rng((self.seed, self.epoch)).integers(2**63))
        generator = torch.Generator().manual_seed(seed)
        step_size = self.batch_size * self.batches_per_step
        steps: list[list[int]] = []
        rest: list[list[int]] = []
        for indices in self.modalities:
            if not len(indices):
                continue
            lengths = self.lengths[indices].tolist()
            order = indices[get_length_grouped_indices(lengths, step_size, generator=generator)].tolist()
            order = order[: len(order) // self.batch_size * self.batch_size]
            whole = len(order) // step_size * step_size
            steps += [order[start : start + step_size] for start in range(0, whole, step_size)]
            rest += [order[start : start + self.batch_size] for start in range(whole, len(order), self.batch_size)]
        for chunks in (steps, rest):
            for index in torch.randperm(len(chunks), generator=generator).tolist():
                yield from chunks[index]

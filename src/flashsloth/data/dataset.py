"""Map-style datasets over the sources of a recipe."""

import logging
import multiprocessing
import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from .schema import Sample, llava_sample, read_records

if TYPE_CHECKING:
    from ..train.recipe import DataRecipe, LlavaData, StageRecipe, SyntheticData

logger = logging.getLogger(__name__)


class SyntheticSamples(Dataset):
    """Rendered images with their questions; a new one for every index."""

    is_independent = True
    """Samples are drawn independently by index, so that reading in order is already random."""

    def __init__(self, source: "SyntheticData", split: str, seed: int, image_size: int, turns: int) -> None:
        from ..synthetic import Photographs, SyntheticDataset

        self.samples = SyntheticDataset(
            split=split,
            size=source.size,
            seed=seed + source.seed,
            weights=source.weights,
            image_size=image_size,
            turns=turns,
            photos=Photographs(resolve_folder(source.photos)),
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        item = self.samples[index]
        metadata = {"family": item["family"], "tasks": item["tasks"], "answers": item["answers"]}
        return Sample(item["images"], item["messages"], item["caption"], metadata)


class LlavaSamples(Dataset):
    """A LLaVA file. A broken record is counted, named and returned as None, up to `max_broken`, then refused."""

    is_independent = False

    def __init__(self, source: "LlavaData") -> None:
        self.path, self.image_folder, self.max_broken = source.path, source.image_folder, source.max_broken
        if not self.image_folder.is_dir():
            raise ValueError(f"image_folder {self.image_folder} is not a folder")
        self.records = read_records(self.path)
        # shared by the loader's worker processes; forked or sent along when they start
        self._num_broken = multiprocessing.get_context("fork").Value("q", 0)

    @property
    def num_broken(self) -> int:
        """Broken records met so far, in all worker processes."""
        return self._num_broken.value

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample | None:
        record = self.records[index]
        try:
            return llava_sample(record, self.image_folder)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            name = record.get("id", index) if isinstance(record, dict) else index
            with self._num_broken.get_lock():
                self._num_broken.value += 1
                count = self._num_broken.value
            message = f"{self.path}: record {index} (id {name}) is broken: {error}"
            if count > self.max_broken:
                raise ValueError(
                    f"{message}; that is broken sample number {count} and max_broken is {self.max_broken}. "
                    "Repair the data, or raise max_broken to skip them."
                ) from error
            logger.warning("%s; skipped (%d of at most %d)", message, count, self.max_broken)
            return None


def resolve_folder(name: str | None) -> Path | None:
    """A folder given as a path or as `$VARIABLE`.

    Raises:
        ValueError: the variable is unset, or there is no such folder.
    """
    if name is None:
        return None
    if name.startswith("$"):
        value = os.environ.get(name[1:])
        if not value:
            raise ValueError(f"the recipe takes a folder from the environment variable {name[1:]}, which is not set")
    else:
        value = name
    folder = Path(value)
    if not folder.is_dir():
        raise ValueError(f"{name}: there is no folder {folder}")
    return folder


def build_dataset(source: "DataRecipe", stage: "StageRecipe", seed: int, image_size: int) -> Dataset:
    """The training dataset of a stage."""
    if source.kind == "synthetic":
        return SyntheticSamples(source, "train", seed, image_size, turns=stage.turns or 1)
    return LlavaSamples(source)

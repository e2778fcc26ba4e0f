"""The project's own held-out sets as tasks of lmms-eval, one a family of images, drawn anew at every run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..data.sources import resolve_folder
from ..synthetic import Photographs, SyntheticDataset, exact_match
from ..synthetic.dataset import DEFAULT_FAMILIES, TEST_ONLY_FAMILIES
from .synthetic import majority_answers

try:
    from lmms_eval.api.task import ConfigurableMessagesTask
except ImportError as error:
    from .harness_hint import HINT

    raise ImportError(HINT) from error

SPLIT = "test"
IMAGE = "image"


class Documents(Sequence[dict[str, Any]]):
    """Questions of rendered images, as lmms-eval reads a dataset; questions about one image share its object.

    Args:
        rows: fields of each question without its image.
        images: the image of each.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], images: Sequence[Any] | None) -> None:
        self.rows, self.images = rows, images
        self.features = {name: None for row in rows[:1] for name in row} | ({} if images is None else {IMAGE: None})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        return row if self.images is None else {**row, IMAGE: self.images[index]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def without_images(self) -> Documents:
        """The same rows, for steps that need no picture."""
        return Documents(self.rows, None)


class HeldOutTask(ConfigurableMessagesTask):
    """Questions about one family of the mixture that `evaluate-synthetic` asks about, scored by exact match.

    Args:
        config: of a YAML file beside this module. `metadata` names `family` and may set `images` (of the whole
            mixture), `seed`, `turns`, `image_size`, `absent_share`, `majority_images` and `photos`, a folder of
            CIFAR-10's parquet files.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        settings = dict(config or {})
        settings.pop("class", None)
        super().__init__(config=settings)

    def download(self, dataset_kwargs: Any = None) -> None:
        """Draw the images."""
        options = self.config.metadata
        family, images = options["family"], options.get("images", 1200)
        mixture = DEFAULT_FAMILIES if family in DEFAULT_FAMILIES else (family,)
        rows, shown = [], []
        data = self._dataset(SPLIT, images, options.get("seed", 0), mixture)
        for index in range(images):
            if data.family(index) != family:
                continue
            sample = data.sample(index)
            for turn in sample.turns:
                rows.append(
                    {
                        "question": turn.question,
                        "answer": turn.answer,
                        "kind": f"{family}/{turn.task}",
                        "held_out": sample.held_out,
                        "index": index,
                    }
                )
                shown.append(sample.image)
        if not rows:
            raise ValueError(f"none of {images} images is of the family {family}; ask for more")
        documents = Documents(rows, shown)
        self.dataset = {SPLIT: documents}
        self.dataset_no_image = {SPLIT: documents.without_images()}

    def _dataset(self, split: str, images: int, seed: int, mixture: Sequence[str]) -> SyntheticDataset:
        options = self.config.metadata
        size = {"image_size": options["image_size"]} if options.get("image_size") else {}
        return SyntheticDataset(
            split,
            images,
            seed,
            dict.fromkeys(mixture, 1.0),
            turns=options.get("turns", 6),
            photos=Photographs(resolve_folder(options.get("photos"))) if "photos" in mixture else None,
            absent_share=options.get("absent_share", 0.0),
            **size,
        )

    def frequent_answers(self) -> list[str]:
        """For each question, the answer that is most frequent for its kind in the training split."""
        options = self.config.metadata
        family, seed = options["family"], options.get("seed", 0)
        mixture = DEFAULT_FAMILIES if family in DEFAULT_FAMILIES else (family,)
        split, first = (SPLIT, seed + 1) if family in TEST_ONLY_FAMILIES else ("train", seed)
        data = self._dataset(split, options.get("majority_images", 2000), first, mixture)
        answers = majority_answers(data, family)
        return [answers.get(row["kind"], "") for row in self.dataset_no_image[SPLIT]]


def shown(doc: Mapping[str, Any]) -> list[Any]:
    """The image of a question."""
    return [doc[IMAGE]]


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match after normalisation, as `flashsloth.synthetic.exact_match`."""
    return {"exact_match": float(exact_match(results[0], doc["answer"]))}

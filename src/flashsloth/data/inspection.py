"""What is wrong with one record, and how long it is for each stage that learns from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from .collator import Collator, Measure, NoLabelError
from .schema import IMAGE_TYPES, Defect, Record, Sample


@dataclass
class Inspection:
    """Findings about one record.

    Attributes:
        measures: by stage, where the record can be encoded.
    """

    place: str
    identifier: str | None
    num_images: int
    defects: list[Defect] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)


def inspect_record(record: Record | Sample, collators: Mapping[str, Collator]) -> Inspection:
    """Read every image, and encode the text for every stage.

    Args:
        collators: by name of the stage.
    """
    if isinstance(record, Sample):
        place = record.origin.place if record.origin is not None else "a sample"
        inspection = Inspection(place, None, len(record.images))
        sample: Sample | None = record
    else:
        inspection = Inspection(record.origin.place, record.identifier, len(record.images), list(record.defects))
        sample = None if record.defects else _without_pixels(record)
        for index, source in enumerate(record.images):
            if not isinstance(source, IMAGE_TYPES):
                continue
            try:
                record.load_image(index)
            except FileNotFoundError as error:
                inspection.defects.append(Defect("missing image", str(error)))
            except ValueError as error:
                inspection.defects.append(Defect("unreadable image", str(error)))
    if sample is None:
        return inspection
    for stage, collator in collators.items():
        try:
            inspection.measures[stage] = collator.measure(sample)
        except NoLabelError as error:
            inspection.defects.append(Defect("no label", f"stage {stage}: {error}"))
        except ValueError as error:
            inspection.defects.append(Defect("unfit for a stage", f"stage {stage}: {error}"))
    return inspection


def _without_pixels(record: Record) -> Sample:
    """The sample with an empty image in place of each, which is all that measuring needs."""
    answers = [message["content"][0]["text"] for message in record.messages if message["role"] == "assistant"]
    images = [Image.new("RGB", (1, 1)) for _ in record.images]
    return Sample(images, record.messages, answers[0], {}, record.origin)


class Inspector(Dataset):
    """Inspections of chosen records of a source, for a loader with worker processes."""

    def __init__(self, source: Any, indices: Any, collators: Mapping[str, Collator]) -> None:
        self.source, self.indices, self.collators = source, indices, dict(collators)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Inspection:
        return inspect_record(self.source[int(self.indices[index])], self.collators)

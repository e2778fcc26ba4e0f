"""From records to answered batches: images decoded in worker processes, each picture encoded once a batch."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BatchFeature

from ..model.compressors import select_images
from ..model.image_decoding import shorten
from ..model.processing_flashsloth import FlashSlothProcessor
from .guide import Guide
from .runtime import Runtime
from .structured import FREE, AnswerForm

logger = logging.getLogger(__name__)

# Batches are cut from a sorted stretch of this many batches: rows of one batch then have prompts of like length.
SORTED_BATCHES = 16
LONGEST_ERROR = 1000  # characters


@dataclass(frozen=True)
class Record:
    """One question about some images.

    Attributes:
        id: unique in the whole input; what a resumed run goes by.
        images: paths, URLs, data URLs, encoded bytes or PIL images.
        question: the user's text.
    """

    id: str
    images: tuple[Any, ...]
    question: str


@dataclass
class PreparedBatch:
    """A batch ready for the model.

    Attributes:
        records: the rows of `inputs`, in order.
        inputs: prompts without pixels.
        pixel_values: (I, V, C, H, W), every different picture once.
        image_index: for every image of the batch in reading order, its place in `pixel_values`.
        token_counts: visual tokens of the same; None for the model's default.
        errors: (record, message) of the records that cannot be asked.
    """

    records: list[Record] = field(default_factory=list)
    inputs: BatchFeature | None = None
    pixel_values: Tensor | None = None
    image_index: list[int] = field(default_factory=list)
    token_counts: Tensor | None = None
    errors: list[tuple[Record, str]] = field(default_factory=list)


def plan_batches(records: Sequence[Record], batch_size: int) -> list[list[int]]:
    """Indices of each batch: neighbours in number of images and length of question, near each other in the input."""
    stretch = batch_size * SORTED_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(records), stretch):
        indices = list(range(start, min(start + stretch, len(records))))
        indices.sort(key=lambda index: (len(records[index].images), len(records[index].question)))
        batches += [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    return batches


class BatchPreparation(Dataset):
    """Item i is the i-th planned batch; made for a DataLoader with `batch_size=None` and worker processes."""

    def __init__(
        self,
        records: Sequence[Record],
        batches: Sequence[Sequence[int]],
        processor: FlashSlothProcessor,
        limit: int,
        visual_tokens: int | None = None,
    ) -> None:
        self.records, self.batches, self.processor, self.limit = records, batches, processor, limit
        self.visual_tokens = visual_tokens

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> PreparedBatch:
        records = [self.records[row] for row in self.batches[index]]
        return prepare(records, self.processor, self.limit, self.visual_tokens)


def prepare(
    records: Sequence[Record], processor: FlashSlothProcessor, limit: int, visual_tokens: int | None = None
) -> PreparedBatch:
    """Decode, resize and tokenise; a record that fails is named and left out.

    Args:
        limit: longest prompt in tokens.
        visual_tokens: of every image; None for the model's default.
    """
    batch = PreparedBatch()
    pixels: list[Tensor] = []
    places: dict[Any, int] = {}
    inputs: BatchFeature | None = None
    lengths: list[int] = []
    with contextlib.suppress(ValueError):  # of a prompt that cannot be made; found below, one by one
        inputs = _prompts(records, processor, visual_tokens)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
    for row, record in enumerate(records):
        mark = len(pixels)
        try:
            row_index = []
            for image in record.images:
                key = image if isinstance(image, (str, bytes)) else id(image)
                if key not in places:
                    pixels.append(processor.image_processor([image], return_tensors="pt")["pixel_values"])
                    places[key] = len(pixels) - 1
                row_index.append(places[key])
            if inputs is not None:
                tokens = lengths[row]
            else:
                tokens = _prompts([record], processor, visual_tokens)["input_ids"].shape[1]
            if tokens > limit:
                raise ValueError(f"the prompt has {tokens} tokens, the model's context leaves room for {limit}")
        except (OSError, ValueError) as error:
            batch.errors.append((record, shorten(" ".join(str(error).split()), LONGEST_ERROR)))
            del pixels[mark:]
            places = {key: place for key, place in places.items() if place < mark}
            continue
        batch.records.append(record)
        batch.image_index += row_index
    if batch.records:
        if inputs is None or batch.errors:
            inputs = _prompts(batch.records, processor, visual_tokens)
        batch.inputs = inputs
        batch.token_counts = inputs.pop("image_token_counts", None)
    if pixels:
        batch.pixel_values = torch.cat(pixels)
    return batch


def _prompts(records: Sequence[Record], processor: FlashSlothProcessor, visual_tokens: int | None) -> BatchFeature:
    conversations = []
    for record in records:
        content: list[dict[str, Any]] = [{"type": "image"} for _ in record.images]
        conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": record.question}]}])
    return processor.apply_chat_template(
        conversations,
        return_pixel_values=False,
        visual_tokens=visual_tokens,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )


@torch.inference_mode()
def answer(
    session: Runtime, batch: PreparedBatch, max_new_tokens: int, form: AnswerForm = FREE
) -> list[dict[str, Any]]:
    """One line of output a record, errors included; greedy. An answer that is cut before its form is complete is one.

    A batch that does not fit the accelerator's memory is halved, with a warning, until it does.

    Raises:
        torch.OutOfMemoryError: a single record does not fit.
        ValueError: a form that cannot be used, or not with this model.
    """
    lines: list[dict[str, Any]] = [{"id": record.id, "error": message} for record, message in batch.errors]
    if batch.inputs is None:
        return lines
    try:
        return lines + _answer_rows(session, batch, slice(None), max_new_tokens, form)
    except torch.OutOfMemoryError:
        rows = len(batch.records)
        if rows == 1:
            raise
        torch.accelerator.empty_cache()
        logger.warning("a batch of %d does not fit the memory; asking it row by row (lower --batch-size)", rows)
    for row in range(rows):
        lines += _answer_rows(session, batch, slice(row, row + 1), max_new_tokens, form)
    return lines


def _answer_rows(
    session: Runtime, batch: PreparedBatch, rows: slice, max_new_tokens: int, form: AnswerForm
) -> list[dict[str, Any]]:
    assert batch.inputs is not None
    model, features = session.model, None
    guide = Guide(session, form, model.generation_config, {})
    records = batch.records[rows]
    inputs = {name: value[rows].to(session.device) for name, value in batch.inputs.items()}
    first = sum(len(record.images) for record in batch.records[: rows.start or 0])
    index = batch.image_index[first : first + sum(len(record.images) for record in records)]
    if batch.pixel_values is not None and index:
        used = sorted(set(index))
        features_IPE = session.encode_views(batch.pixel_values[used].to(model.dtype))
        order = torch.tensor([used.index(place) for place in index], device=session.device)
        if batch.token_counts is None:
            features = select_images(model.model.compress_images(features_IPE), order)
        else:
            counts = batch.token_counts[first : first + len(index)]
            features = model.model.compress_images(features_IPE[order], counts)
    prompt_tokens = inputs["input_ids"].shape[1]
    compiled = session.compile_options(prompt_tokens + max_new_tokens)
    ids = session.generate(
        **inputs,
        **compiled,
        image_features=features,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=guide.logits_processors(),
        stopping_criteria=guide.stopping_criteria(),
    )
    answers = ids[:, prompt_tokens:]
    texts = guide.texts(answers)
    confidences = guide.confidences(answers, texts, inputs, features)
    lines: list[dict[str, Any]] = []
    for record, text, problem, probability in zip(
        records, texts, guide.problems(len(texts)), confidences, strict=True
    ):
        if problem is not None:
            lines.append({"id": record.id, "error": problem})
            continue
        line = {"id": record.id, "question": record.question, "answer": text}
        lines.append(line if probability is None else {**line, "confidence": probability})
    return lines

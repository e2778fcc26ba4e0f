"""From records to the tensors of a training step."""

import dataclasses
import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..model.processing_flashsloth import NO_LIMIT
from .cache import EncodedSample, split_rows
from .glyphs import glyph_tensor
from .packing import IGNORED_LABEL, pack
from .schema import Record, Sample, count_images
from .transport import Batch

if TYPE_CHECKING:
    from ..model.processing_flashsloth import FlashSlothProcessor

logger = logging.getLogger(__name__)


class Measure(NamedTuple):
    """Tokens and turns of a sample before and after what does not fit is cut off, and its images after that."""

    length: int
    kept_length: int
    turns: int
    kept_turns: int
    kept_images: int


class NoLabelError(ValueError):
    """There is nothing to learn from a sample: no token of it is an answer's."""


class Collator:
    """Loads images, renders the stage's template, tokenises, pads and labels a batch.

    Runs in the loader's worker processes. A broken sample is named, counted and left out: the batch is smaller by it,
    nothing takes its place.

    Args:
        template: `plain` (captions) or `chat` (conversations).
        max_length: longest sample in tokens. A longer conversation loses whole turns from its end, a longer caption
            its last words.
        pad_to_multiple_of: lengths are rounded up to this, so that fewer distinct shapes are compiled.
        packing: `rows`: lay the samples into as few rows of `max_length` as they need; `single_row`: into one row.
        chat_template_kwargs: variables of the chat template.
        with_glyphs: add `glyphs`, the characters written on every image, which rendered samples know.
        slots: of a worker, as `Batch`.
    """

    def __init__(
        self,
        processor: "FlashSlothProcessor",
        template: str,
        max_length: int,
        pad_to_multiple_of: int | None = None,
        packing: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        with_glyphs: bool = False,
        slots: int | None = None,
    ) -> None:
        if packing not in (None, "rows", "single_row"):
            raise ValueError(f"packing is {packing!r}; use rows, single_row or None")
        self.processor = processor
        self.template = template
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.packing = packing
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.with_glyphs = with_glyphs
        self.slots = slots

    def __call__(self, items: Sequence[Record | Sample | EncodedSample]) -> Batch:
        """Batch tensors as `FlashSlothForConditionalGeneration.forward` takes them, with labels.

        When no sample of the batch can be used, one row without labels stands for it, which adds nothing to loss or
        gradients.

        Raises:
            ValueError: more samples are broken than their source allows.
        """
        known = {place: item.arrays for place, item in enumerate(items) if isinstance(item, EncodedSample)}
        loaded = (
            (place, item.load() if isinstance(item, Record) else item)
            for place, item in enumerate(items)
            if not isinstance(item, EncodedSample)
        )
        samples = {place: sample for place, sample in loaded if sample is not None}
        batch = self._encode_usable(samples)
        fresh = {}
        if batch is not None and (known or any(sample.keep for sample in samples.values())):
            fresh = dict(zip(samples, split_rows(batch), strict=True))
            for place, row in fresh.items():
                if keep := samples[place].keep:
                    keep(row)
        if known:
            rows = known | fresh
            batch = dict(self.processor.pad([rows[place] for place in sorted(rows)], **self._padding()))
        if batch is None:
            logger.warning("no sample of a batch can be used; it counts for nothing")
            batch = self._empty_batch()
        return Batch(self._pack(batch), self.slots)

    def _encode_usable(self, samples: dict[int, Sample]) -> dict[str, Tensor] | None:
        """A batch of those that can be used; the others are counted and taken out. None where none can."""
        while samples:
            try:
                batch = self.encode(list(samples.values()))
            except ValueError:
                broken = [place for place, sample in samples.items() if not self._is_usable(sample)]
                if not broken:
                    raise
                for place in broken:
                    del samples[place]
            else:
                if self.with_glyphs:
                    place = self.processor.image_processor.place_in_view
                    batch["glyphs"] = glyph_tensor(
                        [
                            [(character, *place(sample.images[0].size, x, y)) for character, x, y in glyphs]
                            for sample in samples.values()
                            for glyphs in [sample.metadata["glyphs"]]
                        ]
                    )
                return batch
        return None

    def encode(self, samples: Sequence[Sample], with_pixels: bool = True) -> dict[str, Tensor]:
        """A padded batch of whole samples.

        Raises:
            NoLabelError: a sample of which no token is to be learned.
            ValueError: a sample that does not fit the template, or whose first turn is longer than `max_length`.
        """
        if self.template == "plain":
            batch = self._encode_captions(samples, with_pixels)
        else:
            batch = self._encode_conversations(samples, with_pixels)
        _check_labels(batch["labels"])
        return batch

    def marks_answers(self) -> bool:
        """Whether the stage's template says of any conversation which of it is to be learned."""
        try:
            batch = self._blank_batch()
        except ValueError:
            return True  # it refuses a question about one image; what it makes of the data is for the data to show
        return bool(_has_label(batch["labels"]).all())

    def is_usable(self, item: Record | Sample) -> bool:
        """Whether a sample can be learned from; one that cannot is counted.

        Raises:
            ValueError: more samples are broken than their source allows.
        """
        sample = item.load() if isinstance(item, Record) else item
        return sample is not None and self._is_usable(sample)

    def _is_usable(self, sample: Sample) -> bool:
        try:
            self.encode([sample], with_pixels=False)
        except ValueError as error:
            if sample.origin is None:
                raise
            sample.origin.skip(error)
            return False
        return True

    def _options(self, samples: Sequence[Sample], with_pixels: bool) -> dict[str, Any]:
        options = {"return_labels": True, "return_pixel_values": with_pixels, **self._padding()}
        if choices := self.processor.visual_token_choices:
            options["visual_tokens"] = [count for sample in samples for count in _drawn_counts(sample, choices)]
        return options

    def _padding(self) -> dict[str, Any]:
        # right padding: under causal attention no token then looks at padding
        return {
            "return_tensors": "pt",
            "padding": True,
            "padding_side": "right",
            # packed rows are rounded up as a whole
            "pad_to_multiple_of": None if self.packing else self.pad_to_multiple_of,
        }

    def measure(self, sample: Sample) -> Measure:
        """Length and turns of a sample, before and after what does not fit is cut off. Images are not processed.

        Raises:
            ValueError: as `encode`.
        """
        if self.template == "plain":
            whole = self._encode_captions([sample], with_pixels=False, max_length=NO_LIMIT)
            (length,) = whole["attention_mask"].sum(-1).tolist()
            if length > self.max_length:
                self._encode_captions([sample], with_pixels=False)  # refuses a cut into the image
            _check_labels(whole["labels"][:, : self.max_length])
            return Measure(length, min(length, self.max_length), 1, 1, len(sample.images))
        batch = self._apply_template([sample], with_pixels=False)
        (length,) = self._lengths(batch)
        (cut,), (kept_length,) = self._cut([sample], [length])
        _check_labels((batch if cut is sample else self._apply_template([cut], with_pixels=False))["labels"])
        turns, kept_turns = (
            sum(message["role"] == "user" for message in messages) for messages in (sample.messages, cut.messages)
        )
        return Measure(length, kept_length, turns, kept_turns, len(cut.images))

    def _encode_captions(
        self, samples: Sequence[Sample], with_pixels: bool, max_length: int | None = None
    ) -> dict[str, Tensor]:
        captions = []
        for sample in samples:
            if sample.caption is None or len(sample.images) != 1:
                raise ValueError(f"template: plain needs one image and a caption, got {len(sample.images)} images")
            captions.append(sample.caption)
        batch = self.processor.encode_captions(
            captions,
            images=[sample.images for sample in samples] if with_pixels else None,
            truncation=True,
            max_length=max_length or self.max_length,
            **self._options(samples, with_pixels),
        )
        return dict(batch)

    def _encode_conversations(self, samples: Sequence[Sample], with_pixels: bool) -> dict[str, Tensor]:
        batch = self._apply_template(samples, with_pixels)
        lengths = self._lengths(batch)
        if max(lengths) <= self.max_length:
            return batch
        return self._apply_template(self._cut(samples, lengths)[0], with_pixels)

    def _cut(self, samples: Sequence[Sample], lengths: Sequence[int]) -> tuple[list[Sample], list[int]]:
        """Samples without the turns that do not fit, and their lengths."""
        samples, lengths = list(samples), list(lengths)
        while max(lengths) > self.max_length:
            samples = [
                self._without_last_turn(sample, length) if length > self.max_length else sample
                for sample, length in zip(samples, lengths, strict=True)
            ]
            lengths = self._lengths(self._apply_template(samples, with_pixels=False))
        return samples, lengths

    @staticmethod
    def _lengths(batch: Mapping[str, Tensor]) -> list[int]:
        return batch["attention_mask"].sum(-1).tolist()

    def _apply_template(self, samples: Sequence[Sample], with_pixels: bool) -> dict[str, Tensor]:
        images = [image for sample in samples for image in sample.images]
        batch = self.processor.apply_chat_template(
            [sample.messages for sample in samples],
            images=images if images and with_pixels else None,
            tokenize=True,
            return_dict=True,
            max_length=NO_LIMIT,  # too long a conversation is cut by whole turns
            **self._options(samples, with_pixels),
            **self.chat_template_kwargs,
        )
        return dict(batch)

    def _without_last_turn(self, sample: Sample, length: int) -> Sample:
        last = max(index for index, message in enumerate(sample.messages) if message["role"] == "user")
        messages = sample.messages[:last]
        if not any(message["role"] == "user" for message in messages):
            raise ValueError(f"its first turn alone has {length} tokens, more than max_length {self.max_length}")
        logger.debug("dropped the last turn of a conversation of %d tokens (max_length %d)", length, self.max_length)
        return dataclasses.replace(sample, messages=messages, images=sample.images[: count_images(messages)])

    def _blank_batch(self) -> dict[str, Tensor]:
        """A row about a blank image that takes every path through the model."""
        question = [{"type": "image"}, {"type": "text", "text": "?"}]
        answer = [{"type": "text", "text": "."}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        blank = Sample([Image.new("RGB", (1, 1))], messages, caption=".")
        if self.template == "plain":
            return self._encode_captions([blank], True, max_length=NO_LIMIT)
        return self._apply_template([blank], True)

    def _empty_batch(self) -> dict[str, Tensor]:
        """A row whose labels are ignored."""
        batch = self._blank_batch()
        batch["labels"].fill_(IGNORED_LABEL)
        return batch

    def _pack(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.packing is None:
            return batch
        pad = self.processor.tokenizer.pad_token_id
        longest = max(self.max_length, batch["input_ids"].shape[1])  # the row of an empty batch may be longer
        return pack(batch, longest, pad, self.pad_to_multiple_of, single_row=self.packing == "single_row")


def _drawn_counts(sample: Sample, choices: Sequence[int]) -> list[int]:
    """Visual tokens of a sample's images, one number for all of them, drawn by what the sample says.

    Every process, and a run that is resumed, then draws the same; so does a conversation without its last turns.
    """
    text = repr((sample.caption, sample.messages[:2])).encode("utf-8", "surrogatepass")
    return [choices[zlib.crc32(text) % len(choices)]] * len(sample.images)


def _has_label(labels_BT: Tensor) -> Tensor:
    """Whether each row teaches anything, (B,) bool. Nothing predicts a row's first token, whatever its label."""
    return (labels_BT[:, 1:] != IGNORED_LABEL).any(-1)


def _check_labels(labels_BT: Tensor) -> None:
    if not bool(_has_label(labels_BT).all()):
        raise NoLabelError(
            "it has no label: the template marks no token of it as an answer's, or max_length leaves none"
        )

"""From samples to the tensors of a training step."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..model.processing_flashsloth import NO_LIMIT
from .schema import Sample

if TYPE_CHECKING:
    from ..model.processing_flashsloth import FlashSlothProcessor

logger = logging.getLogger(__name__)


class Collator:
    """Renders the stage's template, tokenises, pads and labels a batch.

    Runs in the loader's worker processes. Samples that are None (broken ones, already named) are left out.

    Args:
        template: `plain` (captions) or `chat` (conversations).
        max_length: longest row in tokens. A longer conversation loses whole turns from its end, a longer caption its
            last words.
        pad_to_multiple_of: lengths are rounded up to this, so that fewer distinct shapes are compiled.
    """

    def __init__(
        self,
        processor: "FlashSlothProcessor",
        template: str,
        max_length: int,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.processor = processor
        self.template = template
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        """Batch tensors as `FlashSlothForConditionalGeneration.forward` takes them, with labels.

        Raises:
            ValueError: nothing is left of the batch, or a single turn is longer than `max_length`.
        """
        whole = [sample for sample in samples if sample is not None]
        if not whole:
            raise ValueError("every sample of a batch is broken; repair the data (the samples are named in the log)")
        return self._captions(whole) if self.template == "plain" else self._conversations(whole)

    def _options(self) -> dict[str, Any]:
        # right padding: under causal attention no token then looks at padding
        return {
            "return_labels": True,
            "return_tensors": "pt",
            "padding": True,
            "padding_side": "right",
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }

    def _captions(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        captions = []
        for sample in samples:
            if sample.caption is None or len(sample.images) != 1:
                raise ValueError(
                    f"template: plain needs one image and a caption in every sample, got {len(sample.images)} images "
                    f"in {sample.metadata or 'a sample'}"
                )
            captions.append(sample.caption)
        batch = self.processor.encode_captions(
            captions,
            images=[sample.images for sample in samples],
            truncation=True,
            max_length=self.max_length,
            **self._options(),
        )
        return dict(batch)

    def _conversations(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        conversations = [sample.messages for sample in samples]
        while True:
            batch = self.processor.apply_chat_template(
                conversations,
                images=[image for sample in samples for image in sample.images] or None,
                tokenize=True,
                return_dict=True,
                max_length=NO_LIMIT,  # too long a conversation is cut below, by whole turns
                **self._options(),
            )
            lengths = batch["attention_mask"].sum(-1).tolist()
            if max(lengths) <= self.max_length:
                return dict(batch)
            conversations = [
                self._without_last_turn(messages, length) if length > self.max_length else messages
                for messages, length in zip(conversations, lengths, strict=True)
            ]

    def _without_last_turn(self, messages: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
        last = max(index for index, message in enumerate(messages) if message["role"] == "user")
        if not any(message["role"] == "user" for message in messages[:last]):
            raise ValueError(f"a single turn has {length} tokens, more than max_length {self.max_length}; raise it")
        if any(part["type"] == "image" for part in messages[last]["content"] if isinstance(part, dict)):
            raise ValueError(
                f"a conversation of {length} tokens exceeds max_length {self.max_length} and its last turn brings an "
                "image; raise max_length"
            )
        logger.debug("dropped the last turn of a conversation of %d tokens (max_length %d)", length, self.max_length)
        return messages[:last]

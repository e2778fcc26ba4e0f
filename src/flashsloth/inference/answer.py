"""What a question gives: the answer, what it took, and how long each stage was."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timings:
    """Seconds spent in each stage; the device is synchronised between them."""

    preprocess: float = 0.0
    encode: float = 0.0
    compress: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def total(self) -> float:
        return self.preprocess + self.encode + self.compress + self.prefill + self.decode


@dataclass(frozen=True)
class Answer:
    """What the model said and what it took.

    Attributes:
        text: the answer, without special tokens.
        others: the further answers of `num_return_sequences`; a conversation goes on with the first.
        visual_tokens: tokens that stood for the images in the language model.
        uncompressed_tokens: what the same images would take without compression.
        prompt_tokens: length of the whole prompt, visual tokens and earlier turns included.
        reused_tokens: prompt tokens whose keys and values were still in the cache.
        new_tokens: generated tokens, end of sequence included.
        timings: prefill ends with the first new token, decode is the time of the others.
        confidence: the probability of the answer (`Guide.confidences`) where it was asked for.
    """

    text: str
    visual_tokens: int
    uncompressed_tokens: int
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    timings: Timings
    others: tuple[str, ...] = ()
    confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "seconds": self.timings.total}

"""What the server asks of the engine, and what the engine answers with: plain values, no tensors of the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from ..inference.structured import Grammar

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: longest answer; None for the model's default.
        temperature: 0 is greedy.
        top_p: share of probability that is kept.
        seed: of this request's own generator; equal seeds give equal answers, whatever else is in the batch.
        stop: texts that end an answer and are left out of it.
        top_logprobs: log-probabilities of so many tokens beside the chosen one's; None gives none at all.
        grammar: form of the answer (`inference.structured.compile_form`), of which every answer starts its own state;
            None for free text.
        confidence: say how probable the answer is (`Finished.confidence`).
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    confidence: bool = False


@dataclass(frozen=True)
class Request:
    """One answer to be made.

    Attributes:
        messages: chat as `apply_chat_template` takes it, `{"type": "image"}` parts without source.
        images: decoded, in reading order.
        sampling: how.
        visual_tokens: of every image; None for the model's default.
    """

    messages: list[dict[str, Any]]
    images: Sequence[Image.Image] = ()
    sampling: Sampling = field(default_factory=Sampling)
    visual_tokens: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability under the model, before temperature."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Text that can no longer change, and the log-probabilities of its tokens where these were asked for."""

    text: str
    logprobs: Sequence[tuple[TokenLogprob, Sequence[TokenLogprob]]] = ()


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: visual tokens included.
        cached_tokens: of these, tokens whose keys and values were found again.
        visual_tokens: of all images.
        completion_tokens: generated, the end of the sequence included.
        seconds: by stage: queue, preprocess, encode, compress, prefill, decode.
    """

    prompt_tokens: int
    cached_tokens: int
    visual_tokens: int
    completion_tokens: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: why.
        usage: what the answer took.
        confidence: probability of the answer as `inference.guide.Guide.confidences` has it; None where it was not
            asked for, or the answer is none of its choices because it was cut.
    """

    reason: FinishReason
    usage: Usage
    confidence: float | None = None


Event = Piece | Finished


class Overloaded(RuntimeError):
    """No request is taken now.

    Args:
        retry_after: seconds after which the queue may have room.
        is_stopping: the engine takes nothing more, as it shuts down or has not been started; else its queue is full.
    """

    def __init__(self, retry_after: float, is_stopping: bool = False) -> None:
        cause = "the server is shutting down" if is_stopping else "the server has as many requests as it takes"
        super().__init__(f"{cause}; try again in {retry_after:.0f} s")
        self.retry_after, self.is_stopping = retry_after, is_stopping

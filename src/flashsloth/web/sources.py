"""Where the page's answers come from: engines of this process, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from PIL import Image

from ..inference.explaining import explain_answer
from ..inference.explanation import Explanation
from ..inference.session import FlashSloth
from ..serve.pending import Engine
from ..serve.requests import Finished, Overloaded, Piece, Request, Sampling

ROUND = ("preprocess", "encode", "compress", "prefill", "decode")  # stages, in the order in which they come
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 120.0
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Turn:
    """A question, and its answer once there is one."""

    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Cost:
    """What an answer took.

    Attributes:
        visual_tokens: of all images; None where the server does not say.
        uncompressed_tokens: what the images would take without compression; None where it is not known.
        seconds: by stage, as far as they are known.
        is_cut: whether the answer ended at its longest.
    """

    visual_tokens: int | None = None
    uncompressed_tokens: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    is_cut: bool = False


class Source(Protocol):
    """What the page asks; used from several threads."""

    def models(self) -> list[str]:
        """Names of the models to choose from.

        Raises:
            OSError: the server cannot be reached; says why.
        """

    def token_choices(self, model: str) -> list[int]:
        """Numbers of visual tokens that an image can be, the model's own first; none where it is not known."""

    def answer(
        self, model: str, images: Sequence[Image.Image], turns: Sequence[Turn], visual_tokens: int | None
    ) -> Iterator[str | Cost]:
        """Pieces of the answer to the last turn, then what it took. Closed early, the answer is given up.

        Raises:
            ValueError, OSError: says what is wrong and what to do.
        """

    def explain(
        self, model: str, images: Sequence[Image.Image], turns: Sequence[Turn], visual_tokens: int | None
    ) -> Explanation | None:
        """What the model attended to for the answer of the last turn; None where that cannot be seen."""


class InProcess:
    """Models of this process.

    Args:
        models: engine, which must be running, and session by name.
        max_tokens: longest answer; None for the models' own.
    """

    def __init__(self, models: Mapping[str, tuple[Engine, FlashSloth]], max_tokens: int | None = None) -> None:
        self._models, self._max_tokens = dict(models), max_tokens

    def models(self) -> list[str]:
        return list(self._models)

    def token_choices(self, model: str) -> list[int]:
        config = self._models[model][1].config
        choices = config.visual_token_choices
        return sorted(choices, key=lambda tokens: (tokens != config.num_image_tokens, -tokens))

    def answer(
        self, model: str, images: Sequence[Image.Image], turns: Sequence[Turn], visual_tokens: int | None
    ) -> Iterator[str | Cost]:
        engine, session = self._models[model]
        sampling = Sampling(max_tokens=self._max_tokens)
        request = Request(_messages(len(images), turns), tuple(images), sampling, visual_tokens)
        try:
            ticket = engine.submit(request)
        except Overloaded as error:
            raise OSError(str(error)) from error
        try:
            while not isinstance(event := ticket.get(), Finished):
                assert isinstance(event, Piece)
                yield event.text
            config = session.config
            yield Cost(
                event.usage.visual_tokens,
                len(images) * config.num_views * config.num_patches_per_view,
                {stage: event.usage.seconds[stage] for stage in ROUND if stage in event.usage.seconds},
                event.reason == "length",
            )
        finally:
            ticket.cancel()

    def explain(
        self, model: str, images: Sequence[Image.Image], turns: Sequence[Turn], visual_tokens: int | None
    ) -> Explanation | None:
        answer = turns[-1].answer
        if not images or answer is None:
            return None
        messages = _messages(len(images), [*turns[:-1], Turn(turns[-1].question)])
        return explain_answer(self._models[model][1], images, messages, answer, visual_tokens)


class Remote:
    """A server that speaks OpenAI's protocol.

    Args:
        url: as OpenAI's clients take it, ending with /v1.
        key: of its API; None for none.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS))

    def models(self) -> list[str]:
        try:
            response = self._client.get(f"{self.url}/models")
            self._check(response)
            return [model["id"] for model in response.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OSError(
                f"{self.url} does not answer ({error}); is the server running, and the URL right?"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise OSError(f"{self.url}/models is no list of models; the URL usually ends with /v1") from error

    def token_choices(self, model: str) -> list[int]:
        return []

    def answer(
        self, model: str, images: Sequence[Image.Image], turns: Sequence[Turn], visual_tokens: int | None
    ) -> Iterator[str | Cost]:
        urls = iter([_data_url(image) for image in images])
        messages = _messages(len(images), turns)
        for part in messages[0]["content"]:
            if part["type"] == "image":
                part.update(type="image_url", image_url={"url": next(urls)})
        asked = {"model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        cost = Cost()
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", json=asked) as response:
                if response.is_error:
                    response.read()
                self._check(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if not line.startswith("data: ") or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise OSError(f"{self.url} broke off: {chunk['error'].get('message', 'no reason given')}")
                    for choice in chunk.get("choices", ()):
                        if text := (choice.get("delta") or {}).get("content"):
                            yield text
                        cost = Cost(cost.visual_tokens, None, cost.seconds, choice.get("finish_reason") == "length")
                    if usage := chunk.get("usage"):
                        tokens = (usage.get("prompt_tokens_details") or {}).get("image_tokens")
                        timings = chunk.get("timings") or {}
                        seconds = {stage: timings[stage] for stage in ROUND if stage in timings}
                        cost = Cost(tokens, None, seconds, cost.is_cut)
        except httpx.HTTPError as error:
            raise OSError(f"{self.url} does not answer ({error})") from error
        yield cost

    def explain(
        self, model: str, images: Sequence[Image.Image], turns: Sequence[Turn], visual_tokens: int | None
    ) -> Explanation | None:
        return None

    def _check(self, response: httpx.Response) -> None:
        if not response.is_error:
            return
        try:
            message = response.json()["error"]["message"]
        except (KeyError, TypeError, ValueError):
            message = response.text[:200]
        raise OSError(f"{self.url} refuses with status {response.status_code}: {message}")


def _messages(images: int, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        content: list[dict[str, Any]] = [{"type": "image"} for _ in range(0 if number else images)]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

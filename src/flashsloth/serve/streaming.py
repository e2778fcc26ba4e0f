"""Answers as OpenAI sends them: whole, or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .pending import Answers, ClientGone
from .requests import Event, Finished, Piece, TokenLogprob, Usage
from .schemas import (
    LEAST_LOGPROB,
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChosenToken,
    ChunkChoice,
    Delta,
    Logprobs,
    PromptDetails,
    TokenDetail,
    UsageCount,
)

END = b"data: [DONE]\n\n"
GRACE_SECONDS = 5.0  # for the last words to a client that reads slowly


class Reply:
    """The form of the answers to one chat request.

    Args:
        model: its name.
        answers: how many.
        with_logprobs: whether they were asked for.
        image_seconds: that fetching and decoding the images took.
    """

    def __init__(self, model: str, answers: int, with_logprobs: bool, image_seconds: float) -> None:
        self.model, self.with_logprobs, self.image_seconds = model, with_logprobs, image_seconds
        self.identifier = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.finished: list[Finished | None] = [None] * answers

    def note(self, index: int, finished: Finished) -> None:
        self.finished[index] = finished

    @property
    def is_finished(self) -> bool:
        return None not in self.finished

    def usages(self) -> list[Usage]:
        return [finished.usage for finished in self.finished if finished is not None]

    def completion(self, pieces: Sequence[Sequence[Piece]]) -> ChatCompletion:
        """The whole of every answer."""
        choices = []
        for index, (own, finished) in enumerate(zip(pieces, self.finished, strict=True)):
            assert finished is not None
            text = "".join(piece.text for piece in own)
            choices.append(
                Choice(
                    index=index,
                    message=AnswerMessage(role="assistant", content=text),
                    logprobs=self._logprobs(own),
                    finish_reason="length" if finished.reason == "length" else "stop",
                    confidence=finished.confidence,
                )
            )
        return ChatCompletion(
            id=self.identifier,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=self.usage(),
            timings=self.timings(),
        )

    def usage(self) -> UsageCount:
        """The prompt counts once, however many answers it has."""
        usages = self.usages()
        first, completion = usages[0], sum(usage.completion_tokens for usage in usages)
        return UsageCount(
            prompt_tokens=first.prompt_tokens,
            completion_tokens=completion,
            total_tokens=first.prompt_tokens + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=first.cached_tokens, image_tokens=first.visual_tokens),
        )

    def timings(self) -> dict[str, float]:
        seconds = {"images": self.image_seconds}
        for usage in self.usages():
            for stage, value in usage.seconds.items():
                seconds[stage] = max(seconds.get(stage, 0.0), value)
        return seconds

    def opening(self, include_usage: bool) -> list[ChatChunk]:
        """What comes before the first text."""
        return [
            self._chunk(index, Delta(role="assistant", content=""), None, None, include_usage)
            for index in range(len(self.finished))
        ]

    def chunk(self, index: int, event: Event, include_usage: bool) -> ChatChunk:
        """One event of an answer."""
        if isinstance(event, Finished):
            reason: str = "length" if event.reason == "length" else "stop"
            chunk = self._chunk(index, Delta(), None, reason, include_usage)
            if event.confidence is not None:
                chunk.choices[0].confidence = event.confidence
            return chunk
        return self._chunk(index, Delta(content=event.text), self._logprobs([event]), None, include_usage)

    def last_chunk(self) -> ChatChunk:
        """The usage, after all answers."""
        chunk = self._chunk(0, Delta(), None, None, False)
        return chunk.model_copy(update={"choices": [], "usage": self.usage(), "timings": self.timings()})

    def _chunk(
        self, index: int, delta: Delta, logprobs: Logprobs | None, reason: str | None, include_usage: bool
    ) -> ChatChunk:
        choice = ChunkChoice.model_construct(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
        usage = {"usage": None} if include_usage else {}
        return ChatChunk.model_construct(
            id=self.identifier,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=[choice],
            **usage,
        )

    def _logprobs(self, pieces: Sequence[Piece]) -> Logprobs | None:
        if not self.with_logprobs:
            return None
        content = [
            ChosenToken(**_detail(token), top_logprobs=[TokenDetail(**_detail(other)) for other in others])
            for piece in pieces
            for token, others in piece.logprobs
        ]
        return Logprobs(content=content)


def _detail(token: TokenLogprob) -> dict:
    return {"token": token.token, "logprob": max(LEAST_LOGPROB, token.logprob), "bytes": list(token.bytes)}


async def collect(answers: Answers, reply: Reply, on_text: Callable[[], None]) -> ChatCompletion:
    """All answers, when they are finished; errors as `Answers.events`."""
    pieces: list[list[Piece]] = [[] for _ in reply.finished]
    async for events in answers.events():
        for index, event in events:
            if isinstance(event, Finished):
                reply.note(index, event)
            else:
                on_text()
                pieces[index].append(event)
    return reply.completion(pieces)


async def encode(
    events: AsyncIterator[list[tuple[int, Event]]], reply: Reply, include_usage: bool, on_text: Callable[[], None]
) -> AsyncIterator[bytes]:
    """Server-sent events; an error is the last of them. What is there at the same time goes out together."""
    lines = list(map(_sse, reply.opening(include_usage)))
    try:
        async for batch in events:
            for index, event in batch:
                if isinstance(event, Finished):
                    reply.note(index, event)
                else:
                    on_text()
                lines.append(_sse(reply.chunk(index, event, include_usage)))
            if not reply.is_finished:
                yield b"".join(lines)
                lines.clear()
        yield b"".join(lines) + (_sse(reply.last_chunk()) if include_usage else b"") + END
    except ApiError as error:
        yield b"data: " + json.dumps(error.body()).encode() + b"\n\n"
    except ClientGone:
        return


def _sse(chunk: ChatChunk) -> bytes:
    # In ASCII: some clients take other characters than the newline for the end of a line.
    return b"data: " + json.dumps(chunk.model_dump(exclude_unset=True)).encode() + b"\n\n"


class EventStream(Response):
    """A streamed answer.

    Args:
        content: its bytes.
        close: called at the end, whatever it was.
        deadline: on the clock of `time.monotonic`; a client that reads slower is left.
    """

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None], deadline: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.content, self.close, self.deadline = content, close, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self.deadline + GRACE_SECONDS - time.monotonic()):
                start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                await send(start)
                async for data in self.content:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.close()

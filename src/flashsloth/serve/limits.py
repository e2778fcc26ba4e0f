"""Who is let in, and with how much: API keys, requests under way, size and time of a request's body."""

import hmac
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import REQUEST_TIMEOUT, TOO_LARGE, TOO_MANY, UNAUTHORIZED, UNAVAILABLE, ApiError
from .settings import Settings

if TYPE_CHECKING:
    from .metrics import Metrics

KEY_VARIABLE = "FLASHSLOTH_API_KEY"
GUARDED = "/v1/"
UPLOADS = "/v1/images"
OTHER_PATHS = "other"


def read_api_keys(given: Sequence[str] = (), file: Path | None = None) -> tuple[str, ...]:
    """Keys of an option, of the environment (`FLASHSLOTH_API_KEY`, several with commas) and of a file, one a line.

    Raises:
        ValueError: a key that no header can carry, or a file without keys.
        OSError: the file cannot be read.
    """
    keys = [*given, *os.environ.get(KEY_VARIABLE, "").split(",")]
    if file is not None:
        lines = file.read_text(encoding="utf-8").splitlines()
        if not any(line.strip() for line in lines):
            raise ValueError(f"{file} holds no key; write one on each line")
        keys += lines
    keys = [key.strip() for key in keys if key.strip()]
    for key in keys:
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("an API key consists of printable ASCII characters without spaces")
    return tuple(dict.fromkeys(keys))


class State:
    """What changes while a server runs.

    Attributes:
        in_flight: requests to `/v1/` under way.
        answers: that the engine owes.
        draining: whether what comes is refused because the server stops.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.answers = 0
        self.draining = False


class Gate:
    """ASGI middleware in front of everything; only `/v1/` is guarded, so that probes and Prometheus need no key.

    A request's body is read here as a whole: what is too long or too slow never reaches the application.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: "Metrics", state: State) -> None:
        self.app, self.settings, self.metrics, self.state = app, settings, metrics, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        guarded = scope["path"].startswith(GUARDED)
        self.state.in_flight += guarded
        try:
            if guarded:
                await self._guard(scope, receive, send_and_note)
            else:
                await self.app(scope, receive, send_and_note)
        finally:
            self.state.in_flight -= guarded
            path = getattr(scope.get("route"), "path", OTHER_PATHS)
            self.metrics.requests.labels(path, str(status)).inc()

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        limit = self.settings.max_image_bytes if scope["path"] == UPLOADS else self.settings.max_body_bytes
        try:
            self._check(headers)
            receive_body = await self._read(receive, headers, limit)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if receive_body is not None:
            await self.app(scope, receive_body, send)

    def _check(self, headers: Headers) -> None:
        settings = self.settings
        if settings.api_keys:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode("utf-8", "surrogateescape")
            # all are compared, so that the time says nothing
            known = [hmac.compare_digest(given, own.encode()) for own in settings.api_keys]
            if scheme.lower() != "bearer" or not any(known):
                raise ApiError(UNAUTHORIZED, "the API key is missing or wrong", code="invalid_api_key")
        if self.state.draining:
            raise ApiError(UNAVAILABLE, "the server is stopping", retry_after=settings.retry_after)
        if self.state.in_flight > settings.max_in_flight:
            message = "the server has as many requests under way as it takes"
            raise ApiError(TOO_MANY, message, code="overloaded", retry_after=settings.retry_after)

    async def _read(self, receive: Receive, headers: Headers, limit: int) -> Receive | None:
        """The body, to be received at once; None where the client hung up before its end."""
        too_large = ApiError(TOO_LARGE, f"the request is larger than this server's limit of {limit:,} bytes")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit and "expect" in headers:  # the client asks before it sends
            raise too_large
        body, size, more = bytearray(), 0, True
        with anyio.move_on_after(self.settings.body_seconds) as clock:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                size += len(message.get("body", b""))
                # What is too much is read all the same: most clients listen only when they have sent everything.
                body = body + message.get("body", b"") if size <= limit else bytearray()
                more = message.get("more_body", False)
        if clock.cancelled_caught:
            raise ApiError(REQUEST_TIMEOUT, f"the request did not arrive within {self.settings.body_seconds:g} s")
        if size > limit:
            raise too_large
        given = False

        async def receive_again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return receive_again

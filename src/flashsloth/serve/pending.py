"""Answers under way: events of the engine, which threads wait for, brought to the event loop of the server."""

import asyncio
import contextlib
import logging
import queue
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from typing import Protocol

from .errors import BAD_REQUEST, TOO_MANY, UNAVAILABLE, ApiError
from .requests import Event, Finished, Overloaded, Request

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 1.0  # how long a thread waits for an event before it asks whether somebody still wants it


class Ticket(Protocol):
    """An answer that the engine owes."""

    def get(self, timeout: float | None = None) -> Event:
        """The next event.

        Raises:
            queue.Empty, TimeoutError: there was none for so many seconds.
            ValueError: the request cannot be answered.
        """

    def cancel(self) -> None:
        """Give up the answer; from any thread, at any time."""


class Engine(Protocol):
    """What makes answers; used from several threads."""

    @property
    def ready(self) -> bool:
        """Whether it answers."""

    def submit(self, request: Request) -> Ticket:
        """Raises:
        Overloaded: its queue is full.
        ValueError: the request cannot be answered.
        """


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Answers:
    """The answers to one request of a client, made side by side.

    Args:
        engine: makes them.
        executor: threads that wait for it, one for each answer.
        deadline: on the clock of `time.monotonic`.
        retry_after: seconds that a client is told to wait after a failure.
    """

    def __init__(self, engine: Engine, executor: Executor, deadline: float, retry_after: float) -> None:
        self.engine, self.executor, self.deadline, self.retry_after = engine, executor, deadline, retry_after
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._over = False
        self._unfinished = 0

    async def submit(self, requests: Sequence[Request]) -> None:
        """Hand the requests to the engine.

        Raises:
            ApiError: it takes them not.
        """
        self._unfinished = len(requests)
        for index, request in enumerate(requests):
            if self._over:  # the client hung up, or the server stops: the events say which
                return
            try:
                ticket = await self._loop.run_in_executor(self.executor, self.engine.submit, request)
            except Exception as error:
                self.cancel()
                raise self._as_api_error(error) from error
            self._tickets.append(ticket)
            if self._over:
                ticket.cancel()
                return
            self.executor.submit(self._wait, index, ticket)

    def fail(self, error: BaseException) -> None:
        """Whoever reads the events gets this instead of the next; the engine gives up the answers."""
        self._events.put_nowait((0, error))
        self.cancel()

    def cancel(self) -> None:
        """Give up what is not finished."""
        self._over = True
        if self._unfinished:
            for ticket in self._tickets:
                ticket.cancel()

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """All that is there, each event with the index of its answer, until every answer is finished.

        Raises:
            ApiError: the engine failed, the time is over, or the server stops.
            ClientGone: the client hung up.
        """
        while self._unfinished:
            found = [await self._events.get()]
            while not self._events.empty():
                found.append(self._events.get_nowait())
            events: list[tuple[int, Event]] = []
            for index, event in found:
                if isinstance(event, BaseException):
                    self.cancel()
                    raise event if isinstance(event, ClientGone) else self._as_api_error(event) from event
                if isinstance(event, Finished):
                    if event.reason == "cancelled":
                        self.cancel()
                        raise ApiError(UNAVAILABLE, "the answer was given up", retry_after=self.retry_after)
                    self._unfinished -= 1
                events.append((index, event))
            yield events

    def _wait(self, index: int, ticket: Ticket) -> None:
        """Runs in a thread."""
        event: Event | BaseException
        while not self._over:
            left = self.deadline - time.monotonic()
            try:
                event = ticket.get(timeout=max(0.0, min(left, PATIENCE_SECONDS)))
            except (queue.Empty, TimeoutError):
                if left > 0:
                    continue
                event = TimeoutError("the time for one request is over")
            except Exception as error:
                event = error
            with contextlib.suppress(RuntimeError):  # the server's loop is closed
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
            if isinstance(event, (Finished, BaseException)):
                return

    def _as_api_error(self, error: BaseException) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Overloaded):
            return ApiError(TOO_MANY, str(error), code="overloaded", retry_after=error.retry_after)
        if isinstance(error, ValueError):
            return ApiError(BAD_REQUEST, str(error))
        if isinstance(error, TimeoutError):
            message = f"{error}; ask for less, or later"
            return ApiError(UNAVAILABLE, message, code="timeout", retry_after=self.retry_after)
        logger.error("the engine failed at a request", exc_info=error)
        return ApiError(UNAVAILABLE, "the engine failed at this request", retry_after=self.retry_after)

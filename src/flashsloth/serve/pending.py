"""Answers under way: events of the engine's thread, brought to the event loop of the server."""

import asyncio
import contextlib
import logging
import queue
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

from .errors import BAD_REQUEST, TOO_MANY, UNAVAILABLE, ApiError
from .requests import Event, Finished, Overloaded, Request

logger = logging.getLogger(__name__)


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
    def is_accepting(self) -> bool:
        """Whether it takes requests."""

    def submit(self, request: Request, on_event: Callable[[], None] | None = None) -> Ticket:
        """Prepare a request in the calling thread, and queue it.

        Args:
            on_event: called, in whatever thread, whenever the ticket has an event more.

        Raises:
            Overloaded: the queue is full.
            ValueError: the request cannot be answered.
        """

    def statistics(self) -> Any:
        """A dataclass of numbers, for whoever watches."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Answers:
    """The answers to one request of a client, made side by side. Of one event loop.

    Args:
        engine: makes them.
        executor: threads that prepare requests.
        deadline: on the clock of `time.monotonic`.
        retry_after: seconds that a client is told to wait after a failure.
    """

    def __init__(self, engine: Engine, executor: Executor, deadline: float, retry_after: float) -> None:
        self.engine, self.executor, self.retry_after = engine, executor, retry_after
        self._loop = asyncio.get_running_loop()
        self._alarm = self._loop.call_later(deadline - time.monotonic(), self._time_is_over)
        self._events: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._tickets: list[Ticket | None] = []  # None once finished
        self._over = False
        self._unfinished = 0
        self._woken = False

    async def submit(self, requests: Sequence[Request]) -> None:
        """Hand the requests to the engine.

        Raises:
            ApiError: it takes them not.
        """
        self._unfinished = len(requests)
        for request in requests:
            if self._over:  # the client hung up, or the server stops: the events say which
                return
            try:
                ticket = await self._loop.run_in_executor(self.executor, self.engine.submit, request, self._wake)
            except Exception as error:
                self.cancel()
                raise self._as_api_error(error) from error
            if self._over:
                ticket.cancel()
                return
            self._tickets.append(ticket)
            self._take()  # what came before the ticket was known here

    def fail(self, error: BaseException) -> None:
        """Whoever reads the events gets this instead of the next; the engine gives up the answers."""
        self._events.put_nowait((0, error))
        self.cancel()

    def cancel(self) -> None:
        """Give up what is not finished."""
        self._over = True
        self._alarm.cancel()
        for ticket in self._tickets:
            if ticket is not None:
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
            failure: BaseException | None = None
            for index, event in found:
                if isinstance(event, BaseException):
                    failure = event
                elif isinstance(event, Finished) and event.reason == "cancelled":
                    failure = ApiError(UNAVAILABLE, "the answer was given up", retry_after=self.retry_after)
                else:
                    self._unfinished -= isinstance(event, Finished)
                    events.append((index, event))
                if failure is not None:
                    break
            if events:
                yield events
            if failure is not None:
                self.cancel()
                raise failure if isinstance(failure, ClientGone) else self._as_api_error(failure) from failure

    def _wake(self) -> None:
        """Called in a thread of the engine's."""
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the server's loop is closed
                self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._woken = False  # what comes from here on wakes again
        for index, ticket in enumerate(self._tickets):
            while ticket is not None and not self._over:
                event: Event | BaseException
                try:
                    event = ticket.get(timeout=0)
                except (queue.Empty, TimeoutError):
                    break
                except Exception as error:
                    event = error
                self._events.put_nowait((index, event))
                if isinstance(event, (Finished, BaseException)):
                    self._tickets[index] = ticket = None

    def _time_is_over(self) -> None:
        self.fail(TimeoutError("the time for one request is over"))

    def _as_api_error(self, error: BaseException) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Overloaded):
            status = UNAVAILABLE if error.is_stopping else TOO_MANY
            return ApiError(status, str(error), code="overloaded", retry_after=error.retry_after)
        if isinstance(error, ValueError):
            return ApiError(BAD_REQUEST, str(error))
        if isinstance(error, TimeoutError):
            message = f"{error}; ask for less, or later"
            return ApiError(UNAVAILABLE, message, code="timeout", retry_after=self.retry_after)
        logger.error("the engine failed at a request", exc_info=error)
        return ApiError(UNAVAILABLE, "the engine failed at this request", retry_after=self.retry_after)

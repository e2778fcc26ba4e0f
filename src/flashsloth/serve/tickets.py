"""What a client of the engine holds: the events of one answer."""

import queue
import threading
from collections.abc import Callable, Iterator

from .requests import Event, Finished


class Ticket:
    """Events of one answer, for one reader: pieces of text, and at last `Finished`.

    Args:
        on_event: called without arguments, in the engine's thread, whenever there is something to get; it must be
            quick and raise nothing.
    """

    def __init__(self, on_event: Callable[[], None] | None = None) -> None:
        self._events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._on_event = on_event
        self._cancelled = threading.Event()
        self._done = False

    def get(self, timeout: float | None = None) -> Event:
        """The next event.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: there was none.
            Exception: what went wrong with this request. Other requests are answered as if nothing had happened.
        """
        if self._done:
            raise ValueError("this answer is finished; there are no more events")
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no event within {timeout} s") from None
        self._done = isinstance(event, (Finished, Exception))
        if isinstance(event, Exception):
            raise event
        return event

    def __iter__(self) -> Iterator[Event]:
        while not self._done:
            yield self.get()

    def cancel(self) -> None:
        """Give the answer up; its last event is `Finished("cancelled")`, before the next step of the model."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def put(self, event: Event | Exception) -> None:
        """For the engine."""
        self._events.put(event)
        if self._on_event is not None:
            self._on_event()

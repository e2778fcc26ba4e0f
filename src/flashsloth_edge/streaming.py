"""Answers as they grow: text that can no longer change, and an iterator over it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from .shared.answer import Answer

REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are not yet a character


class TextPieces:
    """Turns new tokens into pieces of text that together are the answer."""

    def __init__(self, decode: Callable[[list[int]], str], on_text: Callable[[str], None]) -> None:
        self._decode, self._on_text = decode, on_text
        self._ids: list[int] = []
        self._told = ""

    def add(self, token: int) -> None:
        self._ids.append(token)
        text = self._decode(self._ids).lstrip()
        if not text.endswith(REPLACEMENT):
            self._tell(text.rstrip())  # white space at the end of an answer is left out

    def end(self) -> None:
        """Nothing follows: what was held back is told."""
        self._tell(self._decode(self._ids).strip())

    def _tell(self, text: str) -> None:
        if len(text) > len(self._told) and text.startswith(self._told):
            new, self._told = text[len(self._told) :], text
            self._on_text(new)


class AnswerStream:
    """Iterator over pieces of text; `answer` holds the whole answer at its end. Read again, it gives them again.

    Args:
        ask: (on_text, stopped) -> the answer; run in a thread.
    """

    def __init__(self, ask: Callable[[Callable[[str], None], threading.Event], Answer]) -> None:
        self.answer: Answer | None = None
        self._error: BaseException | None = None
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._read: list[str] = []
        self._ended = False
        self._stopped = threading.Event()

        def run() -> None:
            try:
                self.answer = ask(self._pieces.put, self._stopped)
            except BaseException as error:  # handed to the thread that reads
                self._error = error
            finally:
                self._pieces.put(None)

        self._thread = threading.Thread(target=run, name="flashsloth-edge-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        yield from self._read
        try:
            while not self._ended and (piece := self._pieces.get()) is not None:
                self._read.append(piece)
                yield piece
            self._pieces.put(None)  # for another reader
        finally:
            # left early, the model must not go on in the background
            self._ended = True
            self._stopped.set()
            self._thread.join()
        if self._error is not None:
            raise self._error

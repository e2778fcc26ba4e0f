"""Runs the application until it is told to stop, and lets it finish what it has begun."""

import asyncio
import gc
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .app import Service

HANG_UP_SECONDS = 5  # for the last words of answers that were given up
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, at_stop: Sequence[Callable[[], None]], on_start: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.at_stop, self.on_start = at_stop, on_start
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is not None:
            for stop in self.at_stop:
                self._loop.call_soon_threadsafe(stop)
        super().handle_exit(sig, frame)


def run_server(app: FastAPI, listening: socket.socket, on_start: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGTERM or SIGINT, then refuses what is new and finishes what is under way; a second SIGINT ends at
    once. To be called in the main thread.

    Args:
        app: as `create_app` makes it, or another, which has nothing under way to be finished. What its
            `state.at_stop` holds is called in the event loop when the server is told to stop.
        listening: listens already; closed at the end.
        on_start: called when requests are taken.
    """
    service: Service | None = getattr(app.state, "service", None)
    at_stop = [*getattr(app.state, "at_stop", ()), *([] if service is None else [service.drain])]
    drain_seconds = 0 if service is None else int(service.settings.drain_seconds)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=drain_seconds + HANG_UP_SECONDS,
    )
    # The model and the libraries stay; going through them at every collection would make answers wait.
    gc.collect()
    gc.freeze()
    # uvicorn repeats the signals that it had; the first of them has been answered by then
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        with listening:
            _Server(config, at_stop, on_start).run([listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

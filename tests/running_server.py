"""A server in a thread, and what is sent to it."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from PIL import Image

from flashsloth.serve.app import create_app
from flashsloth.serve.settings import Settings

CHAT = "/v1/chat/completions"


def data_url(image: Image.Image, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@contextlib.contextmanager
def running(engine: Any, make_grammar: Any = None, **settings: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    app = create_app(engine, Settings(**settings), make_grammar)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def connected(address: str, content: bytes, length: int | None = None) -> Iterator[socket.socket]:
    """A connection over which a chat request was sent, perhaps with the length of a longer one."""
    host, port = address.removeprefix("http://").split(":")
    length = len(content) if length is None else length
    lines = [f"POST {CHAT} HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {length}", "", ""]
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode() + content)
        yield connection


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)

"""Servers that a benchmark starts, and a client that takes little of the processor they share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

CHAT = "/v1/chat/completions"
READY_SECONDS = 600.0  # a large model on a busy machine
LINE_BYTES = 1 << 24
ADDRESS = re.compile(r"at (http://\S+)/v1 ")


@dataclass
class Outcome:
    """What became of one request; seconds from the moment of sending.

    Attributes:
        status: of HTTP; 0 where there was no answer.
        error: what went wrong, or None.
        seconds: to the last byte.
        first: to the first text of a stream, or None.
        gaps: between pieces of text that arrived apart.
        text: of the answer.
        tokens: that it has.
    """

    status: int = 0
    error: str | None = None
    seconds: float = 0.0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0


class Connection:
    """One client's connection, which is kept; a request that fails leaves a new one to be opened."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.scheme == "http" and parts.hostname is not None, "the client speaks plain HTTP"
        self.host, self.port, self.prefix = parts.hostname, parts.port or 80, parts.path.removesuffix("/")
        self._key = "" if key is None else f"Authorization: Bearer {key}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def chat(self, content: bytes) -> Outcome:
        """Send a body and wait for all of its answer."""
        outcome, started = Outcome(), time.perf_counter()
        head = (
            f"POST {self.prefix}{CHAT} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(self.host, self.port, limit=LINE_BYTES)
            reader, writer = self._streams
            writer.write(head.encode() + content)
            await writer.drain()
            await self._read(reader, outcome, started)
        except (OSError, EOFError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.seconds = time.perf_counter() - started
        if outcome.error is not None:
            await self.close()
        return outcome

    async def close(self) -> None:
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader, outcome: Outcome, started: float) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        outcome.status = int(head.split(" ", 2)[1])
        if "transfer-encoding: chunked" in head:
            pieces = self._pieces(reader)
        else:
            length = re.search(r"content-length: (\d+)", head)
            if length is None:
                raise ValueError("an answer without a length")
            pieces = _once(await reader.readexactly(int(length[1])))
        if "text/event-stream" in head:
            await _read_events(pieces, outcome, started)
            return
        body = json.loads(b"".join([piece async for piece in pieces]))
        if outcome.status == 200:
            outcome.text = body["choices"][0]["message"]["content"]
            outcome.tokens = body["usage"]["completion_tokens"]
        else:
            outcome.error = f"{outcome.status}: {body['error']['message']}"

    @staticmethod
    async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while size := int(await reader.readline(), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _read_events(pieces: AsyncIterator[bytes], outcome: Outcome, started: float) -> None:
    """Server-sent events; text counts when it arrives."""
    left, last, is_over = b"", started, False
    async for piece in pieces:
        now = time.perf_counter()
        *lines, left = (left + piece).split(b"\n")
        has_text = False
        for line in lines:
            if not line.startswith(b"data: ") or is_over:
                continue
            if line == b"data: [DONE]":
                is_over = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                outcome.error = str(event["error"]["message"])
                continue
            if usage := event.get("usage"):
                outcome.tokens = usage["completion_tokens"]
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    outcome.text, has_text = outcome.text + text, True
        if has_text and outcome.first is None:
            outcome.first, last = now - started, now
        elif has_text:
            outcome.gaps.append(now - last)
            last = now
    if not is_over and outcome.error is None:
        outcome.error = "the stream broke off"


async def run_clients(
    url: str, bodies: Sequence[bytes], clients: int, done: Callable[[Outcome], None], key: str | None = None
) -> list[Outcome]:
    """Each client sends its next request when the last is answered; outcomes in the order of the bodies."""
    outcomes: list[Outcome | None] = [None] * len(bodies)
    places = iter(range(len(bodies)))

    async def client() -> None:
        connection = Connection(url, key)
        for place in places:
            outcomes[place] = outcome = await connection.chat(bodies[place])
            done(outcome)
        await connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return [outcome for outcome in outcomes if outcome is not None]


@dataclass
class Server:
    """A server that answers at `url`; `process` only where this program started it."""

    name: str
    url: str
    ready_seconds: float | None = None
    process: psutil.Process | None = None

    def processor_seconds(self) -> float | None:
        if self.process is None:
            return None
        times = self.process.cpu_times()
        return times.user + times.system

    def resident_bytes(self) -> int | None:
        return None if self.process is None else int(self.process.memory_info().rss)


@contextlib.contextmanager
def served(name: str, arguments: Sequence[str]) -> Iterator[Server]:
    """A `flashsloth serve` of this machine, stopped at the end; its own port, and its words in a file.

    Raises:
        RuntimeError: it did not start; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        command = [sys.executable, "-m", "flashsloth_cli", "serve", *arguments, "--port", "0"]
        started = time.perf_counter()
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
        try:
            url = _address(process, log)
            yield Server(name, url, time.perf_counter() - started, psutil.Process(process.pid))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.perf_counter() + READY_SECONDS
    while time.perf_counter() < end and process.poll() is None:
        # the words may be wrapped to the width of a terminal
        if found := ADDRESS.search(" ".join(log.read_text(errors="replace").split()) + " "):
            return found[1]
        time.sleep(0.02)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")

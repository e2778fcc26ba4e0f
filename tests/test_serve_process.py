"""The server as a process of its own: many clients, forms by the thousand, and what a kill does."""

from __future__ import annotations

import concurrent.futures
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import openai
import pytest

from flashsloth.synthetic import SyntheticDataset
from running_server import CHAT, data_url, wait_for

pytestmark = pytest.mark.slow  # each starts at least one process that loads torch

ANSWERS = 1_000
CLIENTS = 32
START_SECONDS = 120.0  # on a machine that others use, too
SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"enum": ["red", "green", "blue", None, 3]},
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"type": "string", "pattern": "^[a-z]{1,8}$"},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 4},
    {
        "type": "object",
        "properties": {
            "shape": {"enum": ["circle", "square", "triangle"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        },
        "required": ["shape", "count"],
        "additionalProperties": False,
    },
    {
        "$defs": {"point": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False,
                            "minItems": 2}},
        "anyOf": [{"$ref": "#/$defs/point"}, {"type": "object", "properties": {"point": {"$ref": "#/$defs/point"}},
                                              "required": ["point"], "additionalProperties": False}],
    },
]  # fmt: skip


class Process:
    """A `flashsloth serve` at a free port, ready when it is made."""

    def __init__(self, log: Path, *options: str) -> None:
        started = time.monotonic()
        self.log = log
        with log.open("wb") as sink:
            command = [sys.executable, "-m", "flashsloth_cli", "serve", "nano", "--port", "0", *options]
            self.process = subprocess.Popen(command, stderr=sink)
        found: list[str] = []
        wait_for(lambda: found.extend(re.findall(r"at (http://\S+)/v1 ", log.read_text())) or found, START_SECONDS)
        self.address = found[0]
        self.ready_seconds = time.monotonic() - started

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def new(*options: str) -> Process:
        processes.append(Process(tmp_path / f"{len(processes)}.txt", *options))
        return processes[-1]

    yield new
    for process in processes:
        process.process.kill()
        process.process.wait()


def questions(count: int) -> list[tuple[str, str]]:
    """Data URLs of rendered images, each with a question."""
    data = SyntheticDataset("test", count, seed=3, weights={"scenes": 1.0, "text": 1.0}, turns=1)
    samples = [data.sample(index) for index in range(count)]
    return [(data_url(sample.image), sample.turns[0].question) for sample in samples]


def chat(url: str, question: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"model": "nano", "messages": [{"role": "user", "content": parts}], **fields}


def test_a_thousand_answers_follow_their_schemas(start: Callable[..., Process]) -> None:
    """Greedy and hot ones, of several schemas in one batch; none is cut, as every schema is bounded."""
    server = start("--max-in-flight", str(2 * CLIENTS))
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=START_SECONDS)
    asked = questions(50)

    def answer(index: int) -> tuple[dict[str, Any], Any]:
        schema = SCHEMAS[index % len(SCHEMAS)]
        url, question = asked[index % len(asked)]
        found = client.chat.completions.create(
            **chat(url, question, max_tokens=200, seed=index, temperature=(index % 3) * 0.75),
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        )
        assert found.choices[0].finish_reason == "stop"
        return schema, json.loads(found.choices[0].message.content)

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(answer, range(ANSWERS)))
    for schema, value in answers:
        jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)
    assert len({json.dumps(value) for _, value in answers}) > 50
    assert server.end(signal.SIGTERM) == 0


def test_a_kill_under_load_is_an_error_for_clients_and_the_next_server_answers(start: Callable[..., Process]) -> None:
    server = start()
    asked = questions(CLIENTS)
    outcomes: list[str] = []
    begun = threading.Semaphore(0)

    def ask(index: int) -> None:
        url, question = asked[index]
        fields = {"stream": True, "max_tokens": 600, "guided_regex": "[a-z]{400}"}
        try:
            with httpx2.stream("POST", server.address + CHAT, json=chat(url, question, **fields), timeout=60) as found:
                assert found.status_code == 200
                for number, line in enumerate(found.iter_lines()):
                    if number == 4:
                        begun.release()
                    if line == "data: [DONE]":
                        outcomes.append("answered")
        except httpx2.TransportError as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for _ in range(CLIENTS // 2):  # half of them have text by then
        assert begun.acquire(timeout=START_SECONDS)
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    killed = time.monotonic()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert time.monotonic() - killed < 10
    assert len(outcomes) == CLIENTS
    assert set(outcomes) <= {"RemoteProtocolError", "ReadError", "ConnectError"}, outcomes

    port = server.address.rpartition(":")[2]
    again = start("--port", port)  # the later of two
    assert again.address == server.address
    url, question = asked[0]
    assert httpx2.post(again.address + CHAT, json=chat(url, question), timeout=60).status_code == 200


def test_clients_that_come_while_the_model_is_loaded_wait_for_it(tmp_path: Path) -> None:
    """The address is taken before the model is loaded: nobody is refused during a restart."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flashsloth_cli", "serve", "nano", "--port", str(port)]
    with (tmp_path / "log.txt").open("wb") as sink:
        process = subprocess.Popen(command, stderr=sink)
    try:

        def listens() -> bool:
            with socket.socket() as tried:
                return tried.connect_ex(("127.0.0.1", port)) == 0

        wait_for(listens, START_SECONDS)
        assert b"is served at" not in (tmp_path / "log.txt").read_bytes()
        assert httpx2.get(f"http://127.0.0.1:{port}/ready", timeout=START_SECONDS).status_code == 200
    finally:
        process.kill()
        process.wait()

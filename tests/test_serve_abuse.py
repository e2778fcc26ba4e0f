"""Bad requests of all kinds against a server with the packaged model, which answers the next good one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import json
import random
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as of_hypothesis
from hypothesis import strategies as st

from flashsloth.hub import ASSETS
from flashsloth.inference import load
from flashsloth.serve.engine import Engine, EngineSettings
from flashsloth.serve.forms import MakeGrammar
from running_server import CHAT, connected, data_url, running, wait_for
from tiny_session import noise_image

SECONDS = 120.0  # that no answer takes, on any machine
URL = data_url(noise_image())
QUESTION = "how many circles are there?"
DEEP = 100_000
COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def good(**fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": QUESTION}]
    return {"model": "nano", "messages": [{"role": "user", "content": parts}], "max_tokens": 8, **fields}


class Served:
    """A running server, and how it is seen to be well."""

    def __init__(self, address: str, engine: Engine) -> None:
        self.address, self.engine = address, engine
        self.client = httpx2.Client(base_url=address, timeout=SECONDS)
        self.expected = self.answer()

    def answer(self) -> str:
        response = self.client.post(CHAT, json=good())
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def post(self, content: bytes, path: str = CHAT, kind: str = "application/json") -> httpx2.Response:
        response = self.client.post(path, content=content, headers={"Content-Type": kind})
        check(response)
        return response

    def is_well(self) -> None:
        assert self.engine.is_accepting
        assert self.answer() == self.expected
        wait_for(lambda: self.engine.statistics().running == self.engine.statistics().waiting == 0, SECONDS)


def check(response: Any) -> None:
    """Never an error of the server's own, but for a stated 503."""
    assert response.status_code < 500 or (response.status_code == 503 and "Retry-After" in response.headers), (
        f"{response.status_code}: {response.text[:500]}"
    )
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    session = load("nano", device="cpu")
    engine = Engine(session, EngineSettings(max_batch_tokens=2048))
    engine.start()
    limits = {"request_seconds": SECONDS / 2, "max_body_bytes": 4 << 20, "max_pixels": 1_000_000, "fetch_seconds": 2.0}
    with running(engine, MakeGrammar(session), **limits) as address:
        yield Served(address, engine)
    engine.stop()


# Requests that schemathesis makes of the server's description of itself.


def of_the_description(served: Served, negative: bool, count: int) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
    schema = schemathesis.openapi.from_url(f"{served.address}/openapi.json")
    mode = schemathesis.GenerationMode.NEGATIVE if negative else schemathesis.GenerationMode.POSITIVE

    @of_hypothesis(max_examples=count, **COMMON)
    @given(case=schema.as_strategy(generation_mode=mode), ours=st.booleans())
    def send(case: Any, ours: bool) -> None:
        if ours and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "nano"  # else few would come as far as the rest
        response = case.call(timeout=SECONDS)
        check(response)
        case.validate_response(response, checks=checks)

    send()
    served.is_well()


@pytest.mark.parametrize("negative", [False, True])
def test_a_few_requests_made_of_the_description(served: Served, negative: bool) -> None:
    of_the_description(served, negative, 15)


@pytest.mark.slow
@pytest.mark.parametrize("negative", [False, True])
def test_many_requests_made_of_the_description(served: Served, negative: bool) -> None:
    of_the_description(served, negative, 300)


# Good requests in which something is exchanged: they come further.

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=40),
    st.sampled_from(
        ["", "\x00", "\ud800", "<image>", "{{ messages }}", "data:,", "file:///etc/passwd", "image://", "💥" * 99]
    ),
    st.lists(st.none() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=9), st.none() | st.integers(), max_size=3),
)
SHORT_TEXT = {"type": "string", "maxLength": 3}
FULL = good(
    n=2, seed=1, stop=["x"], temperature=0.5, top_p=0.9, logprobs=True, top_logprobs=2, visual_tokens=16, stream=False,
    response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SHORT_TEXT}},
    stream_options=None, max_completion_tokens=8,
)  # fmt: skip


def places(value: Any, place: tuple = ()) -> list[tuple]:
    """Of every value inside a value."""
    found = [place] if place else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*place, key))
    return found


def exchanged(value: Any, place: tuple, new: Any) -> Any:
    changed = copy.deepcopy(value)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return changed


def exchange(served: Served, count: int) -> None:
    @of_hypothesis(max_examples=count, **COMMON)
    @given(place=st.sampled_from(places(FULL)), new=JUNK, stream=st.booleans())
    def send(place: tuple, new: Any, stream: bool) -> None:
        changed = exchanged({**FULL, "stream": stream}, place, new)
        response = served.post(json.dumps(changed).encode())
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n") or '"error"' in response.text.splitlines()[-2]

    send()
    served.is_well()


def test_a_few_good_requests_with_something_exchanged(served: Served) -> None:
    exchange(served, 60)


@pytest.mark.slow
def test_many_good_requests_with_something_exchanged(served: Served) -> None:
    exchange(served, 600)


# Made by hand.


def bomb(width: int, height: int) -> bytes:
    """A PNG of so many black pixels, which takes almost no bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    squeezed = zlib.compressobj(9)
    rows = squeezed.compress(bytes(100_000))
    data = rows + squeezed.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe{}", 400),
        (b"null", 400),
        (b"[" * DEEP, 400),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, 400),
        (json.dumps(good()).encode() + b"x", 400),
        (json.dumps(good(seed=10**400)).encode(), 400),
        (b'{"model": "nano", "messages": [], "temperature": NaN}', 400),
        (b" " * (5 << 20), 413),
    ],
    ids=["empty", "cut", "no text", "null", "lists", "objects", "more behind", "huge number", "NaN", "blanks"],
)
def test_bodies(served: Served, content: bytes, status: int) -> None:
    assert served.post(content).status_code == status
    served.is_well()


@pytest.mark.parametrize(
    ("fields", "statuses"),
    [
        ({"messages": [{"role": "user", "content": "word " * 200_000}]}, {400}),
        ({"messages": [{"role": "user", "content": "<image><learnable>" * 20}]}, {200, 400}),
        ({"messages": [{"role": "user", "content": "a"}] * 2_000}, {400}),
        ({"stop": ["x" * 100_000] * 16}, {200, 400}),
        ({"guided_regex": "(a{1000}){1000}{1000}"}, {200, 400}),
        ({"guided_regex": "a" * 100_000}, {400}),
        ({"guided_json": {"enum": ["a" * 100_000]}}, {400}),
        ({"guided_regex": "(.*)*" * 500}, {200, 400, 503}),
        ({"guided_regex": "("}, {400}),
        ({"guided_choice": [str(number) for number in range(20_000)]}, {400}),
        ({"guided_json": {"$ref": "#"}}, {200, 400}),
        ({"guided_json": {"$ref": "http://127.0.0.1/a"}}, {400}),
        ({"guided_json": "[" * DEEP}, {400}),
        ({"guided_json": json.loads('{"a":' * 400 + "1" + "}" * 400)}, {200, 400}),
        ({"guided_json": {"type": "array", "minItems": 10**9}}, {200, 400, 503}),
        ({"max_tokens": 2**62}, {200, 400}),
        ({"n": 2**40}, {400}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields(served: Served, fields: dict[str, Any], statuses: set[int]) -> None:
    response = served.post(json.dumps(good(**fields)).encode())
    assert response.status_code in statuses, response.text[:300]
    served.is_well()


@pytest.mark.parametrize(
    "url",
    [
        data_url(noise_image())[:200],
        "data:image/png;base64," + "A" * 1000,
        "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>",
        "http://127.0.0.1/a.png",
        "http://[::ffff:169.254.169.254]/latest/meta-data/",
        "http://0x7f000001/a.png",
        "https://localhost/a.png",
        "http://user:word@10.0.0.1/",
        "http://" + "a" * 5000 + "/",
        "http://[/",
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "image://nothing",
        "gopher://",
    ],
)
def test_images(served: Served, url: str) -> None:
    message = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}],
    }
    assert served.post(json.dumps(good(messages=[message])).encode()).status_code in {400, 422}
    served.is_well()


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (1_001, 1_000)])
def test_bombs(served: Served, size: tuple[int, int]) -> None:
    """Too many pixels in few bytes, and what is no image, or half of one."""
    response = served.post(bomb(*size), "/v1/images", "image/png")
    assert response.status_code == 422
    for data in (b"", b"GIF89a", (ASSETS / "samples" / "scene.jpg").read_bytes()[:900], bytes(100_000)):
        assert served.post(data, "/v1/images", "image/png").status_code == 422
    served.is_well()


def test_clients_that_hang_up_in_mid_stream(served: Served) -> None:
    """Some at once, some after the first text, some in the middle of what they send."""
    chance = random.Random(0)
    long = json.dumps(good(stream=True, max_tokens=400, guided_regex="[a-z]{300}")).encode()
    for index in range(24):
        sent = long if index % 3 else long[: chance.randrange(len(long))]
        with connected(served.address, sent, length=len(long)) as connection:
            connection.settimeout(SECONDS)
            if index % 3 == 2:
                assert connection.recv(100)
    served.is_well()


def test_clients_that_are_slow_do_not_hold_up_the_others(served: Served) -> None:
    """They send a byte now and then, or do not read what they get."""
    long = json.dumps(good(stream=True, max_tokens=400, guided_regex="[a-z]{300}")).encode()
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(connected(served.address, long[:10], length=len(long))) for _ in range(20)]
        for _ in range(5):
            stack.enter_context(connected(served.address, long))
        for writer in writers:
            writer.sendall(long[10:11])
        started = time.monotonic()
        assert served.answer() == served.expected
        assert time.monotonic() - started < SECONDS / 2
    served.is_well()


def test_bad_requests_beside_good_ones(served: Served) -> None:
    """What goes wrong stays with the request it belongs to."""
    bad = [good(top_p=0), good(guided_regex="("), good(messages=[{"role": "user", "content": "a" * 50_000}]), {}]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        refused = [pool.submit(served.post, json.dumps(bad[index % 4]).encode()) for index in range(16)]
        answers = [pool.submit(served.answer) for _ in range(16)]
        assert {future.result().status_code for future in refused} == {400}
        assert {future.result() for future in answers} == {served.expected}
    served.is_well()

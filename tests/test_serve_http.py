"""The server: OpenAI's client and plain HTTP, what is refused and how, and what happens when a client hangs up."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from flashsloth.hub import ASSETS
from flashsloth.inference import FlashSloth, load
from flashsloth.serve.app import create_app
from flashsloth.serve.engine import Engine
from flashsloth.serve.forms import MakeGrammar
from flashsloth.serve.images import ImageStore
from flashsloth.serve.limits import read_api_keys
from flashsloth.serve.requests import Event, Finished, Overloaded, Piece, Request, TokenLogprob, Usage
from flashsloth.serve.settings import Settings
from flashsloth.serve.simple import OneAtATime
from flashsloth_cli.main import main
from running_server import CHAT, connected, data_url, running, wait_for
from tiny_session import noise_image

ROOT = Path(__file__).parents[1]
USAGE = Usage(10, 2, 4, 3, {"queue": 0.0, "prefill": 0.5})


def sample(name: str) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode((ASSETS / 'samples' / name).read_bytes()).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(text: str, *urls: str) -> dict[str, Any]:
    return {"role": "user", "content": [*map(image_part, urls), {"type": "text", "text": text}]}


def body(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "nano", "messages": list(messages) or [{"role": "user", "content": "what?"}], **fields}


class ScriptedTicket:
    def __init__(self, events: list[Event | Exception], pause: float, on_event: Callable[[], None]) -> None:
        self.cancelled = threading.Event()
        self._events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()

        def run() -> None:
            for event in events:
                if self.cancelled.wait(pause):
                    break
                self._events.put(event)
                on_event()

        threading.Thread(target=run, daemon=True).start()

    def get(self, timeout: float | None = None) -> Event:
        event = self._events.get(timeout=timeout)
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class Statistics:
    waiting: int = 7


class Scripted:
    """An engine that says what it is told to, and remembers what it was asked."""

    def __init__(self, *events: Event | Exception, pause: float = 0.0) -> None:
        self.script = list(events) or [Piece("yes"), Finished("stop", USAGE)]
        self.pause, self.is_accepting = pause, True
        self.asked: list[Request] = []
        self.tickets: list[ScriptedTicket] = []
        self.refusal: Exception | None = None
        self.statistics = Statistics

    def submit(self, request: Request, on_event: Callable[[], None]) -> ScriptedTicket:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(request)
        self.tickets.append(ScriptedTicket(self.script, self.pause, on_event))
        return self.tickets[-1]


def client_of(engine: Any, make_grammar: Any = None, **settings: Any) -> TestClient:
    return TestClient(create_app(engine, Settings(**settings), make_grammar), raise_server_exceptions=False)


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error, after a look at its form."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.fixture(scope="module")
def nano() -> FlashSloth:
    return load("nano", device="cpu")


@pytest.fixture(scope="module", params=[OneAtATime, Engine])
def nano_server(nano: FlashSloth, request: pytest.FixtureRequest) -> Iterator[str]:
    engine = request.param(nano)
    engine.start()
    with running(engine, MakeGrammar(nano)) as address:
        yield address
    engine.stop()


@pytest.fixture
def client(nano_server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{nano_server}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, *messages: Any, **fields: Any) -> Any:
    return client.chat.completions.create(model="nano", messages=list(messages), **fields)


# The client of OpenAI, and nano.


def test_a_chat_is_what_the_session_answers(client: openai.OpenAI, nano: FlashSloth) -> None:
    question = "how many circles are there?"
    expected = nano.ask(ASSETS / "samples" / "scene.jpg", question)
    found = ask(client, user(question, sample("scene.jpg")))
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == "stop"
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, expected.new_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens == expected.visual_tokens
    assert {"images", "queue", "preprocess", "encode", "compress", "prefill", "decode"} == set(found.timings)
    assert found.timings["encode"] > 0


def test_streams_end_with_what_they_took(client: openai.OpenAI) -> None:
    message = user("what is in the picture?", sample("scene.jpg"))
    whole = ask(client, message)
    *chunks, last = ask(client, message, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == [] and last.timings["decode"] > 0
    assert (last.usage.prompt_tokens, last.usage.total_tokens) == (whole.usage.prompt_tokens, whole.usage.total_tokens)
    assert all(chunk.usage is None for chunk in ask(client, message, stream=True))


def test_two_images_turns_and_text_alone(client: openai.OpenAI, nano: FlashSloth) -> None:
    two = ask(client, user("what?", sample("scene.jpg"), data_url(noise_image())))
    assert two.usage.prompt_tokens_details.image_tokens == 2 * nano.config.num_image_tokens
    conversation = nano.conversation(ASSETS / "samples" / "chart.jpg")
    questions = ["which one is the largest?", "which one is the smallest?"]
    expected = [conversation.ask(question).text for question in questions]
    first = ask(client, user(questions[0], sample("chart.jpg")))
    second = ask(
        client,
        user(questions[0], sample("chart.jpg")),
        first.choices[0].message.model_dump(),  # with all its empty fields
        user(questions[1]),
    )
    assert [first.choices[0].message.content, second.choices[0].message.content] == expected
    text = ask(client, {"role": "user", "content": "how many circles are there?"})
    assert text.choices[0].message.content == nano.ask([], "how many circles are there?").text
    assert text.usage.prompt_tokens_details.image_tokens == 0


def test_several_answers_are_made_with_the_seeds_that_follow(client: openai.OpenAI) -> None:
    message = user("what is it?", data_url(noise_image()))
    choices = {"temperature": 2.0, "max_tokens": 6}
    several = ask(client, message, n=3, seed=5, **choices)
    alone = [ask(client, message, seed=seed, **choices).choices[0].message.content for seed in (5, 6, 7)]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [choice.message.content for choice in several.choices] == alone and len(set(alone)) > 1


def test_log_probabilities(client: openai.OpenAI) -> None:
    found = ask(client, user("how many circles are there?", sample("scene.jpg")), logprobs=True, top_logprobs=2)
    tokens = found.choices[0].logprobs.content
    assert len(tokens) == found.usage.completion_tokens - 1  # the end of the sequence is no text
    assert "".join(token.token for token in tokens).strip() == found.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 2
        # greedy: the chosen token is the likeliest
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[0].logprob == token.logprob <= 0
        assert bytes(token.bytes).decode() == token.token


def test_stop_texts_end_an_answer_and_are_left_out(client: openai.OpenAI) -> None:
    message = user("what is on the receipt?", sample("sign.jpg"))
    whole = ask(client, message).choices[0].message.content
    assert len(whole) > 2
    for stop in (whole[1:3], [whole[2:], "never"]):
        stops = [stop] if isinstance(stop, str) else stop
        expected = whole[: min(place for text in stops if (place := whole.find(text)) >= 0)].rstrip()
        assert ask(client, message, stop=stop).choices[0].message.content == expected
        chunks = ask(client, message, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_answers_have_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    message = user("what shape is the red object?", sample("scene.jpg"))
    chosen = ask(client, message, extra_body={"guided_choice": ["circle", "cross"]}, n=2)
    assert [choice.message.content for choice in chosen.choices] == ["cross", "cross"]
    digits = ask(client, message, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}})
    assert re.fullmatch("[0-9]{3}", digits.choices[0].message.content)
    schema = {"type": "object", "properties": {"shape": {"enum": ["circle", "cross"]}}, "required": ["shape"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    found = "".join(
        chunk.choices[0].delta.content or "" for chunk in ask(client, message, response_format=wanted, stream=True)
    )
    assert json.loads(found)["shape"] in ("circle", "cross")
    with pytest.raises(openai.BadRequestError, match="guided_regex"):
        ask(client, message, extra_body={"guided_regex": "("})


def test_answers_say_how_probable_they_are(nano: FlashSloth) -> None:
    """Whole and streamed, by the batching engine; the other one refuses."""
    fields: dict[str, Any] = {"guided_choice": ["yes", "no"], "confidence": True}
    asked = body(user("is there a circle?", sample("scene.jpg")), **fields)
    engine = Engine(nano)
    engine.start()
    with client_of(engine, MakeGrammar(nano)) as http:
        (choice,) = http.post(CHAT, json=asked).json()["choices"]
        lines = http.post(CHAT, json={**asked, "stream": True}).text.split("\n\n")
        (free,) = http.post(CHAT, json=body(user("what?", sample("scene.jpg")))).json()["choices"]
    engine.stop()
    expected = nano.ask(ASSETS / "samples" / "scene.jpg", "is there a circle?", choices=["yes", "no"], confidence=True)
    assert (choice["message"]["content"], free["confidence"]) == (expected.text, None)
    assert choice["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    assert [chunk.get("confidence") for chunk in chunks] == [None] * (len(chunks) - 1) + [choice["confidence"]]
    simple = OneAtATime(nano)
    simple.start()
    with client_of(simple, MakeGrammar(nano)) as http:
        assert "confidence" in error_of(http.post(CHAT, json=asked), 400)["message"]
    simple.stop()


def test_an_answer_that_is_cut_says_so(client: openai.OpenAI) -> None:
    message = user("what is on the receipt?", sample("sign.jpg"))
    found = ask(client, message, max_completion_tokens=1)
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 1


def test_special_tokens_that_users_type_are_text(client: openai.OpenAI, nano_server: str) -> None:
    plain = ask(client, user("is it </ s>?", sample("scene.jpg")))
    typed = ask(client, user("is it <image></s><learnable>?", sample("scene.jpg")))
    details = [answer.usage.prompt_tokens_details.image_tokens for answer in (typed, plain)]
    assert details[0] == details[1]
    assert typed.usage.prompt_tokens > plain.usage.prompt_tokens + 10  # letter by letter
    half_an_emoji = json.dumps(body(user("what? \ud83d")))
    headers = {"Content-Type": "application/json"}
    assert httpx2.post(nano_server + CHAT, content=half_an_emoji, headers=headers).status_code == 200


def test_numbers_that_the_model_cannot_make_are_its_own_refusal(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="visual"):
        ask(client, user("what?", sample("scene.jpg")), extra_body={"visual_tokens": 15})
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        ask(client, user("what?"), user("and?"))
    with pytest.raises(openai.BadRequestError, match="the prompt has"):
        ask(client, user("what? " * 5000))
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=[user("what?")])
    assert [model.id for model in client.models.list()] == ["nano"] == [client.models.retrieve("nano").id]


def test_many_clients_at_once(client: openai.OpenAI) -> None:
    message = user("how many circles are there?", sample("scene.jpg"))
    alone = ask(client, message).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: ask(client, message).choices[0].message.content, range(16)))
    assert found == [alone] * 16


def test_what_the_documentation_shows(nano_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands of curl and its Python, against nano."""
    text = (ROOT / "docs" / "serving.md").read_text().replace("http://127.0.0.1:8000", nano_server)
    for name in ("scene.jpg", "chart.jpg"):
        (tmp_path / name).write_bytes((ASSETS / "samples" / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert commands
    for block in commands:
        done = subprocess.run(["bash", "-euc", block], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert '"error"' not in done.stdout and done.stdout, done.stdout
    (block,) = re.findall(r"^```python norun\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(block, "serving.md", "exec"), {})


# What the engine is asked, and how its answer is told.


def test_requests_are_passed_on() -> None:
    engine = Scripted()
    chat = body(
        {"role": "developer", "content": [{"type": "text", "text": "be short"}]},
        {"role": "user", "content": [image_part(data_url(noise_image(1))), {"type": "text", "text": "a <image>?"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, image_part(data_url(noise_image(2)))]},
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        seed=2**63 - 1,
        stop="x",
        n=2,
        visual_tokens=4,
        frequency_penalty=0,
        response_format={"type": "text"},
        user=None,
    )
    del chat["user"]
    assert client_of(engine).post(CHAT, json=chat).status_code == 200
    first, second = engine.asked
    assert [message["role"] for message in first.messages] == ["system", "user", "assistant", "user"]
    assert first.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "a <image>?"}]
    assert first.messages[3]["content"] == [{"type": "text", "text": "c"}, {"type": "image"}]
    assert [image.tobytes() for image in first.images] == [noise_image(seed).tobytes() for seed in (1, 2)]
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.stop) == (7, 0.5, 0.25, ("x",))
    assert (sampling.seed, second.sampling.seed) == (2**63 - 1, 0) and sampling.top_logprobs is None
    assert first.visual_tokens == 4


def test_what_a_request_leaves_out_is_the_servers() -> None:
    engine = Scripted()
    client = client_of(engine, max_tokens=9, visual_tokens=4)
    for url in ([], [data_url(noise_image())]):
        assert client.post(CHAT, json=body(user("what?", *url), logprobs=True)).status_code == 200
    text, image = engine.asked
    assert text.sampling.max_tokens == 9 and text.sampling.temperature == 0 and text.sampling.top_logprobs == 0
    assert (text.visual_tokens, image.visual_tokens) == (None, 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_object", None)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}},
            ("json_schema", {"type": "null"}),
        ),
        ({"guided_choice": ["yes", "no"]}, ("choice", ["yes", "no"])),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_json": '{"type": "null"}'}, ("json_schema", {"type": "null"})),
        ({"structured_outputs": {"choice": ["a"]}}, ("choice", ["a"])),
        ({"structured_outputs": {"json": {}}}, ("json_schema", {})),
        ({"structured_outputs": {"regex": "b"}}, ("regex", "b")),
        ({"structured_outputs": {"json_object": True}}, ("json_object", None)),
    ],
)
def test_structured_answers_are_asked_of_the_grammar(fields: dict[str, Any], expected: Any) -> None:
    engine = Scripted()
    client = client_of(engine, lambda kind, value: (kind, value))
    assert client.post(CHAT, json=body(**fields)).status_code == 200
    assert engine.asked[0].sampling.grammar == expected
    (field,) = fields
    error = error_of(client_of(engine).post(CHAT, json=body(**fields)), 400)
    assert error["param"] == field and "flashsloth[" in error["message"]


def test_a_grammar_that_is_none_is_the_clients_fault() -> None:
    def refuse(kind: str, value: Any) -> None:
        raise ValueError("unbalanced bracket")

    client = client_of(Scripted(), refuse)
    error = error_of(client.post(CHAT, json=body(guided_regex="(")), 400)
    assert error["param"] == "guided_regex" and "unbalanced" in error["message"]
    error = error_of(client.post(CHAT, json=body(guided_regex="a", guided_choice=["b"])), 400)
    assert "guided_regex" in error["message"] and "guided_choice" in error["message"]
    for text in ("{", "3", "[" * 100_000):
        assert error_of(client.post(CHAT, json=body(guided_json=text)), 400)["param"] == "guided_json"


def test_answers_of_the_engine_are_told() -> None:
    minus_infinity = TokenLogprob("b", float("-inf"), (98,))
    engine = Scripted(
        Piece("\u2028a", [(TokenLogprob("a", -0.5, (97,)), [minus_infinity])]), Piece("b"), Finished("length", USAGE)
    )
    client = client_of(engine)
    found = client.post(CHAT, json=body(n=2, logprobs=True, top_logprobs=1)).json()
    assert [choice["message"]["content"] for choice in found["choices"]] == ["\u2028ab"] * 2
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] == -9999.0
    assert found["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 6,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 2, "image_tokens": 4},
    }
    assert found["timings"]["prefill"] == 0.5
    with client.stream("POST", CHAT, json=body(n=2, stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.isascii() for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "\u2028ab"
        assert own[-1]["finish_reason"] == "length"


# What is refused.

LONG = "a" * 300


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"user": "me"}, "user"),
        ({"top_k": 3}, "top_k"),
        ({"logit_bias": {}}, "logit_bias"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"guided_grammar": "x"}, "guided_grammar"),
        ({"<text>": 1}, "<text>"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.0}, "n"),
        ({"stream": 1}, "stream"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop.1"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 1}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice.0"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"visual_tokens": 0}, "visual_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": ["hello"]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "system", "content": [image_part("data:,")]}]}, "messages.0.content.0"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "messages.1.role"),
        (
            {"messages": [user("a"), {"role": "assistant", "content": "b", "tool_calls": [1]}, user("c")]},
            "messages.1.tool_calls",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}]},
            "messages.0.content.0.image_url",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "low"}}]}
                ]
            },
            "messages.0.content.0.image_url.detail",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_is_not_honoured_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    engine = Scripted()
    content = json.dumps(body(**({"messages": [user("what?")]} | fields)))
    response = client_of(engine, lambda kind, value: None).post(
        CHAT, content=content, headers={"Content-Type": "application/json"}
    )
    error = error_of(response, 400)
    assert error["param"].startswith(param) and error["type"] == "invalid_request_error"
    assert not engine.asked


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{" * 50_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"[" * 1_000_000,
        b"1" * 10_000,
        b'{"model": "nano", "messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
        b'{"model": "nano", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "nano", "messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: content[:8].hex() or "nothing",
)
def test_bodies_that_are_no_request(content: bytes) -> None:
    client = client_of(Scripted())
    for kind in ("application/json", "text/plain", "multipart/form-data", None):
        error_of(client.post(CHAT, content=content, headers={"Content-Type": kind} if kind else {}), 400)


def test_errors_have_one_form() -> None:
    client = client_of(Scripted())
    error_of(client.get("/nothing"), 404)
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get(CHAT), 405)
    error_of(client.get("/v1/models/gpt"), 404)
    error = error_of(client.post(CHAT, json=body() | {"model": "gpt"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (ValueError("the prompt has 9 tokens"), 400, "9 tokens"),
        (ValueError("half an emoji \ud83d"), 400, "half an emoji"),
        (Overloaded(3.2), 429, "try again in 3 s"),
        (Overloaded(3.2, is_stopping=True), 503, "the server is shutting down; try again in 3 s"),
        (Broken("secret"), 503, "failed"),
        (MemoryError(), 503, "failed"),
        (Finished("cancelled", USAGE), 503, "given up"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_of_the_engine(failure: Any, status: int, message: str, stream: bool) -> None:
    late, early = Scripted(failure), Scripted()
    early.refusal = failure if isinstance(failure, Exception) else Broken()
    for engine in (early, late):
        client = client_of(engine)
        response = client.post(CHAT, json=body(stream=stream))
        if engine is late or isinstance(failure, Exception):
            assert message in error_of(response, status)["message"] and "secret" not in response.text
        assert ("retry-after" in response.headers) == (status in (429, 503))
        engine.refusal, engine.script = None, [Finished("stop", USAGE)]
        assert client.post(CHAT, json=body(stream=stream)).status_code == 200
    if status == 429:
        assert response.headers["retry-after"] == "3"


def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    engine = Scripted(Piece("a"), Broken("secret"))
    text = client_of(engine).post(CHAT, json=body(stream=True)).text
    last = text.strip().split("\n\n")[-1]
    assert '"a"' in text and "[DONE]" not in text and "secret" not in text
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    with running(Scripted(Piece("a"), Broken())) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        with pytest.raises(openai.APIError, match="failed"):
            list(ask(client, user("what?"), stream=True))


# Images.


def bomb(side: int) -> bytes:
    """A PNG of so many pixels a side, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("data:image/png;base64,AAAA", 422, "not an image"),
        ("data:image/png;base64,!", 422, "not valid base64"),
        ("data:image/png;base64", 422, "no comma"),
        ("data:,", 422, "empty"),
        (data_url(noise_image())[:-2000], 422, "truncated|base64"),
        ("data:;base64," + base64.b64encode(bomb(10_000)).decode(), 422, "pixels"),
        ("data:;base64," + "A" * 40_000, 413, "10,000 bytes"),
        ("data:," + "A" * 40_001, 422, "larger than the limit"),
        ("http://127.0.0.1/a.png", 422, "not public"),
        ("HTTP://localhost:22/", 422, "not public"),
        (" http://[::1]/", 422, "not public"),
        ("http://169.254.169.254/latest/meta-data", 422, "not public"),
        ("http://0x7f000001/", 422, "not public"),
        ("http://[::ffff:10.0.0.1]/", 422, "not public"),
        ("http://user@127.0.0.1/", 422, "user name"),
        ("http://", 422, "not an http or https address"),
        ("file:///etc/passwd", 422, "reads no local files"),
        ("FILE:/etc/passwd", 422, "reads no local files"),
        ("/etc/passwd", 400, "named by"),
        ("ftp://example.com/a.png", 400, "named by"),
        ("image://image-0", 400, "no upload"),
        ("\x00", 400, "named by"),
    ],
)
def test_images_that_are_refused(url: str, status: int, message: str) -> None:
    engine = Scripted()
    client = client_of(engine, max_image_bytes=10_000, max_pixels=1_000_000)
    error = error_of(
        client.post(CHAT, json=body(user("a"), {"role": "assistant", "content": "b"}, user("c", url))), status
    )
    assert error["param"] == "messages.2.content.0.image_url.url" and re.search(message, error["message"])
    assert not engine.asked
    assert client.post(CHAT, json=body(user("what?", data_url(noise_image())))).status_code == 200


@contextlib.contextmanager
def web_server(answer: bytes, pause: float = 0.0) -> Iterator[str]:
    """Says the same to everyone."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(65536)
                        time.sleep(pause)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def http_answer(content: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n{headers}\r\n".encode() + content


def test_images_behind_urls() -> None:
    encoded = io.BytesIO()
    noise_image().save(encoded, "PNG")
    engine = Scripted()
    client = client_of(engine, allow_private_urls=True, fetch_seconds=1, max_image_bytes=10_000)
    with web_server(http_answer(encoded.getvalue())) as good:
        assert client.post(CHAT, json=body(user("what?", good + "/a.png"))).status_code == 200
        assert engine.asked[0].images[0].tobytes() == noise_image().tobytes()
        with web_server(http_answer(b"", "302 Found", f"Location: {good}\r\n")) as redirecting:
            assert client.post(CHAT, json=body(user("what?", redirecting))).status_code == 200
    for answer, status in ((http_answer(b"", "404 Not Found"), 422), (http_answer(b"a" * 10_001), 413)):
        with web_server(answer) as address:
            error_of(client.post(CHAT, json=body(user("what?", address))), status)
    with web_server(http_answer(b"a"), pause=5) as slow:
        assert "within" in error_of(client.post(CHAT, json=body(user("what?", slow))), 422)["message"]


def test_local_files_only_under_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    root.mkdir()
    noise_image().save(outside)
    noise_image().save(root / "a b.png")
    (root / "link.png").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    client = client_of(Scripted(), image_root=root)
    good = (root / "a b.png").as_uri()
    assert client.post(CHAT, json=body(user("what?", good))).status_code == 200
    for url in (
        outside.as_uri(),
        (root / "link.png").as_uri(),
        f"file://{root}/../outside.png",
        f"file://{root}/%2e%2e/outside.png",
        f"file://{root}/%00.png",
        f"file://{root}/missing.png",
        f"file://{root}/loop.png",
        f"file://elsewhere{root}/a%20b.png",
        f"file://{tmp_path}/root2/a.png",
        f"file://{root}",
    ):
        error_of(client.post(CHAT, json=body(user("what?", url))), 422)


def test_there_are_limits_on_images() -> None:
    engine = Scripted(pause=0.3)
    url = data_url(noise_image(size=(100, 100)))
    with client_of(engine, max_images=2, max_pixels_in_flight=20_000) as client:
        error = error_of(client.post(CHAT, json=body(user("what?", url, url, url))), 422)
        assert "3 images" in error["message"]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            statuses = list(
                pool.map(lambda _: client.post(CHAT, json=body(user("a", url, url))).status_code, range(2))
            )
        assert sorted(statuses) == [200, 429]
        assert client.post(CHAT, json=body(user("a", url, url))).status_code == 200  # what was taken is given back


def test_uploads_are_named_by_any_number_of_chats() -> None:
    engine = Scripted()
    client = client_of(engine, max_image_bytes=10_000, image_store_bytes=10_000)
    encoded = io.BytesIO()
    noise_image().save(encoded, "PNG")
    uploaded = client.post("/v1/images", content=encoded.getvalue(), headers={"Content-Type": "image/png"}).json()
    assert (uploaded["object"], uploaded["width"], uploaded["height"]) == ("image", 40, 30)
    for _ in range(2):
        assert client.post(CHAT, json=body(user("what?", uploaded["url"]))).status_code == 200
    assert [request.images[0].tobytes() for request in engine.asked] == [noise_image().tobytes()] * 2
    for content, kind, status in (
        (b"", "image/png", 422),
        (b"GIF89a", "image/png", 422),
        (b"a" * 10_001, "image/png", 413),
        (encoded.getvalue(), "multipart/form-data", 415),
        (encoded.getvalue(), "text/plain", 415),
    ):
        error_of(client.post("/v1/images", content=content, headers={"Content-Type": kind}), status)
    large = io.BytesIO()
    Image.new("RGB", (100, 100)).save(large, "PNG")
    error_of(client.post("/v1/images", content=large.getvalue(), headers={"Content-Type": "image/png"}), 413)


def test_the_store_of_uploads_has_room_for_the_last() -> None:
    store = ImageStore(2 * 40 * 30 * 3)
    first, second = store.put(noise_image(1)), store.put(noise_image(2))
    assert store.put(noise_image(1)) == first  # and is used
    third = store.put(noise_image(3))
    assert [store.get(name) is None for name in (first, second, third)] == [False, True, False]
    # the same bytes in another shape are another picture
    assert store.put(Image.new("RGB", (2, 3))) != store.put(Image.new("RGB", (3, 2)))


# Who is let in.


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(Scripted(), api_keys=("one", "two"))
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "one"}, {"Authorization": "Bearer \xff"}):
        for response in (
            client.post(CHAT, json=body(), headers={k: v.encode("latin-1") for k, v in headers.items()}),
            client.post(CHAT, content=b"{", headers={k: v.encode("latin-1") for k, v in headers.items()}),
            client.get("/v1/models", headers={k: v.encode("latin-1") for k, v in headers.items()}),
        ):
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    for key in ("one", "two"):
        assert client.post(CHAT, json=body(), headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200

    (tmp_path / "keys").write_text("c\n\n d \n")
    monkeypatch.setenv("FLASHSLOTH_API_KEY", "b, a")
    assert read_api_keys(["a"], tmp_path / "keys") == ("a", "b", "c", "d")
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_api_keys((), tmp_path / "keys")
    with pytest.raises(ValueError, match="printable"):
        read_api_keys(["a b"])


def test_requests_have_a_size() -> None:
    client = client_of(Scripted(), max_body_bytes=1000)
    long = body({"role": "user", "content": "a" * 1000})
    assert "1,000 bytes" in error_of(client.post(CHAT, json=long), 413)["message"]

    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b"a" * 100

    error_of(client.post(CHAT, content=parts()), 413)
    assert client.post(CHAT, json=body()).status_code == 200


def test_requests_are_counted() -> None:
    engine = Scripted(pause=0.5)
    with client_of(engine, max_in_flight=3) as client:

        def post(n: int) -> Any:
            return client.post(CHAT, json=body(n=n))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            responses = list(pool.map(post, [2, 2, 1, 1]))
        refused = [response for response in responses if response.status_code == 429]
        assert refused and any(response.status_code == 200 for response in responses)
        assert all(response.headers["retry-after"] for response in refused)
        assert client.post(CHAT, json=body(n=3)).status_code == 200


def test_requests_have_a_time() -> None:
    for script in ([], [Piece("a")]):
        engine = Scripted(*script, pause=0.05)
        engine.script = script
        with client_of(engine, request_seconds=0.3) as client:
            response = client.post(CHAT, json=body())
            assert error_of(response, 503)["code"] == "timeout" and response.headers["retry-after"]
            text = client.post(CHAT, json=body(stream=True)).text
            assert "[DONE]" not in text and '"timeout"' in text
        assert all(ticket.cancelled.is_set() for ticket in engine.tickets)


def test_clients_that_send_slowly_are_left() -> None:
    with running(Scripted(), body_seconds=0.3) as address:
        with connected(address, b"{", length=9) as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        assert httpx2.post(address + CHAT, json=body()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(stream: bool) -> None:
    engine = Scripted(*[Piece("a")] * 10_000, pause=0.02)
    with running(engine, max_in_flight=2) as address:
        with connected(address, json.dumps(body(stream=stream, n=2)).encode()) as connection:
            wait_for(lambda: len(engine.tickets) == 2)
            if stream:
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            assert not any(ticket.cancelled.is_set() for ticket in engine.tickets)
        wait_for(lambda: all(ticket.cancelled.is_set() for ticket in engine.tickets))
        engine.script = [Finished("stop", USAGE)]
        wait_for(lambda: httpx2.post(address + CHAT, json=body(n=2)).status_code == 200)
        assert "flashsloth_cancelled_total 1.0" in httpx2.get(address + "/metrics").text


def test_a_client_that_never_reads_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsloth.serve.streaming.GRACE_SECONDS", 0.5)
    engine = Scripted(*[Piece("a" * 100_000)] * 500)
    content = json.dumps(body(stream=True)).encode()
    with running(engine, request_seconds=3, max_in_flight=1) as address, connected(address, content):
        wait_for(lambda: engine.tickets)
        engine.script = [Finished("stop", USAGE)]
        assert httpx2.post(address + CHAT, json=body()).status_code == 429
        wait_for(lambda: httpx2.post(address + CHAT, json=body()).status_code == 200)


# Beside the chats.


def test_a_server_that_is_not_ready_says_so() -> None:
    engine = Scripted()
    client = client_of(engine)
    assert client.get("/ready").json() == {"status": "ready"}
    engine.is_accepting = False
    assert client.get("/health").json() == {"status": "ok"}
    for response in (client.get("/ready"), client.post(CHAT, json=body())):
        assert error_of(response, 503)["type"] == "server_error" and response.headers["retry-after"]


def test_metrics() -> None:
    client = client_of(Scripted())
    client.post(CHAT, json=body(n=2))
    client.post(CHAT, json=body(top_k=1))
    client.get("/nothing")
    text = client.get("/metrics").text
    for line in (
        f'flashsloth_requests_total{{path="{CHAT}",status="200"}} 1.0',
        f'flashsloth_requests_total{{path="{CHAT}",status="400"}} 1.0',
        'flashsloth_requests_total{path="other",status="404"} 1.0',
        'flashsloth_tokens_total{kind="prompt"} 20.0',
        'flashsloth_tokens_total{kind="completion"} 6.0',
        'flashsloth_stage_seconds_total{stage="prefill"} 1.0',
        "flashsloth_first_text_seconds_count 1.0",
        "flashsloth_in_flight 0.0",
        "flashsloth_ready 1.0",
        "flashsloth_engine_waiting 7.0",
    ):
        assert line in text


def test_the_description_has_every_field_and_status() -> None:
    document = client_of(Scripted()).get("/openapi.json").json()
    chat = document["paths"][CHAT]["post"]
    assert {"200", "400", "401", "404", "408", "413", "422", "429", "503"} == set(chat["responses"])
    schema = document["components"]["schemas"]["ChatRequest"]
    assert schema["additionalProperties"] is False and "visual_tokens" in schema["properties"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


# The command.


def test_the_command_drains_at_sigterm(tmp_path: Path) -> None:
    """A stream under way is finished, what comes later is refused, and the process ends well."""
    command = [sys.executable, "-m", "flashsloth_cli", "serve", "--port", "0", "--device", "cpu", "--name", "mine"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env={**os.environ, "FLASHSLOTH_API_KEY": "key"})
    try:
        wait_for(lambda: "is served at" in log.read_text() or process.poll() is not None, 60)
        address = re.findall(r"http://[\d.:]+/v1", log.read_text())[0]
        client = openai.OpenAI(base_url=address, api_key="key", max_retries=0)
        # a temperature at which nano does not end by itself
        sampling = {"temperature": 2.0, "seed": 1, "max_tokens": 60}
        message = user("what is it?", data_url(noise_image()))
        stream = client.chat.completions.create(model="mine", messages=[message], stream=True, **sampling)
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in [first, *stream]]
        assert reasons[-1] in ("stop", "length")
        assert process.wait(20) == 0, log.read_text()
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    finally:
        process.kill()
        process.wait()


def test_draining_refuses_what_is_new_and_gives_up_what_is_late() -> None:
    engine = Scripted(*[Piece("a")] * 10_000, pause=0.02)
    with client_of(engine, drain_seconds=0.3) as client:
        service = client.app.state.service
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            late = pool.submit(client.post, CHAT, json=body())
            wait_for(lambda: engine.tickets)
            client.portal.call(service.drain)
            for response in (client.post(CHAT, json=body()), client.get("/ready"), late.result()):
                assert "stopping" in error_of(response, 503)["message"]


def test_the_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--port", port], "cannot listen on 127.0.0.1"),
            (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
            (["--engine", "steam"], "no engine 'steam'"),
            (["--image-root", str(tmp_path / "missing")], "is no folder"),
            (["--api-key-file", str(tmp_path / "missing"), "--port", "0"], "missing"),
            (["--api-key", "a b", "--port", "0"], "printable"),
            (["--visual-tokens", "15", "--port", "0"], "visual"),
            ([str(tmp_path / "no-model"), "--port", "0"], "no-model"),
        ):
            assert main(["serve", *arguments]) == 2
            lines = capsys.readouterr().err.strip().splitlines()
            assert message in lines[-1] and lines[-1].startswith("error:"), lines
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "flashsloth.serve.app")
    assert main(["serve", "--port", "0"]) == 2
    assert "pip install 'flashsloth[serve]'" in capsys.readouterr().err

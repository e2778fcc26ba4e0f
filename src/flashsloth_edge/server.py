"""An HTTP server for OpenAI's clients on the standard library: /v1/chat/completions, /v1/models, /health.

One question is answered at a time. Images come as data URLs, or as http(s) URLs of public addresses.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from .session import Conversation, EdgeModel
from .shared.answer import Answer

MOST_BODY_BYTES = 64 * 1024 * 1024
SAMPLING_FIELDS = ("top_p", "seed")
URL_SCHEMES = ("data:", "http://", "https://")


class RequestError(ValueError):
    """What a client did wrong, with the status to answer."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


def read_request(model: EdgeModel, body: dict[str, Any], most_tokens: int | None) -> tuple[Conversation, str, dict]:
    """The conversation of a request, its last question, and the options of the answer.

    Raises:
        RequestError: a request that cannot be answered.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message")
    system, texts, images = None, [], []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer") and index == 0:
            system, found = _content(message)
        elif role == ("assistant" if len(texts) % 2 else "user"):
            text, found = _content(message)
            if found and texts:
                raise RequestError("images belong into the first user message")
            texts.append(text)
            images += found
        else:
            raise RequestError(f"message {index + 1} has the role {role!r}; user and assistant must alternate")
    if len(texts) % 2 == 0:
        raise RequestError("the last message must be the user's")
    conversation = model.conversation(images, system)
    conversation.texts = texts[:-1]
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or most_tokens
    options: dict[str, Any] = {} if limit is None else {"max_new_tokens": limit}
    temperature = body.get("temperature")
    if temperature:
        options |= {"do_sample": True, "temperature": float(temperature)}
        options |= {name: body[name] for name in SAMPLING_FIELDS if body.get(name) is not None}
    elif temperature == 0:
        options["do_sample"] = False
    return conversation, texts[-1], options


def _content(message: dict[str, Any]) -> tuple[str, list[str]]:
    content = message.get("content")
    if isinstance(content, str):
        return content, []
    texts, images = [], []
    parts: list[Any] = content if isinstance(content, list) else [None]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            source = part.get("image_url")
            url = source.get("url") if isinstance(source, dict) else source
            if not isinstance(url, str) or not url.lower().startswith(URL_SCHEMES):  # never a file of this machine
                raise RequestError("image_url must hold a data URL or an http(s) URL")
            images.append(url)
        else:
            raise RequestError('content must be text or a list of parts of type "text" and "image_url"')
    return "".join(texts), images


class Handler(BaseHTTPRequestHandler):
    """Answers one connection. `model`, `lock` and `most_tokens` are set by `make_server`."""

    model: EdgeModel
    lock: Lock
    most_tokens: int | None
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send({"status": "ok"})
        elif self.path == "/v1/models":
            self._send({"object": "list", "data": [{"id": self.model.name, "object": "model"}]})
        else:
            self._refuse(f"there is nothing at {self.path}", HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if self.path != "/v1/chat/completions":
            self._refuse(f"there is nothing at {self.path}", HTTPStatus.NOT_FOUND)
            return
        try:
            body = self._body()
            conversation, question, options = read_request(self.model, body, self.most_tokens)
            with self.lock:
                if body.get("stream"):
                    self._stream(conversation, question, options)
                else:
                    self._send(self._completion(conversation.ask(question, **options)))
        except RequestError as error:
            self._refuse(str(error), error.status)
        except (ValueError, OSError, TypeError) as error:
            self._refuse(str(error), HTTPStatus.BAD_REQUEST)

    def _body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length") or 0)
        if length > MOST_BODY_BYTES:
            self.close_connection = True
            raise RequestError(
                f"the request has {length:,} bytes, at most {MOST_BODY_BYTES:,} are taken",
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
        try:
            body = json.loads(self.rfile.read(length))
        except ValueError as error:
            raise RequestError(f"the request is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise RequestError("the request must be a JSON object")
        return body

    def _completion(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        return {
            **self._head("chat.completion"),
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.new_tokens,
                "total_tokens": answer.prompt_tokens + answer.new_tokens,
            },
        }

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.model.name}

    def _stream(self, conversation: Conversation, question: str, options: dict[str, Any]) -> None:
        conversation.encode()  # a bad image is refused before the answer begins
        stream = conversation.stream(question, **options)
        head = self._head("chat.completion.chunk")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def deltas() -> Iterator[dict[str, Any]]:
            for piece in stream:
                yield {"index": 0, "delta": {"role": "assistant", "content": piece}, "finish_reason": None}
            yield {"index": 0, "delta": {}, "finish_reason": "stop"}

        for delta in deltas():
            self._event({**head, "choices": [delta]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _send(self, value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, message: str, status: HTTPStatus) -> None:
        self._send({"error": {"message": message, "type": "invalid_request_error"}}, status)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: they hold pictures and questions of users."""


def make_server(model: EdgeModel, host: str, port: int, most_tokens: int | None) -> ThreadingHTTPServer:
    """A server that is not started yet; port 0 takes a free one."""
    own = type("ModelHandler", (Handler,), {"model": model, "lock": Lock(), "most_tokens": most_tokens})
    return ThreadingHTTPServer((host, port), own)


def serve(
    model: EdgeModel, host: str, port: int, most_tokens: int | None, say: Callable[[str], None] = lambda _: None
) -> None:
    """Serve until interrupted.

    Raises:
        OSError: the address is in use or not of this machine.
    """
    with make_server(model, host, port, most_tokens) as server:
        say(f"http://{host}:{server.server_address[1]}/v1 answers for {model.name}")
        server.serve_forever()

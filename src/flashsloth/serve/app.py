"""An OpenAI-compatible server in front of an engine."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from PIL import Image
from starlette.exceptions import HTTPException

from .chat import MakeGrammar, Source, check_chat, constraint, make_requests, read_grammar, read_messages
from .errors import (
    BAD_REQUEST,
    INTERNAL,
    NOT_FOUND,
    REQUEST_TIMEOUT,
    TOO_LARGE,
    TOO_MANY,
    UNAUTHORIZED,
    UNAVAILABLE,
    UNPROCESSABLE,
    UNSUPPORTED_MEDIA,
    ApiError,
)
from .images import UPLOADED, ImageReader, PixelCount
from .limits import UPLOADS, Gate, State
from .metrics import Metrics
from .pending import Answers, ClientGone, Engine
from .requests import Event
from .schemas import (
    ChatCompletion,
    ChatRequest,
    ErrorBody,
    ModelCard,
    ModelList,
    Status,
    UploadedImage,
    field_path,
)
from .settings import Settings
from .streaming import EventStream, Reply, collect, encode

CLIENT_CLOSED_REQUEST = 499  # nobody reads it but the counters
UNKNOWN_FIELD = "extra_forbidden"  # pydantic's name
MOST_ERRORS = 5  # of one request, in a message
# Threads that prepare requests; more would only share the processor.
PREPARERS = max(2, min(8, os.cpu_count() or 1))
IMAGE_TYPES = ("image/", "application/octet-stream")

WHAT = {
    BAD_REQUEST: "A field is wrong, or not supported.",
    UNAUTHORIZED: "The API key is missing or wrong.",
    NOT_FOUND: "There is no such model.",
    REQUEST_TIMEOUT: "The request was sent too slowly.",
    TOO_LARGE: "The request or an image has too many bytes.",
    UNPROCESSABLE: "An image cannot be used, or there are too many.",
    TOO_MANY: "The server is busy; see Retry-After.",
    UNAVAILABLE: "The server starts, stops, or ran out of time; see Retry-After.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": WHAT[status]} for status in statuses}


GUARDED_ERRORS = _errors(UNAUTHORIZED, REQUEST_TIMEOUT, TOO_LARGE, TOO_MANY, UNAVAILABLE)
UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            name: {"schema": {"type": "string", "format": "binary"}}
            for name in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
        },
    }
}


class Service:
    """What the routes share.

    Args:
        engine: makes the answers.
        settings: of the server.
        make_grammar: makes constraints on answers; None where the library for it is missing.
    """

    def __init__(self, engine: Engine, settings: Settings, make_grammar: MakeGrammar | None) -> None:
        self.engine, self.settings, self.make_grammar = engine, settings, make_grammar
        self.state = State()
        self.metrics = Metrics(lambda: self.state.in_flight, lambda: self.ready, engine.statistics)
        self.reader = ImageReader(settings)
        self.pixels = PixelCount(settings.max_pixels_in_flight, settings.retry_after)
        self.executor = ThreadPoolExecutor(PREPARERS, thread_name_prefix="flashsloth-prepare")
        self.created = int(time.time())
        self._under_way: set[Answers] = set()

    @property
    def ready(self) -> bool:
        return bool(self.engine.is_accepting) and not self.state.draining

    def drain(self) -> None:
        """Refuse new requests, and give those under way `drain_seconds`. Called in the server's event loop."""
        if not self.state.draining:
            self.state.draining = True
            asyncio.get_running_loop().call_later(self.settings.drain_seconds, self._stop)

    def _stop(self) -> None:
        for answers in list(self._under_way):
            answers.fail(self._unavailable("the server is stopping"))

    def close(self) -> None:
        self.reader.close()
        self.executor.shutdown(wait=False, cancel_futures=True)

    def _unavailable(self, message: str) -> ApiError:
        return ApiError(UNAVAILABLE, message, retry_after=self.settings.retry_after)

    @contextlib.contextmanager
    def answers(self, request: Request, count: int, deadline: float) -> Iterator[Answers]:
        """Room for so many answers, which the client's hanging up ends.

        Raises:
            ApiError: there is none.
        """
        if not self.engine.is_accepting:
            raise self._unavailable("the model is not ready yet")
        if self.state.answers + count > self.settings.max_in_flight:
            message = "the server has as many answers under way as it takes"
            raise ApiError(TOO_MANY, message, code="overloaded", retry_after=self.settings.retry_after)
        answers = Answers(self.engine, self.executor, deadline, self.settings.retry_after)
        watcher = asyncio.create_task(self._watch(request, answers))
        self._under_way.add(answers)
        self.state.answers += count
        try:
            yield answers
        finally:
            watcher.cancel()
            answers.cancel()
            self._under_way.discard(answers)
            self.state.answers -= count

    async def _watch(self, request: Request, answers: Answers) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.metrics.cancelled.inc()
        answers.fail(ClientGone())

    async def images(self, sources: list[Source], stack: contextlib.ExitStack) -> list[Image.Image]:
        """All images of a request; their pixels are given back when the stack is closed."""

        async def read(source: Source) -> Image.Image:
            image = await self.reader.read(source.url, source.field)
            stack.callback(self.pixels.give_back, self.pixels.take(image))
            return image

        # All are waited for, so that none is counted after the stack is closed.
        found = await asyncio.gather(*map(read, sources), return_exceptions=True)
        for image in found:
            if isinstance(image, BaseException):
                raise image
        return [image for image in found if isinstance(image, Image.Image)]

    async def chat(self, chat: ChatRequest, request: Request) -> ChatCompletion | Response:
        """The answer to a chat request, or a response that streams it.

        Raises:
            ApiError: see `WHAT`.
        """
        started = time.monotonic()
        deadline = started + self.settings.request_seconds
        check_chat(chat, self.settings)
        messages, sources = read_messages(chat, self.settings.max_images)
        count = chat.n or 1
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: self.metrics.request_seconds.observe(time.monotonic() - started))
            answers = stack.enter_context(self.answers(request, count, deadline))
            with anyio.move_on_after(self.settings.request_seconds) as clock:
                grammar = None if constraint(chat) is None else await self._grammar(chat)
                before_images = time.monotonic()
                images = await self.images(sources, stack)
                image_seconds = time.monotonic() - before_images
                await answers.submit(make_requests(chat, messages, images, grammar, self.settings))
            if clock.cancelled_caught:
                raise self._unavailable("the time for one request is over")
            reply = Reply(chat.model, count, bool(chat.logprobs), image_seconds)
            stack.callback(lambda: self.metrics.count(reply.usages()))
            on_text = self._first_text_clock(started)
            try:
                if not chat.stream:
                    return await collect(answers, reply, on_text)
                # What goes wrong before the first text has a status of its own.
                events = answers.events()
                first = await anext(events)
            except ClientGone:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            include_usage = bool(chat.stream_options and chat.stream_options.include_usage)
            content = encode(_again(first, events), reply, include_usage, on_text)
            return EventStream(content, stack.pop_all().close, deadline)
        raise AssertionError("the stack swallows no exception")

    async def _grammar(self, chat: ChatRequest) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, read_grammar, chat, self.make_grammar)

    def _first_text_clock(self, started: float) -> Callable[[], None]:
        seen = False

        def note() -> None:
            nonlocal seen
            if not seen:
                seen = True
                self.metrics.first_token_seconds.observe(time.monotonic() - started)

        return note

    async def upload(self, request: Request) -> UploadedImage:
        """Keep an image.

        Raises:
            ApiError: it is none, or too large.
        """
        kind = request.headers.get("content-type", "").strip().lower()
        if not kind.startswith(IMAGE_TYPES):
            message = "send the bytes of the image as the body, with an image's Content-Type, such as image/jpeg"
            raise ApiError(UNSUPPORTED_MEDIA, message)
        image = await self.reader.decode(await request.body())
        identifier = await asyncio.get_running_loop().run_in_executor(self.executor, self.reader.store.put, image)
        return UploadedImage(
            id=identifier, object="image", url=f"{UPLOADED}://{identifier}", width=image.width, height=image.height
        )

    def model_card(self) -> ModelCard:
        return ModelCard(id=self.settings.model_name, object="model", created=self.created, owned_by="flashsloth")


async def _again(first: list[tuple[int, Event]], rest: AsyncIterator) -> AsyncIterator[list[tuple[int, Event]]]:
    yield first
    async for events in rest:
        yield events


def create_app(engine: Engine, settings: Settings, make_grammar: MakeGrammar | None = None) -> FastAPI:
    """The server as an ASGI application; `app.state.service` is its `Service`.

    Args:
        engine: makes the answers.
        settings: names, keys and limits.
        make_grammar: from a kind ("choice", "regex", "json_object", "json_schema") and its value to a constraint for
            `Sampling.grammar`; None refuses requests for structured answers.
    """
    service = Service(engine, settings, make_grammar)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="FlashSloth",
        version=version("flashsloth"),
        summary="Questions about images, in the form of OpenAI's chat completions. What is not honoured is refused.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Gate, settings=settings, metrics=service.metrics, state=service.state)
    _answer_errors(app)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=GUARDED_ERRORS | _errors(BAD_REQUEST, NOT_FOUND, UNPROCESSABLE),
    )
    async def chat_completions(chat: ChatRequest, request: Request) -> Any:
        """Answer a chat. With `stream` the answer comes as server-sent events."""
        return await service.chat(chat, request)

    @app.post(
        UPLOADS,
        response_model=UploadedImage,
        responses=GUARDED_ERRORS
        | _errors(UNPROCESSABLE)
        | {UNSUPPORTED_MEDIA: {"model": ErrorBody, "description": "The body is not sent as an image."}},
        openapi_extra=UPLOAD_BODY,
    )
    async def upload_image(request: Request) -> Any:
        """Upload an image once; name it in any number of chats by the URL that this returns."""
        return await service.upload(request)

    @app.get("/v1/models", response_model=ModelList, responses=GUARDED_ERRORS)
    async def models() -> Any:
        """The model of this server."""
        return ModelList(object="list", data=[service.model_card()])

    @app.get("/v1/models/{model:path}", response_model=ModelCard, responses=GUARDED_ERRORS | _errors(NOT_FOUND))
    async def model_by_name(model: str) -> Any:
        """The model of this server, by its name."""
        if model != settings.model_name:
            raise ApiError(NOT_FOUND, f"there is no model {model!r:.200}", "model", "model_not_found")
        return service.model_card()

    @app.get("/health", response_model=Status)
    async def health() -> Any:
        """Whether the process answers."""
        return Status(status="ok")

    @app.get("/ready", response_model=Status, responses=_errors(UNAVAILABLE))
    async def ready() -> Any:
        """Whether requests are answered."""
        if not service.ready:
            message = "the server is stopping" if service.state.draining else "the model is not ready"
            raise ApiError(UNAVAILABLE, message, retry_after=settings.retry_after)
        return Status(status="ready")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Any:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Make the description without FastAPI's own form of errors, which no route has."""
    document = app.openapi()
    for path in document["paths"].values():
        for route in path.values():
            if "HTTPValidationError" in str(route["responses"].get(str(UNPROCESSABLE))):
                del route["responses"][str(UNPROCESSABLE)]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _answer_errors(app: FastAPI) -> None:
    """Every error has OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _validation_error(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(INTERNAL, "the server failed at this request").response()


def _validation_error(error: RequestValidationError) -> ApiError:
    """Names every field that is wrong, up to a few."""
    found = list(error.errors())
    if found[0]["type"] == "json_invalid":
        return ApiError(BAD_REQUEST, f"the body is no JSON: {found[0]['ctx']['error']}, at {found[0]['loc'][-1]}")
    lines = []
    for one in found[:MOST_ERRORS]:
        field = field_path(one["loc"], one["type"] == UNKNOWN_FIELD)
        reason = "it is not supported" if one["type"] == UNKNOWN_FIELD else str(one["msg"])
        lines.append(f"{(field or 'the body')[:200]}: {reason[:300]}")
    return ApiError(BAD_REQUEST, "; ".join(lines), field_path(found[0]["loc"], found[0]["type"] == UNKNOWN_FIELD))

"""Starts vLLM's OpenAI server, with this project's gate before it and its reader of images inside it."""

import json
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.launchers.api_server.entry import run_server_worker
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from ..limits import GUARDED, Gate, State
from ..metrics import Metrics
from ..settings import Settings
from . import IMAGE
from .media import CONNECTOR, read_images_within

# answered without a key, as those of the built-in server
ALIVE, READY = "/health", "/ready"  # vLLM listens only when it is ready
PUBLIC = (ALIVE, "/ping", "/version", "/metrics", "/docs", "/openapi.json")
# the grammar library of the built-in server; tiny models would fill JSON with white space
FORMS = {"backend": "guidance", "disable_any_whitespace": True}
_settings: list[Settings] = []
_on_start: list[Callable[[], None]] = []


class VllmGate:
    """ASGI middleware: keys, sizes and requests at once as in the built-in server; nothing beside its paths.

    vLLM asks for keys on some of its paths only, and has others that tell of the model or change the server.
    """

    def __init__(self, app: ASGIApp) -> None:
        state = State()
        metrics = Metrics(lambda: state.in_flight, lambda: True, lambda: state)
        self.gate = Gate(app, _settings[0], metrics, state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == READY:
            scope = {**scope, "path": ALIVE, "raw_path": ALIVE.encode()}
        if scope["type"] == "http" and not (scope["path"].startswith(GUARDED) or scope["path"] in PUBLIC):
            await JSONResponse({"error": {"message": "there is no such path"}}, 404)(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._start(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.gate(scope, receive, send)

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_say(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                _on_start[0]()

        await self.gate.app(scope, receive, send_and_say)


def server_arguments(folder: Path, settings: Settings, dtype: str, compiled: bool, options: Sequence[str]) -> Any:
    """Arguments of vLLM's server.

    Args:
        folder: of the model.
        settings: what vLLM itself has to know of them is among the arguments.
        dtype: as vLLM names it.
        compiled: compile, with CUDA graphs where there is a GPU.
        options: of vLLM, on top.

    Raises:
        ValueError: options that vLLM does not know.
    """
    parser = make_arg_parser(_Parser(prog="--vllm-options", add_help=False))
    # before what is given, which may say otherwise
    ours = ["--model", str(folder), "--dtype", dtype, "--structured-outputs-config", json.dumps(FORMS)]
    args = parser.parse_args([*ours, *options])
    args.served_model_name = [settings.model_name]
    args.enforce_eager = not compiled
    args.middleware = [f"{VllmGate.__module__}.{VllmGate.__qualname__}"]
    args.limit_mm_per_prompt = {**(args.limit_mm_per_prompt or {}), IMAGE: settings.max_images}
    args.enable_prompt_tokens_details = True
    args.shutdown_timeout = int(settings.drain_seconds)
    if settings.visual_tokens is not None:
        args.mm_processor_kwargs = {"visual_tokens": settings.visual_tokens}
    limit = {} if settings.max_tokens is None else {"max_new_tokens": settings.max_tokens}
    # greedy where a request says nothing, as the built-in server
    args.override_generation_config = {"temperature": 0.0, **limit, **(args.override_generation_config or {})}
    validate_parsed_serve_args(args)
    return args


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"--vllm-options: {message}")


def run(args: Any, settings: Settings, listening: socket.socket, on_start: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGTERM or SIGINT. To be called in the main thread.

    Args:
        args: as `server_arguments` makes them.
        listening: a socket that listens; closed at the end.
        on_start: called when requests are taken.
    """
    import uvloop

    os.environ["VLLM_MEDIA_CONNECTOR"] = CONNECTOR
    _settings[:], _on_start[:] = [settings], [on_start]
    read_images_within(settings)
    cli_env_setup()
    configure_logging_from_args(args)
    host, port = listening.getsockname()[:2]
    args.host, args.port = host, port

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # until uvicorn has handlers of its own
    uvloop.run(run_server_worker(f"http://{host}:{port}", listening, args))

"""`flashsloth serve`: an OpenAI-compatible server."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashsloth_cli import exported, messages, options
from flashsloth_cli.listening import listen

if TYPE_CHECKING:
    import socket

    from flashsloth.inference import FlashSloth
    from flashsloth.serve.settings import Settings

INSTALL_COMMAND = "pip install 'flashsloth[serve]'"
MEBIBYTE = 1 << 20
ENGINES = ("batching", "one-at-a-time", "vllm")
VLLM_INSTALL_COMMAND = "pip install 'flashsloth[vllm]'"
# what vLLM has no counterpart of, with its words for it where it has some
NOT_OF_VLLM = {
    "image_store_mib": "there are no uploads",
    "request_seconds": "requests have no time limit",
    "device": "vLLM takes the one that it was built for",
    "quantize": "vLLM quantizes by --vllm-options '--quantization SCHEME'",
    "share_equal_views": "every view is encoded",
    "page": "`flashsloth web --url` shows one for any server",
}


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Packaged model, folder, or hub id.")] = "nano",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in, better with an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; default: as it is named here.", show_default=False),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="batching: answers that are under way share every step of the model; one-at-a-time: in the order of "
            "the requests; vllm: vLLM, for several GPUs and machines.",
            metavar="ENGINE",
        ),
    ] = ENGINES[0],
    vllm_options: Annotated[
        str | None,
        typer.Option(
            help="Options of vLLM's server, in quotes; with --engine vllm.", metavar="OPTIONS", show_default=False
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients must send; may be repeated. Other users of the machine see it in the list of "
            "processes: prefer FLASHSLOTH_API_KEY (several with commas) or --api-key-file.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key a line.", show_default=False)] = None,
    image_root: Annotated[
        Path | None,
        typer.Option(help="Folder of which clients may name files (file:///...); default: none.", show_default=False),
    ] = None,
    allow_private_urls: Annotated[
        bool,
        typer.Option(
            "--allow-private-urls",
            help="Also fetch images from private, loopback and link-local addresses, which clients could use to look "
            "around in your network.",
        ),
    ] = False,
    max_images: Annotated[int, typer.Option(help="Images of one request.", min=0)] = 8,
    max_image_mib: Annotated[float, typer.Option(help="MiB of one encoded image.", min=0)] = 20,
    max_megapixels: Annotated[float, typer.Option(help="Million pixels of one image.", min=0)] = 50,
    max_body_mib: Annotated[float, typer.Option(help="MiB of one request, data URLs included.", min=0)] = 32,
    image_store_mib: Annotated[
        float, typer.Option(help="MiB of pixels kept of uploads (/v1/images); the oldest make room.", min=0)
    ] = 256,
    max_in_flight: Annotated[
        int, typer.Option(help="Answers waited for at once; more requests get status 429.", min=1)
    ] = 128,
    request_seconds: Annotated[
        float, typer.Option(help="Longest time for one request; then it gets status 503.", min=0.001)
    ] = 120,
    drain_seconds: Annotated[float, typer.Option(help="For answers under way after SIGTERM or Ctrl-C.", min=0)] = 30,
    page: Annotated[
        bool | None,
        typer.Option(
            "--page/--no-page",
            help="A page at / to try the model in a browser; default: where flashsloth[web] is installed.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    visual_tokens: options.VisualTokens = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compiled: options.Compile = False,
    share_equal_views: options.ShareEqualViews = False,
) -> None:
    """Serve a model to OpenAI's clients.

    Clients send chats with images to /v1/chat/completions; the API is described at /docs. --max-new-tokens and
    --visual-tokens hold where a request names none. SIGTERM and Ctrl-C let answers under way end.

    [bold]Examples[/bold]

      flashsloth serve
      flashsloth serve Tongbo/FlashSloth-3.2B --dtype bfloat16 --quantize int8-dynamic-cpu
      FLASHSLOTH_API_KEY=secret flashsloth serve runs/mine --name mine --host 0.0.0.0 --port 80
      flashsloth serve --image-root /data/photos --max-images 2
      flashsloth serve runs/mine --engine vllm --compile --vllm-options "--tensor-parallel-size 2 --max-model-len 4096"
    """
    exported.refuse(model, "serve")
    if engine not in ENGINES:
        raise ValueError(f"there is no engine {engine!r}; choose from {', '.join(ENGINES)}")
    if vllm_options is not None and engine != "vllm":
        raise ValueError("--vllm-options are for --engine vllm")
    if image_root is not None and not image_root.is_dir():
        raise ValueError(f"--image-root {image_root} is no folder")
    if engine == "vllm":
        _refuse_options(context)
    # Before the imports, which take seconds: clients that come during a restart wait instead of being refused.
    with listen(host, port) as listening:
        try:
            from flashsloth.serve.app import create_app
            from flashsloth.serve.server import run_server
        except ImportError as error:
            if (error.name or "").partition(".")[0] == "flashsloth":
                raise
            raise ImportError(f"flashsloth serve needs {error.name}; install it with: {INSTALL_COMMAND}") from error
        from flashsloth.serve.limits import read_api_keys
        from flashsloth.serve.settings import Settings

        settings = Settings(
            model_name=name or model,
            api_keys=read_api_keys(api_key or (), api_key_file),
            max_tokens=max_new_tokens,
            visual_tokens=visual_tokens,
            max_in_flight=max_in_flight,
            max_body_bytes=int(max_body_mib * MEBIBYTE),
            max_images=max_images,
            max_image_bytes=int(max_image_mib * MEBIBYTE),
            max_pixels=int(max_megapixels * 1e6),
            max_pixels_in_flight=max(Settings.max_pixels_in_flight, int(max_images * max_megapixels * 1e6)),
            image_store_bytes=int(image_store_mib * MEBIBYTE),
            image_root=image_root,
            allow_private_urls=allow_private_urls,
            request_seconds=request_seconds,
            drain_seconds=drain_seconds,
        )
        if engine == "vllm":
            _serve_by_vllm(model, settings, listening, dtype, compiled, shlex.split(vllm_options or ""))
            return
        page = options.has_page(page)
        session = options.load_session(model, device, dtype, quantize, compiled, share_equal_views)
        session.image_tokens(1, visual_tokens)  # refuses a number that the model cannot make
        if compiled:
            options.compile_now(session, [], max_new_tokens)
        settings = replace(settings, alpha_background=session.processor.image_processor.alpha_background)
        running = start_engine(engine, session, max_in_flight)
        try:
            app = create_app(running, settings, _make_grammar(session))
            if page:
                from flashsloth.web.page import mount_page
                from flashsloth.web.sources import InProcess

                source = InProcess({settings.model_name: (running, session)}, max_new_tokens)
                app = mount_page(app, source, settings)
            run_server(app, listening, lambda: _say_where(settings, listening, page))
        finally:
            running.stop()


def _say_where(settings: Settings, listening: socket.socket, page: bool) -> None:
    if not settings.api_keys and not is_loopback(listening.getsockname()[0]):
        messages.say("warning: other machines may ask without a key; see --api-key-file")
    url = url_of(listening)
    to_try = f", to be tried at {url}" if page else ""
    messages.say(f"{settings.model_name} is served at {url}/v1 (described at {url}/docs){to_try}; Ctrl-C stops it")


def _refuse_options(context: typer.Context) -> None:
    """Raises:
    ValueError: an option was given that vLLM does not honour.
    """
    for name, why in NOT_OF_VLLM.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise ValueError(f"--{name.replace('_', '-')} does not go with --engine vllm: {why}; leave it out")


def _serve_by_vllm(
    model: str, settings: Settings, listening: socket.socket, dtype: str, compiled: bool, given: list[str]
) -> None:
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise ImportError(
            f"flashsloth serve --engine vllm needs vllm; install it with: {VLLM_INSTALL_COMMAND} (on a CPU, see "
            "docs/vllm.md)"
        )
    from flashsloth import FlashSlothConfig, FlashSlothProcessor
    from flashsloth.checkpoints.hub import resolve

    folder = resolve(model)
    if settings.visual_tokens is not None:
        FlashSlothConfig.from_pretrained(folder).window_of(settings.visual_tokens)
    processor = FlashSlothProcessor.from_pretrained(folder)
    settings = replace(settings, alpha_background=processor.image_processor.alpha_background)
    from flashsloth.serve.vllm.launch import run, server_arguments

    args = server_arguments(folder, settings, dtype, compiled, given)
    run(args, settings, listening, lambda: _say_where(settings, listening, page=False))


def start_engine(name: str, session: FlashSloth, most: int) -> Any:
    """An engine that runs; `most` requests may wait."""
    from flashsloth.serve.engine import Engine, EngineSettings
    from flashsloth.serve.simple import OneAtATime

    one_at_a_time = name == "one-at-a-time"
    running = OneAtATime(session, most) if one_at_a_time else Engine(session, EngineSettings(max_queue=most))
    running.start()
    return running


def _make_grammar(session: FlashSloth) -> Any:
    """None where the installation has no structured answers."""
    from importlib.util import find_spec

    from flashsloth.serve.forms import MakeGrammar

    return None if find_spec("llguidance") is None else MakeGrammar(session)


def url_of(listening: socket.socket) -> str:
    """Where a listening socket is reached."""
    address, port = listening.getsockname()[:2]
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    import ipaddress

    return ipaddress.ip_address(address.partition("%")[0]).is_loopback

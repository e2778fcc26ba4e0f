"""`flashsloth web`: a page in the browser to try models on."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from flashsloth_cli import messages, options
from flashsloth_cli.listening import listen

URL_KEY_VARIABLE = "OPENAI_API_KEY"
MOST_WAITING = 64


def web(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Packaged models, folders, or hub ids, to choose from in the page; default: nano.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Ask a server that speaks OpenAI's protocol instead, such as http://127.0.0.1:8000/v1; its key, if "
            f"it wants one, is read from {URL_KEY_VARIABLE}. Its maps of attention cannot be seen.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 7860,
    browse: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open", help="Open the page in a browser; default: in a terminal.", show_default=False
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
) -> None:
    """Try models in the browser: images, questions, answers as they are made, and a map beside each.

    [bold]Examples[/bold]

      flashsloth web
      flashsloth web nano runs/mine
      flashsloth web --url http://127.0.0.1:8000/v1
    """
    options.has_page(True)
    if url is not None and models:
        raise ValueError(f"--url takes the place of models, but {', '.join(models)} is given, too; leave out one")
    from fastapi import FastAPI

    from flashsloth.serve.app import create_app
    from flashsloth.serve.limits import read_api_keys
    from flashsloth.serve.server import run_server
    from flashsloth.serve.settings import Settings
    from flashsloth.web.page import mount_page
    from flashsloth.web.sources import InProcess, Remote
    from flashsloth_cli.commands.serve import ENGINES, is_loopback, start_engine, url_of

    names = models or ["nano"]
    settings = Settings(names[0], read_api_keys(), max_new_tokens)
    engines: list[Any] = []
    listening = listen(host, port)
    with listening:
        try:
            app: FastAPI
            source: InProcess | Remote
            if url is not None:
                app, source = FastAPI(openapi_url=None), Remote(url, os.environ.get(URL_KEY_VARIABLE))
            else:
                sessions = {name: options.load_session(name, device, dtype, quantize) for name in names}
                running = {}
                for name, session in sessions.items():
                    engines.append(start_engine(ENGINES[0], session, MOST_WAITING))
                    running[name] = (engines[-1], session)
                app, source = create_app(engines[0], settings), InProcess(running, max_new_tokens)

            def say_where() -> None:
                if not settings.api_keys and not is_loopback(listening.getsockname()[0]):
                    messages.say("warning: other machines may ask without a key; set FLASHSLOTH_API_KEY to want one")
                messages.say(f"the page is at {url_of(listening)}; Ctrl-C stops it")
                if sys.stdout.isatty() if browse is None else browse:
                    import webbrowser

                    webbrowser.open(url_of(listening))

            run_server(mount_page(app, source, settings), listening, say_where)
        finally:
            for engine in engines:
                engine.stop()

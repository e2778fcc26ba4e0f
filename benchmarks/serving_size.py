"""A server of a large model with random weights: how soon it is ready and answers, and in what memory."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import machine
from offline_throughput import SHAPES
from serving_client import Outcome, run_clients, served
from serving_load import MEBIBYTE, Bodies, write

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, inference
from flashsloth.model.processing_flashsloth import FlashSlothProcessor

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Folder = Annotated[Path, typer.Argument(help="Folder of the model.")]


@app.command("build")
def build(
    folder: Folder,
    shape: Annotated[
        str, typer.Option("--shape", help=f"{', '.join(SHAPES)}: flashsloth is the published size.")
    ] = "flashsloth",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Write a folder with random weights and the tokenizer of nano; answers end only at max_tokens."""
    nano = inference.load("nano", "cpu")
    text = nano.config.text_config
    config = FlashSlothConfig(
        **SHAPES[shape], image_token_id=nano.config.image_token_id, query_token_id=nano.config.query_token_id
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(text, name))
    processor = FlashSlothProcessor.from_config(
        config, nano.processor.tokenizer, chat_template=nano.processor.chat_template
    )
    processor.save_pretrained(folder)
    del nano
    gc.collect()
    torch.manual_seed(0)
    torch.set_default_dtype(inference.DTYPES[dtype])
    model = FlashSlothForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = text.pad_token_id
    # ids beyond nano's vocabulary have no text
    model.generation_config.suppress_tokens = list(range(text.vocab_size, config.text_config.vocab_size)) or None
    model.save_pretrained(folder)
    typer.echo(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in {folder}")


@app.command("serve")
def serve(
    folder: Folder,
    engine: Annotated[str, typer.Option("--engine", help="Of `flashsloth serve`.")] = "batching",
    requests: Annotated[int, typer.Option("--requests", help="One after another, after the first.", min=1)] = 5,
    tokens: Annotated[int, typer.Option("--tokens", help="Of each answer.", min=2)] = 8,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", help="More words for `flashsloth serve`, as --option=--dtype=bfloat16."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file; a table beside it.")] = Path(
        "serving_size.json"
    ),
) -> None:
    """Start a server, ask it about new images and again about one that it knows."""
    bodies = Bodies("new", "model", stream=True)
    asked = [json.loads(body) | {"max_tokens": tokens} for body in bodies.take(requests + 1)]
    known = asked[-1] | {"messages": [dict(asked[-1]["messages"][0])]}
    image, question = known["messages"][0]["content"]
    known["messages"][0]["content"] = [image, question | {"text": "what else is there?"}]
    arguments = [str(folder), "--name", "model", "--engine", engine, *(options or ())]

    def ask(server_url: str, body: dict[str, Any]) -> Outcome:
        (outcome,) = asyncio.run(run_clients(server_url, [json.dumps(body).encode()], 1, lambda _: None))
        if outcome.error is not None:
            raise RuntimeError(outcome.error)
        return outcome

    with served(engine, arguments) as server:
        ready = server.resident_bytes() or 0
        first = ask(server.url, asked[0])
        later = [ask(server.url, body) for body in asked[1:]]
        again = ask(server.url, known)
        assert server.process is not None
        end = server.resident_bytes() or 0
    report = {
        "machine": {**machine(), "load": os.getloadavg()[0]},
        "settings": {"engine": engine, "requests": requests, "tokens": tokens, "options": options or []},
        "ready_seconds": server.ready_seconds,
        "first_request": _seconds(first),
        "later_requests": [_seconds(outcome) for outcome in later],
        "same_image_another_question": _seconds(again),
        "resident_bytes_ready": ready,
        "resident_bytes_end": end,
    }
    gaps = [gap for outcome in later for gap in outcome.gaps]
    columns = [
        "",
        "ready, s",
        "first request",
        "another image",
        "a known image",
        "ms a token",
        "MiB ready",
        "MiB at the end",
    ]
    row = [
        f"{folder.name}, {engine} {' '.join(options or ())}".strip(),
        f"{server.ready_seconds:.0f}",
        f"{first.first:.2f} s to the first text",
        f"{statistics.median(outcome.first or 0.0 for outcome in later):.2f} s",
        f"{again.first:.2f} s",
        f"{1000 * statistics.median(gaps):.0f}" if gaps else "",
        f"{ready / MEBIBYTE:,.0f}",
        f"{end / MEBIBYTE:,.0f}",
    ]
    write(output, report, columns, [row])


def _seconds(outcome: Outcome) -> dict[str, float | None]:
    return {"first_text": outcome.first, "end": outcome.seconds}


if __name__ == "__main__":
    app()

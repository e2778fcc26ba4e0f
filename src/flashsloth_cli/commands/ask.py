"""`flashsloth ask`: one question about one or several images."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from flashsloth_cli import exported, options


def ask(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, URLs or data URLs.", show_default=False)
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.", show_default=False)],
    model: options.Model = "nano",
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer word by word.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print answer, token counts and seconds per stage as JSON.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_new_tokens: options.MaxNewTokens = None,
    visual_tokens: options.VisualTokens = None,
    schema: options.Schema = None,
    choices: options.Choices = None,
    regex: options.Regex = None,
    confidence: options.Confidence = False,
    quantize: options.Quantize = None,
    compiled: options.Compile = False,
    share_equal_views: options.ShareEqualViews = False,
    runtime: options.Runtime = "auto",
) -> None:
    """Ask a question about one or several images.

    The answer goes to standard output; visual tokens and times go to standard error.

    [bold]Examples[/bold]

      flashsloth ask photo.jpg "What is in the picture?"
      flashsloth ask chart.png "Which bar is the highest?" --stream
      flashsloth ask before.jpg after.jpg "What changed?" --model Tongbo/FlashSloth-3.2B
      flashsloth ask photo.jpg "What is it?" --dtype bfloat16 --quantize int8-dynamic-cpu
      flashsloth ask receipt.png "What is the total?" --visual-tokens 36
      flashsloth ask photo.jpg "Is it a dog?" --choices yes,no --confidence
      flashsloth ask receipt.png "What does it say?" --schema receipt.json
      flashsloth ask https://example.com/sign.jpg "What does the sign say?" --json
      flashsloth ask photo.jpg "What is it?" --model nano-onnx       (written by flashsloth export)
    """
    if stream and as_json:
        raise ValueError("--stream and --json exclude each other: JSON is printed when the answer is complete")
    options.check_question(question)
    if os.path.isfile(question):
        raise ValueError(f'the last argument is the question, but {question} is a file; add a "QUESTION"')
    settings = exported.TorchSettings(device, dtype, quantize, compiled, share_equal_views)
    if (folder := exported.folder_to_run(model, runtime, settings)) is not None:
        exported.check_no_form(schema, choices, regex, confidence)
        form: dict[str, Any] = {}
        session: Any = exported.load(folder)
    else:
        form = options.read_form(schema, choices, regex, confidence)
        session = options.load_session(model, device, dtype, quantize, compiled, share_equal_views)
    if compiled and folder is None:
        options.compile_now(session, images, max_new_tokens)
    write = sys.stdout.write
    answer = session.ask(
        images,
        question,
        max_new_tokens=max_new_tokens,
        visual_tokens=visual_tokens,
        on_text=_write_now if stream else None,
        **form,
    )
    if as_json:
        options.write_json(answer.to_dict())
        return
    write("\n" if stream else answer.text + "\n")
    options.print_cost(answer)


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

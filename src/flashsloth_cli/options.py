"""Options and printing shared by the commands."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from flashsloth.inference import Answer, FlashSloth

STAGES = ("preprocess", "encode", "compress", "prefill", "decode")

Model = Annotated[
    str, typer.Option("--model", "-m", help="Packaged model, folder, or hub id; an authors' checkpoint is converted.")
]
Device = Annotated[str, typer.Option(help="auto (cuda, mps, cpu), or a torch device such as cuda:1.")]
Dtype = Annotated[
    str, typer.Option(help="auto (as saved; float32 on a CPU), float32, bfloat16 or float16.", metavar="DTYPE")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Longest answer, in tokens; default: the model's own.", show_default=False, min=1)
]
VisualTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens that an image becomes, one of the numbers that `flashsloth info` lists: fewer are quicker, more "
        "show more; default: the model's own.",
        show_default=False,
        min=1,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME",
        help="Quantize in memory: int8-dynamic-cpu, int8-int4-cpu, int4-packed, int8-dynamic, int8-weight-only or "
        "int4-weight-only.",
        show_default=False,
    ),
]
ShareEqualViews = Annotated[
    bool, typer.Option("--share-equal-views", help="Encode views of equal pixels once, such as HD's blank tiles.")
]

Runtime = Annotated[
    str,
    typer.Option(
        help="torch, onnx (exports the model once, into the cache), or auto: what `flashsloth export` wrote runs in "
        "its own runtime, every other model in torch.",
        metavar="RUNTIME",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the encoder and the steps of an answer: minutes the first time, seconds after it. Equal answers "
        "but for rounding.",
    ),
]

Schema = Annotated[
    Path | None,
    typer.Option(
        "--schema",
        metavar="FILE",
        help="JSON file with a JSON schema that the answer must satisfy.",
        show_default=False,
    ),
]
Choices = Annotated[
    str | None,
    typer.Option(
        "--choices", metavar="A,B", help='The answer is one of these; "a, b" in quotes is one.', show_default=False
    ),
]
Regex = Annotated[
    str | None,
    typer.Option("--regex", metavar="REGEX", help="Regular expression of the whole answer.", show_default=False),
]
Confidence = Annotated[
    bool, typer.Option("--confidence", help="Say how probable the answer is, of --choices among these.")
]


def read_form(schema: Path | None, choices: str | None, regex: str | None, confidence: bool) -> dict[str, Any]:
    """Arguments of `ask` and `RunSettings` for the form of answers.

    Raises:
        ValueError: two forms at once, a file that is no JSON, a form that cannot be used.
        OSError: no such file.
    """
    given = [
        f"--{name}"
        for name, value in (("schema", schema), ("choices", choices), ("regex", regex))
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other: an answer has one form")
    form: dict[str, Any] = {"schema": None, "choices": None, "regex": regex, "confidence": confidence}
    if schema is not None:
        try:
            form["schema"] = json.loads(schema.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{schema} is no JSON: {error}") from error
        if not isinstance(form["schema"], dict):
            raise ValueError(f'{schema} holds no JSON schema, which is an object such as {{"type": "object"}}')
    if choices is not None:
        try:
            form["choices"] = [
                word.strip() for word in next(csv.reader([choices], skipinitialspace=True, strict=True), [])
            ]
        except csv.Error as error:
            raise ValueError(f"--choices {choices!r:.200} cannot be read: {error}") from error
    from flashsloth.inference import AnswerForm

    AnswerForm(**form)  # refused before a model is loaded
    return form


def load_session(
    model: str,
    device: str,
    dtype: str,
    quantization: str | None = None,
    compiled: bool = False,
    share_equal_views: bool = False,
) -> FlashSloth:
    """The model, loaded without progress bars."""
    from transformers.utils import logging

    from flashsloth.inference import load
    from flashsloth.kernels.packed_layers import keep_freed_memory

    logging.disable_progress_bar()
    session = load(
        model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        compile=compiled,
        share_equal_views=share_equal_views,
    )
    keep_freed_memory()  # now that weights in another layout are gone
    return session


def compile_now(session: FlashSloth, images: list[str], max_new_tokens: int | None) -> None:
    """Compile before the first question, and say on standard error what it took."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("compiling, once ..."):
        seconds = session.warm_up(images, max_new_tokens)
    console.print(f"compiled, once, in {seconds:.1f} s", style="dim")


def has_page(wanted: bool | None) -> bool:
    """Whether there is a page in the browser: where it is installed, unless it is asked for or not wanted.

    Raises:
        ImportError: it is asked for and not installed.
    """
    from importlib.util import find_spec

    if wanted is None:
        return find_spec("gradio") is not None
    if wanted and find_spec("gradio") is None:
        raise ImportError("the page in the browser needs gradio; install it with: pip install 'flashsloth[web]'")
    return wanted


def check_question(question: str) -> None:
    """Refuse a question that is empty or no text.

    Raises:
        ValueError: says which.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    for position, char in enumerate(question):
        if "\ud800" <= char <= "\udfff" or char == "\0":
            raise ValueError(
                f"the question is no valid text: character {position + 1} is U+{ord(char):04X}; is the terminal set "
                "to another encoding than the text?"
            )


def write_json(value: Any) -> None:
    """One line of JSON on standard output, in ASCII where the output's encoding cannot hold all of it."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    sys.stdout.write(text + "\n")


def milliseconds(seconds: float) -> str:
    """A duration to read: two digits below 10 ms, else whole milliseconds."""
    value = 1000 * seconds
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def print_cost(answer: Answer) -> None:
    """One dim line on standard error, so that standard output holds the answer alone."""
    parts = [f"{answer.visual_tokens} visual tokens instead of {answer.uncompressed_tokens}"]
    if answer.reused_tokens:
        parts.append(f"{answer.reused_tokens} of {answer.prompt_tokens} prompt tokens re-used")
    if answer.confidence is not None:
        parts.append(f"confidence {answer.confidence:.3f}")
    parts += [f"{stage} {milliseconds(getattr(answer.timings, stage))}" for stage in STAGES]
    Console(stderr=True, soft_wrap=True).print(" · ".join(parts), style="dim", highlight=False)

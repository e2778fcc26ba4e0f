"""`flashsloth explain`: what the model attended to for an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashsloth_cli import options


def explain(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, URLs or data URLs.", show_default=False)
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.", show_default=False)],
    output: Annotated[
        list[Path],
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Picture (.png), page to look around in (.html) or arrays (.npz); may be repeated.",
            show_default=False,
        ),
    ],
    model: options.Model = "nano",
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="embq: what this question took from the image; sap: what the image offers; decoder: where the "
            "language model looked; may be repeated. Default all.",
            show_default=False,
        ),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(help="query or head: EmbQ's attention of each besides the mean.", show_default=False),
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="Explain this answer instead of the model's own.", show_default=False)
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    visual_tokens: options.VisualTokens = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
) -> None:
    """Show what the model attended to for an answer, laid over the image.

    The answer is printed; it is the one that `flashsloth ask` gives. A map shows where attention went, which need not
    be why the answer was given: `flashsloth explain-check` measures how far it is.

    [bold]Examples[/bold]

      flashsloth explain scene.jpg "what color is the star?" -o map.png
      flashsloth explain scene.jpg "what color is the star?" -o map.html -o map.npz
      flashsloth explain scene.jpg "what color is the star?" -o heads.png --layer embq --per head
    """
    from flashsloth.inference.explanation import LAYERS, PARTS, check_endings

    options.check_question(question)
    check_endings(output)
    for name in layer or ():
        if name not in LAYERS:
            raise ValueError(f"there is no layer {name!r}; choose from {', '.join(LAYERS)}")
    if per is not None and per not in PARTS:
        raise ValueError(f"--per is {per!r}; choose {' or '.join(PARTS)}")
    session = options.load_session(model, device, dtype, quantize)
    explanation = session.explain(
        images, question, answer=answer, visual_tokens=visual_tokens, max_new_tokens=max_new_tokens
    )
    for path in output:
        explanation.save(path, per=per, layers=layer)
    typer.echo(explanation.answer)

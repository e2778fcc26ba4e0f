"""`flashsloth chat`: several turns about an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flashsloth_cli import exported, messages, options

if TYPE_CHECKING:
    from flashsloth.inference import Conversation


def chat(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, URLs or data URLs.", show_default=False)
    ],
    model: options.Model = "nano",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_new_tokens: options.MaxNewTokens = None,
    visual_tokens: options.VisualTokens = None,
    quantize: options.Quantize = None,
    compiled: options.Compile = False,
    share_equal_views: options.ShareEqualViews = False,
    runtime: options.Runtime = "auto",
) -> None:
    """Talk about an image.

    The image is encoded once, and each turn runs only what is new since the one before.
    With --compile too: turns re-use a cache of fixed size, which grows when it is full.
    Type /reset to forget the turns, /quit (or end the input) to leave.

    [bold]Examples[/bold]

      flashsloth chat photo.jpg
      flashsloth chat --model Tongbo/FlashSloth_HD-3.2B receipt.jpg
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    settings = exported.TorchSettings(device, dtype, quantize, compiled, share_equal_views)
    folder = exported.folder_to_run(model, runtime, settings)
    session: Any = (
        options.load_session(model, device, dtype, quantize, compiled, share_equal_views)
        if folder is None
        else exported.load(folder)
    )
    if compiled and folder is None:
        options.compile_now(session, images, max_new_tokens)
    conversation = session.conversation(images, visual_tokens=visual_tokens)
    conversation.encode()
    console.print("/reset forgets the turns, /quit leaves", style="dim")
    while True:
        try:
            question = console.input("> ").strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if question == "/reset":
            conversation.reset()
            console.print("a new conversation", style="dim")
        elif question:
            _answer(console, conversation, question, max_new_tokens)


def _answer(console: Console, conversation: Conversation, question: str, max_new_tokens: int | None) -> None:
    try:
        options.check_question(question)
        answer = conversation.ask(
            question, max_new_tokens=max_new_tokens, on_text=lambda text: console.print(text, end="")
        )
    except ValueError as error:  # too long: the conversation before it is still there
        messages.say(f"error: {error}")
        return
    console.print()
    options.print_cost(answer)

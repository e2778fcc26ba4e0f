"""The `flashsloth` command.

Sub-commands stand in a table of strings and are imported when they run, so that `flashsloth --help` needs neither
torch nor transformers. Errors meant for the user (ValueError, OSError, ImportError) are printed as one line; the exit
code is 2. An interrupted command says so in one line, with code 130; `KeyboardInterrupt("how to go on")`, raised where
there is something to go on with, adds that to the line.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from flashsloth_cli import messages

DEBUG_VARIABLE = "FLASHSLOTH_DEBUG"
HUGE_PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"  # see flashsloth.kernels.packed_layers, which would import torch
USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT

# name -> ("module:function or Typer app", one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "ask": ("flashsloth_cli.commands.ask:ask", "Ask a question about one or several images."),
    "chat": ("flashsloth_cli.commands.chat:chat", "Talk about an image; it is encoded once."),
    "explain": ("flashsloth_cli.commands.explain:explain", "Show what the model attended to for an answer."),
    "explain-check": (
        "flashsloth_cli.commands.explain_check:explain_check",
        "Measure whether maps of attention tell the truth.",
    ),
    "info": ("flashsloth_cli.commands.info:info", "Architecture, parameters, visual tokens and memory of a model."),
    "convert": ("flashsloth_cli.commands.convert:convert", "Convert the authors' checkpoints, and back."),
    "data": ("flashsloth_cli.commands.data:app", "Check training data before a GPU is paid for."),
    "train": ("flashsloth_cli.commands.train:train", "Train a model from a recipe."),
    "merge": ("flashsloth_cli.commands.merge:merge", "Merge a LoRA adapter into its base model."),
    "quantize": ("flashsloth_cli.commands.quantize:quantize", "Hold the weights of a model in 8 or 4 bits."),
    "export": ("flashsloth_cli.commands.export:export", "Write a model as graphs that run without torch."),
    "study": ("flashsloth_cli.commands.study:study", "Train variants of a recipe with several seeds; compare them."),
    "eval": ("flashsloth_cli.commands.eval:app", "Scores on the paper's 14 benchmarks and the own held-out sets."),
    "evaluate-synthetic": (
        "flashsloth_cli.commands.evaluate_synthetic:evaluate_synthetic",
        "Exact match on held-out rendered images.",
    ),
    "bench": ("flashsloth_cli.commands.bench:app", "Cost of FlashSloth and its peers: tokens, FLOPs, memory."),
    "run": ("flashsloth_cli.commands.run:run", "Questions about many images, batched and resumable."),
    "serve": ("flashsloth_cli.commands.serve:serve", "Answer OpenAI's clients over HTTP."),
    "web": ("flashsloth_cli.commands.web:web", "A page in the browser to try models on."),
    "demo": ("flashsloth_cli.commands.demo:demo", "Three questions about sample images."),
}


class LazyCommand(TyperCommand):
    """A line in the list of commands. `load` imports the command itself."""

    def __init__(self, name: str, target: str, help: str) -> None:
        super().__init__(name=name, help=help)
        self.target = target

    def load(self) -> Any:
        module_name, attribute = self.target.split(":")
        command = getattr(importlib.import_module(module_name), attribute)
        if not isinstance(command, typer.Typer):
            app = typer.Typer(add_completion=False, rich_markup_mode="rich")
            app.command(self.name)(command)
            command = app
        loaded = typer.main.get_command(command)
        loaded.name = self.name
        return loaded


class _Interrupted(Exception):
    """Takes a KeyboardInterrupt past typer, which would end without a word."""


class LazyGroup(TyperGroup):
    """A group whose commands come from `COMMANDS`."""

    def invoke(self, ctx: Any) -> Any:
        # before the module of a command is imported, and what that imports
        if ctx.params.get("debug"):
            os.environ[DEBUG_VARIABLE] = "1"
        messages.set_up(debug=bool(os.environ.get(DEBUG_VARIABLE)))
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted(*error.args) from error
        except EOFError as error:  # typer would say "Aborted"
            raise OSError(str(error) or "the input ended too early") from error

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        target, help = COMMANDS[cmd_name]
        return LazyCommand(cmd_name, target, help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, LazyCommand) else command, rest


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"flashsloth {version('flashsloth')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Small, fast vision-language models.

    Try: [bold]flashsloth ask photo.jpg "What is in the picture?"[/bold]
    """


def _out_of_memory(error: Exception) -> bool:
    # torch is looked up, not imported: without it in memory the error cannot be torch's.
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        app(None if args is None else list(args), prog_name="flashsloth")
    except SystemExit as exit_request:
        return exit_request.code if isinstance(exit_request.code, int) else 0
    except (KeyboardInterrupt, _Interrupted) as error:
        hint = str(error)
        messages.say(f"interrupted; {hint}" if hint else "interrupted")
        return INTERRUPTED
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError, ImportError))
        if os.environ.get(DEBUG_VARIABLE) or not (expected or _out_of_memory(error)):
            traceback.print_exception(error)
            return USER_ERROR if expected else 1
        message = str(error) or type(error).__name__
        if _out_of_memory(error):
            message = f"out of memory; --dtype bfloat16 or --device cpu may help ({message})"
        messages.say(f"error: {message}")
        return USER_ERROR
    return 0


def entry_point() -> None:
    """The console script."""
    os.environ.setdefault(HUGE_PAGES_VARIABLE, "1")
    if not os.environ.get(DEBUG_VARIABLE):
        messages.quieten_libraries()
    sys.exit(main())

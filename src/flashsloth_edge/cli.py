"""The `flashsloth-edge` command: ask, chat, run and serve with exported models."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

STAGES = ("preprocess", "encode", "compress", "prefill", "decode")
USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT


def build_parser() -> argparse.ArgumentParser:
    """The parser; every command keeps its function under `command`."""
    parser = argparse.ArgumentParser(
        prog="flashsloth-edge", description="Ask exported FlashSloth models about images, without torch."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=function)
        command.add_argument("model", metavar="MODEL", help="folder written by `flashsloth export`")
        command.add_argument("--threads", type=int, help="of the engine; default: the processors it may use")
        command.add_argument("--max-new-tokens", type=int, help="longest answer; default: the model's own")
        return command

    command = add("ask", _ask, "Ask a question about one or several images.")
    command.add_argument("images", nargs="*", metavar="IMAGE", help="files, URLs or data URLs; none for text alone")
    command.add_argument("question", metavar="QUESTION", help="what you want to know")
    command.add_argument("--visual-tokens", type=int, help="tokens that an image becomes")
    command.add_argument("--stream", action="store_true", help="print the answer as it grows")
    command.add_argument("--json", action="store_true", help="print answer, token counts and seconds as JSON")
    _add_sampling(command)

    command = add("chat", _chat, "Talk about images; they are encoded once. An empty line ends it.")
    command.add_argument("images", nargs="*", metavar="IMAGE", help="files, URLs or data URLs")
    _add_sampling(command)

    command = add("run", _run, "Answer the questions of a JSONL file; a run that was stopped goes on.")
    command.add_argument("input", metavar="INPUT", help='lines such as {"id": "1", "image": "a.jpg", "question": "?"}')
    command.add_argument("output", metavar="OUTPUT", help="JSONL file of answers; what it holds is not asked again")
    command.add_argument("--batch-size", type=int, default=8, help="questions at once (default 8)")

    command = add("serve", _serve, "Answer OpenAI's clients over HTTP at /v1/chat/completions.")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="port (default 8000)")
    return parser


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--temperature", type=float, help="draw the answer at this temperature")
    command.add_argument("--seed", type=int, help="of the draws")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.temperature is None:
        if arguments.seed is not None:
            raise ValueError("--seed says nothing without --temperature")
        return {}
    return {"do_sample": True, "temperature": arguments.temperature, "seed": arguments.seed}


def _load(arguments: argparse.Namespace) -> Any:
    from .session import load

    return load(arguments.model, arguments.threads)


def _ask(arguments: argparse.Namespace) -> None:
    if arguments.stream and arguments.json:
        raise ValueError("--stream and --json exclude each other: JSON is printed when the answer is complete")
    answer = _load(arguments).ask(
        arguments.images,
        arguments.question,
        max_new_tokens=arguments.max_new_tokens,
        visual_tokens=arguments.visual_tokens,
        on_text=_write_now if arguments.stream else None,
        **_sampling(arguments),
    )
    if arguments.json:
        sys.stdout.write(json.dumps(answer.to_dict(), ensure_ascii=False) + "\n")
        return
    sys.stdout.write("\n" if arguments.stream else answer.text + "\n")
    _print_cost(answer)


def _chat(arguments: argparse.Namespace) -> None:
    conversation = _load(arguments).conversation(arguments.images)
    conversation.encode()
    while question := _read_question():
        answer = conversation.ask(
            question, max_new_tokens=arguments.max_new_tokens, on_text=_write_now, **_sampling(arguments)
        )
        sys.stdout.write("\n")
        _print_cost(answer)


def _read_question() -> str:
    sys.stderr.write("> ")
    sys.stderr.flush()
    return sys.stdin.readline().strip()


def _run(arguments: argparse.Namespace) -> None:
    from .batch_run import run_file

    run_file(_load(arguments), arguments.input, arguments.output, arguments.batch_size, arguments.max_new_tokens, _say)


def _serve(arguments: argparse.Namespace) -> None:
    from .server import serve

    serve(_load(arguments), arguments.host, arguments.port, arguments.max_new_tokens, _say)


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _print_cost(answer: Any) -> None:
    parts = [f"{answer.visual_tokens} visual tokens instead of {answer.uncompressed_tokens}"]
    if answer.reused_tokens:
        parts.append(f"{answer.reused_tokens} of {answer.prompt_tokens} prompt tokens re-used")
    parts += [f"{stage} {1000 * getattr(answer.timings, stage):.1f} ms" for stage in STAGES]
    _say(" · ".join(parts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        parsed = build_parser().parse_args(arguments)
        parsed.command(parsed)
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else 0
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        _say(f"error: {error}")
        return USER_ERROR
    return 0


def entry_point() -> None:
    """The console script."""
    sys.exit(main())

"""What commands say on standard error: one line a message, of bounded length, safe for terminals, none of libraries.

Imports nothing heavy: every command, and `flashsloth --help`, passes here.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from typing import Any

LONGEST_LINE = 2000
OWN_PACKAGES = ("flashsloth", "flashsloth_cli")
# Sets up its own printing of warnings, so that its level decides; what it warns of while it is imported is nothing a
# user could mend.
NOISY_LOGGER = "torch.utils._pytree"
# for libraries that print their warnings themselves; read when they are imported
QUIET_VARIABLES = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """A message as one line: control characters and lone surrogates spelt out, the middle of a long one left out."""
    words = " ".join(text.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    if len(line) <= longest:
        return line
    half = longest // 2
    return f"{line[:half]} [{len(line) - 2 * half} characters left out] {line[-half:]}"


def say(text: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(one_line(text) + "\n")


class _Lines(logging.Handler):
    """Records as lines; standard error is looked up at each, because progress bars put themselves in its place."""

    show_time = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit the message
            text = f"{record.msg} {record.args}"
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if self.show_time:
            text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {text}"
        say(text)


_lines = _Lines()


def set_up(debug: bool) -> None:
    """Print this package's warnings and log records as lines, and keep those of libraries to itself.

    Args:
        debug: leave warnings and other libraries as they are.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer is printed, whatever the encoding
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as the arguments of a command are read
    for name in OWN_PACKAGES:
        logger = logging.getLogger(name)
        if _lines not in logger.handlers:
            logger.addHandler(_lines)
    if debug:
        return
    if logging.lastResort is not None:  # what prints records of libraries without a handler
        logging.lastResort.setLevel(logging.ERROR)
    logging.getLogger(NOISY_LOGGER).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning


def show_log(level: int = logging.INFO, show_time: bool = True) -> None:
    """Print this package's log records from `level` on, for commands that say what they are doing."""
    for name in OWN_PACKAGES:
        logging.getLogger(name).setLevel(level)
    _lines.show_time = show_time


def quieten_libraries() -> None:
    """Before they are imported: only errors of libraries that print by themselves."""
    for name, value in QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    # `stacklevel` names another file on purpose; the caller of `warn` is the nearest frame outside of `warnings`
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") == "warnings":
        frame = frame.f_back
    if frame.f_globals.get("__name__", "").partition(".")[0] in OWN_PACKAGES:
        say(f"warning: {message}")

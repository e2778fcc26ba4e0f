"""What the options of `flashsloth bench` hold in one string: names, numbers and sizes, separated by commas."""

from __future__ import annotations

import re

DEFAULT_SIZES = "384x384,768x768,1024x768,1344x1344"


def names(text: str) -> list[str]:
    """The names without the blanks around them."""
    return [part.strip() for part in text.split(",")]


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers from 1 on."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"{option} has {text!r}; give numbers from 1 on, separated by commas")
    return found


def sizes(text: str, option: str) -> list[tuple[int, int]]:
    """(width, height) of each WIDTHxHEIGHT, each once."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip().lower())
        if match is None:
            raise ValueError(
                f"{option} has {part!r}; give WIDTHxHEIGHT in pixels, separated by commas: {DEFAULT_SIZES}"
            )
        found.append((int(match[1]), int(match[2])))
    return list(dict.fromkeys(found))

"""The one sample format of training, and the readers that produce it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

LLAVA_IMAGE_PLACEHOLDER = "<image>"
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Sample:
    """Images and what is said about them.

    `messages` is a chat as `apply_chat_template` takes it, one `{"type": "image"}` part for each image in order;
    `caption` is the text of plain-template training.
    """

    images: list[Image.Image]
    messages: list[dict[str, Any]]
    caption: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON list or a JSONL file.

    Raises:
        ValueError: unreadable or malformed file; the message names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read data file {path}: {error}") from error
    try:
        records = list(_json_lines(text)) if path.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a non-empty list of records")
    return records


def _json_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.strip():
            yield json.loads(line)


def llava_sample(record: dict[str, Any], image_folder: Path) -> Sample:
    """Convert one LLaVA record (`image`, `conversations` of `from` / `value`).

    Raises:
        ValueError: unknown role, missing field, or placeholders that do not match the images.
        OSError: an image is missing or broken.
    """
    names = record.get("image", [])
    names = [names] if isinstance(names, str) else names
    turns = record.get("conversations")
    if not turns:
        raise ValueError("the record has no conversations")
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if not isinstance(turn, dict) or "from" not in turn or not isinstance(turn.get("value"), str):
            raise ValueError("a turn lacks from or value")
        if turn["from"] not in _LLAVA_ROLES:
            raise ValueError(f"unknown role {turn['from']!r}; known are {', '.join(_LLAVA_ROLES)}")
        role = _LLAVA_ROLES[turn["from"]]
        # only a user's placeholder stands for an image; the same text in an answer is text
        content = _split_images(turn["value"]) if role == "user" else [{"type": "text", "text": turn["value"]}]
        messages.append({"role": role, "content": content})
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(names):
        raise ValueError(f"{placeholders} {LLAVA_IMAGE_PLACEHOLDER} placeholders for {len(names)} images")
    images = []
    for name in names:
        with Image.open(image_folder / name) as image:
            images.append(image.convert("RGB"))
    answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("the record has no answer to learn")
    return Sample(images, messages, caption=answers[0], metadata={"id": record.get("id")})


def _split_images(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(LLAVA_IMAGE_PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts

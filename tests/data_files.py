"""Small data sets of every kind, written by the tests that read them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def image_bytes(colour: str = "red", size: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def llava_turns(images: int, turns: int = 1, words: int = 1) -> list[dict[str, str]]:
    conversation = []
    for turn in range(turns):
        opening = "<image>\n" * images if turn == 0 else ""
        conversation.append({"from": "human", "value": f"{opening}what color? " + "word " * words})
        conversation.append({"from": "gpt", "value": f"answer {turn} {'word ' * words}".strip()})
    return conversation


def write_llava(folder: Path, shapes: list[tuple[int, int, int]], name: str = "data.json") -> Path:
    """A LLaVA file and its images; each record is (images, turns, words)."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index, (images, turns, words) in enumerate(shapes):
        names = []
        for number in range(images):
            names.append(f"{index}-{number}.png")
            (folder / names[-1]).write_bytes(image_bytes(COLOURS[(index + number) % len(COLOURS)]))
        record: dict[str, Any] = {"id": f"r{index}", "conversations": llava_turns(images, turns, words)}
        if names:
            record["image"] = names[0] if len(names) == 1 else names
        records.append(record)
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return path


def message_rows(count: int) -> list[dict[str, Any]]:
    """Rows with 0, 1 and 2 images, one and two turns; the number of a row is its answer."""
    rows = []
    for index in range(count):
        images = index % 3
        content = [{"type": "image", "text": None}] * images + [{"type": "text", "text": f"question {index}"}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": f"answer {index}"}]},
        ]
        if index % 2:
            messages += [
                {"role": "user", "content": [{"type": "text", "text": "and again?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "the same"}]},
            ]
        encoded = [{"bytes": image_bytes(COLOURS[number]), "path": None} for number in range(images)]
        rows.append({"messages": messages, "images": encoded})
    return rows


def write_shards(folder: Path, shards: int, samples: int) -> str:
    """Tar shards of samples with one image (captions and conversations in turn); returns a pattern with braces."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for sample in range(samples):
                number = shard * samples + sample
                _add(tar, f"{number:05d}.png", image_bytes(COLOURS[number % len(COLOURS)]))
                if number % 2:
                    _add(tar, f"{number:05d}.txt", f"answer {number}".encode())
                else:
                    turns = llava_turns(1)
                    turns[1]["value"] = f"answer {number}"
                    _add(tar, f"{number:05d}.json", json.dumps({"conversations": turns}).encode())
    return f"{folder}/{{000..{shards - 1:03d}}}.tar"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))

"""Questions of a file, answered in batches; a run that was stopped goes on where it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .session import EdgeModel

# batches are cut from a sorted stretch of so many: rows of one batch then have prompts of like length
SORTED_BATCHES = 16


@dataclass(frozen=True)
class Record:
    """One question. `id` is unique in the file, by default the number of the line from 1."""

    id: str
    images: tuple[str, ...]
    question: str


def run_file(
    model: EdgeModel,
    input: str,
    output: str,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Answer the records of a JSONL file into another; returns the number of those that could not be answered.

    Every answer is a line {"id", "answer"}, or {"id", "error"} where a record cannot be asked. Paths of images are
    relative to the input file.

    Raises:
        ValueError: a line that is no record, an id that is there twice.
        OSError: a file that cannot be read or written.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; it must be at least 1")
    records = list(read_records(Path(input)))
    done = _ids_of(Path(output))
    waiting = [record for record in records if record.id not in done]
    if done:
        say(f"{len(records) - len(waiting)} of {len(records)} records are answered already")
    errors = answered = 0
    with open(output, "a", encoding="utf-8") as file:
        for batch in plan_batches(waiting, batch_size):
            for line in _answer(model, batch, max_new_tokens):
                errors += "error" in line
                answered += 1
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            say(f"{answered} of {len(waiting)}")
    if errors:
        say(f"{errors} records could not be answered; {output} says why")
    return errors


def plan_batches(records: Sequence[Record], batch_size: int) -> Iterator[list[Record]]:
    """Batches of neighbours in number of images and length of question, near each other in the file."""
    stretch = batch_size * SORTED_BATCHES
    for start in range(0, len(records), stretch):
        near = sorted(records[start : start + stretch], key=lambda record: (len(record.images), len(record.question)))
        for first in range(0, len(near), batch_size):
            yield near[first : first + batch_size]


def read_records(file: Path) -> Iterator[Record]:
    """Records of a JSONL file: {"question", "image" | "images", "id"}.

    Raises:
        ValueError: names the line and what is wrong.
    """
    seen: set[str] = set()
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        place = f"{file}, line {number}"
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is no JSON: {error}") from error
        if not isinstance(values, dict) or not isinstance(values.get("question"), str):
            raise ValueError(f'{place} is no record; write {{"question": "...", "image": "photo.jpg"}}')
        images = values.get("images", values.get("image", []))
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise ValueError(f"{place}: image must be a path or URL, images a list of them")
        paths = tuple(_beside(file, path) for path in images)
        record = Record(str(values.get("id", number)), paths, values["question"])
        if record.id in seen:
            raise ValueError(f"{place}: the id {record.id!r} is there twice; give every record its own")
        seen.add(record.id)
        yield record


def _beside(file: Path, image: str) -> str:
    is_url = image.partition(":")[0].lower() in ("http", "https", "file", "data")
    return image if is_url else str(file.parent / image)


def _ids_of(output: Path) -> set[str]:
    """Ids of the answers that a file holds; a last line that was cut off is taken away."""
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        output.write_bytes(whole)
    return {json.loads(line)["id"] for line in whole.decode("utf-8").splitlines() if line.strip()}


def _answer(model: EdgeModel, batch: list[Record], max_new_tokens: int | None) -> list[dict[str, Any]]:
    """Lines of a batch; where one of its records is bad, each is asked alone."""
    rows = [(list(record.images), record.question) for record in batch]
    try:
        for record in batch:
            if not record.question.strip():
                raise ValueError("the question is empty")
        answers = model.ask_batch(rows, max_new_tokens=max_new_tokens)
    except (ValueError, OSError) as error:
        if len(batch) == 1:
            return [{"id": batch[0].id, "error": str(error)}]
        return [line for record in batch for line in _answer(model, [record], max_new_tokens)]
    return [{"id": record.id, "answer": answer} for record, answer in zip(batch, answers, strict=True)]

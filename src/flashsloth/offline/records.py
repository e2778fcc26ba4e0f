"""What is asked: a folder of images, a file of questions, or a Hugging Face dataset, as one list of records."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..inference.batches import Record

JSON_SUFFIXES = (".jsonl", ".json")
DATASET_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
IMAGE_FIELDS = ("images", "image")
DATASETS_HINT = "reading datasets needs the `datasets` library: pip install 'flashsloth[run]'"


def read_records(source: str, question: str | None = None) -> list[Record]:
    """All records of an input, in order. Images are not opened here.

    Args:
        source: folder of images (searched recursively), JSON / JSONL file, parquet / arrow / CSV file, or a dataset on
            the hub as `name` or `name:split`. Files hold `question` and `image` or `images`, and `id` if they have
            one; image paths are relative to the file.
        question: asked of every record without a question of its own.

    Raises:
        ValueError: no such input, no images, a record without image or question, an id that comes twice; the message
            names file and record.
    """
    if question is not None and not question.strip():
        raise ValueError("the question is empty")
    path = Path(source)
    if path.is_dir():
        records = list(_folder_records(path, question))
    elif path.suffix in JSON_SUFFIXES:
        records = [_row_record(row, index, source, path.parent, question) for index, row in _json_rows(path)]
    else:
        rows = _dataset_rows(source, path)
        records = [_row_record(row, index, source, path.parent, question) for index, row in enumerate(rows)]
    if not records:
        raise ValueError(f"{source} holds nothing to ask about")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"{source}: the id {record.id!r} comes twice; answers could not be told apart")
        seen.add(record.id)
    return records


def _folder_records(folder: Path, question: str | None) -> Iterator[Record]:
    if question is None:
        raise ValueError(f"{folder} is a folder of images, which holds no questions: give --question")
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and path.is_file():
            yield Record(path.relative_to(folder).as_posix(), (str(path),), question)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(record number, value); a JSON file holds a list, a JSONL file a value a line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a list of records")
        yield from enumerate(rows)
        return
    for number, line in enumerate(text.splitlines()):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number + 1} is not valid JSON: {error}") from error


def _dataset_rows(source: str, path: Path) -> Sequence[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(DATASETS_HINT) from error
    if path.suffix in DATASET_SUFFIXES:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        return datasets.load_dataset(DATASET_SUFFIXES[path.suffix], data_files=str(path), split="train")
    name, _, split = source.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source} is no folder, no file of records, and no dataset that can be had: {error}"
        ) from error


def _row_record(row: Any, index: int, source: str, folder: Path, question: str | None) -> Record:
    where = f"{source}, record {index}"
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a mapping of fields")
    asked = row.get("question") or question
    if not isinstance(asked, str) or not asked.strip():
        raise ValueError(f"{where} has no question; add the field `question`, or give --question for all")
    field = next((name for name in IMAGE_FIELDS if row.get(name)), None)
    if field is None:
        raise ValueError(f"{where} has no image; add the field `image` or `images`")
    values = row[field] if isinstance(row[field], list) else [row[field]]
    return Record(str(row.get("id", index)), tuple(_image_source(value, where, folder) for value in values), asked)


def _image_source(value: Any, where: str, folder: Path) -> Any:
    if isinstance(value, dict) and ("bytes" in value or "path" in value):  # an image column read without its feature
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        is_address = value.startswith(("http://", "https://", "data:", "file://"))
        return value if is_address else str(folder / value)
    if isinstance(value, (bytes, Image.Image)):
        return value
    raise ValueError(f"{where}: an image is a path, an address, bytes or a picture, not {type(value).__name__}")

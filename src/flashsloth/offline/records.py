"""What is asked: a folder of images, a file of questions, or a Hugging Face dataset, as one list of records.

Text stays as it is written: `0012` and `1e5` in a column of ids are ids, not numbers.
"""

import codecs
import csv
import hashlib
import io
import json
import logging
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from PIL import Image

from ..inference.batches import Record
from ..model.image_loading import load_image

logger = logging.getLogger(__name__)

DATASET_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
IMAGE_FIELDS = ("images", "image")
FIELDS = ("id", "question", *IMAGE_FIELDS)
DATASETS_HINT = "reading datasets needs the `datasets` library: pip install 'flashsloth[run]'"
FILE_ADDRESS = "file://"
ADDRESSES = ("http://", "https://", "data:", FILE_ADDRESS)
# the longer ones first: that of UTF-32 begins like that of UTF-16
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig"}
BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
Row = tuple[int, Any]
"""The number of a row, and its fields."""


class _Number(str):
    """A number of a JSON file, as it is written there."""


def read_records(source: str, question: str | None = None) -> list[Record]:
    """All records of an input, in order. Images are not opened here.

    Args:
        source: folder of images (searched recursively, linked folders included), JSON / JSONL file, CSV / parquet /
            arrow file, or a dataset on the hub as `name` or `name:split`. Files hold `question` and `image` or
            `images`, and `id`, in whose place the number of the row serves; image paths are relative to the file.
        question: asked of every record without a question of its own.

    What a folder holds and no decoder reads is counted in one warning.

    Raises:
        ValueError: no such input, no images, a record without image or question, an id that comes twice; the message
            names file and record.
    """
    if question is not None and not question.strip():
        raise ValueError("the question is empty")
    path = Path(source)
    if path.is_dir():
        records = list(_folder_records(path, question))
    else:
        rows = _rows(source, path)
        records = _with_ids(
            [(index, _row_record(row, f"{source}, record {index}", path.parent, question)) for index, row in rows]
        )
    if not records:
        raise ValueError(f"{source} holds nothing to ask about")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"{source}: the id {record.id!r:.200} comes twice; answers could not be told apart")
        seen.add(record.id)
    return records


def input_of(record: Record) -> str:
    """Identifies what a record asks: its question, and its images by address, content, or path, size and time."""
    digest = hashlib.sha256(record.question.encode("utf-8", "surrogatepass"))
    for image in record.images:
        digest.update(b"\0")
        if isinstance(image, bytes):
            digest.update(image)
        elif isinstance(image, (str, os.PathLike)):
            digest.update(_identity(image).encode("utf-8", "surrogatepass"))
        else:
            digest.update(_pixels(image))
    return digest.hexdigest()[:16]


def _pixels(image: Any) -> bytes:
    try:
        picture = load_image(image)
    except (OSError, ValueError) as error:  # asking will say the same
        return str(error).encode("utf-8", "surrogatepass")
    return f"{picture.size} ".encode() + picture.tobytes()


def is_address(image: Any) -> bool:
    """Whether an image is named by an address instead of a path."""
    return isinstance(image, str) and image[: len("https://")].lower().startswith(ADDRESSES)


def local_path(image: Any) -> str | None:
    """The path of a file of this machine, None for what is none."""
    if not isinstance(image, (str, os.PathLike)):
        return None
    text = os.fsdecode(image)
    if not is_address(image):
        return text
    return url2pathname(text[len(FILE_ADDRESS) :]) if text.lower().startswith(f"{FILE_ADDRESS}/") else None


def _identity(image: str | os.PathLike[str]) -> str:
    path = local_path(image)
    if path is None:
        return os.fspath(image)
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # what is missing now is another file when it is there
        return os.path.abspath(path)
    return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"


def _folder_records(folder: Path, question: str | None) -> Iterator[Record]:
    if question is None:
        raise ValueError(f"{folder} is a folder of images, which holds no questions: give --question")
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    skipped: Counter[str] = Counter()
    for path in sorted(_walk(folder, skipped)):
        if not path.is_file():
            skipped["links to nothing, pipes or devices"] += 1
        elif path.suffix.lower() in suffixes:
            yield Record(path.relative_to(folder).as_posix(), (str(path),), question)
        else:
            skipped[f"files ending in {path.suffix.lower()}" if path.suffix else "files without an ending"] += 1
    if skipped:
        kinds = ", ".join(f"{number} {kind}" for kind, number in skipped.most_common())
        logger.warning("%s: passed over, since no decoder reads them: %s", folder, kinds)


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Files below a folder, through links to folders too, each folder once.

    Folders come before links to them, so that a link changes no name of what is found without it.
    """
    seen: set[tuple[int, int]] = set()
    starts = [str(folder)]

    def unreadable(error: OSError) -> None:
        skipped["folders that cannot be read"] += 1

    while starts:
        links: list[str] = []
        for start in starts:
            for name, folders, files in os.walk(start, onerror=unreadable):
                status = os.stat(name)
                if (status.st_dev, status.st_ino) in seen:
                    skipped["links to a folder that was searched already"] += 1
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                links += [
                    path for path in sorted(os.path.join(name, each) for each in folders) if os.path.islink(path)
                ]
                yield from (Path(name, file) for file in files)
        starts = links


def _rows(source: str, path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json_rows(path, _read_text(path))
    if suffix == ".jsonl":
        return _json_lines(path, _read_text(path))
    if suffix == ".csv":
        return _csv_rows(path, _read_text(path))
    if os.path.exists(path) and not path.is_file():
        raise ValueError(f"{source} is neither a folder nor a regular file")
    return enumerate(_dataset_rows(source, path))


def _read_text(path: Path) -> str:
    """The text of a file, without a byte-order mark."""
    try:
        if not path.exists():
            raise ValueError(f"there is no file {path}")
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is no regular file")
        content = path.read_bytes()
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
        return content.decode(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _parse_json(text: str) -> Any:
    """Numbers stay as they are written: they are ids, if anything. NaN, which JSON has not, is nothing."""
    try:
        return json.loads(text, parse_int=_Number, parse_float=_Number, parse_constant=lambda _name: None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = _parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of records")
    yield from enumerate(rows)


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n")):
        if line.strip():
            try:
                yield number, _parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number + 1} is not valid JSON: {error}") from error


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # data URLs are long
    try:
        reader = csv.DictReader(io.StringIO(text.lstrip("\r\n"), newline=""), strict=True)
        rows, names = list(reader), reader.fieldnames or ()
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(before)
    if len(set(names)) < len(names):
        raise ValueError(f"{path} names a column twice in its first line")
    for index, row in enumerate(rows):
        if None in row:
            raise ValueError(f"{path}, record {index} has more fields than the first line; quote those with commas")
        yield index, {name.strip(): value for name, value in row.items()}


def _dataset_rows(source: str, path: Path) -> Sequence[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(DATASETS_HINT) from error
    name, _, split = source.partition(":")
    try:
        if builder := DATASET_SUFFIXES.get(path.suffix.lower()):
            if not path.is_file():
                raise ValueError(f"there is no file {path}")
            rows = datasets.load_dataset(builder, data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(name, split=split or "train")
        rows = rows.select_columns([column for column in FIELDS if column in rows.features])
        for column in IMAGE_FIELDS:
            if column in rows.features:
                rows = rows.cast_column(column, _undecoded(rows.features[column]))
        return rows
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source} is no folder, no file of records, and no dataset that can be had: {error}"
        ) from error


def _undecoded(feature: Any) -> Any:
    """The feature with images as bytes: a damaged one is an error of its record, not of reading."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_undecoded(feature.feature))
    return feature


def _row_record(row: Any, where: str, folder: Path, question: str | None) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a mapping of fields")
    asked = row.get("question") or question
    if not isinstance(asked, str) or isinstance(asked, _Number) or not asked.strip():
        raise ValueError(f"{where} has no question; add the field `question`, or give --question for all")
    field = next((name for name in IMAGE_FIELDS if row.get(name)), None)
    if field is None:
        raise ValueError(f"{where} has no image; add the field `image` or `images`")
    values = row[field] if isinstance(row[field], list) else [row[field]]
    identifier = row.get("id")
    if identifier is None or identifier != identifier:
        identifier = ""  # replaced by the number of the row
    if isinstance(identifier, (bool, bytes, list, dict)):
        raise ValueError(f"{where}: an id is text or a number, not {type(identifier).__name__}")
    return Record(str(identifier), tuple(_image_source(value, where, folder) for value in values), asked)


def _with_ids(rows: Sequence[tuple[int, Record]]) -> list[Record]:
    """Records without an id get the number of their row, and a word before it where that is an id already."""
    taken = {record.id for _, record in rows}
    return [
        record if record.id else replace(record, id=str(index) if str(index) not in taken else f"record {index}")
        for index, record in rows
    ]


def _image_source(value: Any, where: str, folder: Path) -> Any:
    if isinstance(value, dict) and ("bytes" in value or "path" in value):  # an image column
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and not isinstance(value, _Number):
        return value if is_address(value) else str(folder / value)
    if isinstance(value, (bytes, Image.Image)):
        return value
    kind = "a number" if isinstance(value, _Number) else type(value).__name__
    raise ValueError(f"{where}: an image is a path, an address, bytes or a picture, not {kind}")

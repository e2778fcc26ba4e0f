"""Answers that were given before, by what was asked: the model, its options, the text and the pixels."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..inference.batches import Record
from ..model.image_loading import load_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Response:
    """An answer and what it cost.

    Attributes:
        text: the whole answer, as the model gave it.
        visual_tokens: of all images of the record.
        seconds: the record's share of the time that its batch took.
    """

    text: str
    visual_tokens: int
    seconds: float


class ResponseCache:
    """Responses in a folder, added to batch by batch, whole after any kill.

    What is in it is found by content alone: another model, option, question or pixel is another key, so that data that
    changed since is asked anew. Every process writes a file of its own and reads those of all.

    Args:
        folder: JSONL files; made when absent. None keeps responses in memory.
        settings: what decides about answers beside the record: weights, dtype, quantization and the like.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.settings = json.dumps(dict(settings), sort_keys=True)
        self.responses: dict[str, Response] = {}
        self.path = None if folder is None else folder / f"responses-{rank}.jsonl"
        self._known: dict[int, tuple[Any, bytes]] = {}  # the picture is kept, so that its id stays its own
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("responses-*.jsonl")):
                self._read(path)

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                key = row.pop("key")
                self.responses[key] = Response(**row)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number} is no response; remove the file to ask anew") from error
        if whole != len(data) and path == self.path:
            os.truncate(path, whole)  # a kill cut the last line short

    def key(self, record: Record, options: Mapping[str, Any]) -> str:
        """Identifies what is asked: settings, options of the answer, text and pixels.

        Raises:
            ValueError, OSError: an image that cannot be read.
        """
        digest = hashlib.sha256(self.settings.encode())
        digest.update(json.dumps(dict(options), sort_keys=True).encode())
        digest.update(record.question.encode("utf-8", "surrogatepass"))
        for image in record.images:
            digest.update(b"\0" + self._pixels(image))
        return digest.hexdigest()[:32]

    def _pixels(self, image: Any) -> bytes:
        known = self._known.get(id(image))
        if known is None:
            picture = load_image(image)
            known = (image, hashlib.sha256(f"{picture.size} ".encode() + picture.tobytes()).digest())
            self._known = {id(image): known}  # neighbours share an image
        return known[1]

    def get(self, key: str) -> Response | None:
        """What was answered before."""
        return self.responses.get(key)

    def add(self, answered: Sequence[tuple[str, Response]]) -> None:
        """Note responses; a disk that is full costs the file, with a warning, not the run."""
        self.responses.update(answered)
        if self.path is None or not answered:
            return
        data = "".join(json.dumps({"key": key, **asdict(response)}) + "\n" for key, response in answered).encode()
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(data)
        except OSError as error:
            logger.warning("%s: answers are no longer kept for a resumed run: %s", self.path, error.strerror)
            if self.path.is_file():
                os.truncate(self.path, size)
            self.path = None

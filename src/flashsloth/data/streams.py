"""Sources without an index: data sets of messages and tar shards, read from the beginning."""

import glob
import hashlib
import itertools
import json
import logging
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from .broken import BrokenSamples
from .schema import IMAGE_PLACEHOLDER, Origin, Record, make_record
from .sources import image_source, open_messages, row_images

if TYPE_CHECKING:
    from .recipe import MessagesData, WebdatasetData

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


class RecordStream(IterableDataset):
    """Records without end: pass after pass, each shuffled by seed and number of the pass.

    The worker processes of a loader share the shards among themselves. Every process of a distributed run reads the
    same stream, of which accelerate gives it its part; images are decoded only where they are used. After a resume
    the Trainer reads up to the place again.
    """

    is_independent = False

    def __init__(self, source: "MessagesData | WebdatasetData", name: str, seed: int) -> None:
        self.name, self.seed, self.shuffle_buffer = name, seed, source.shuffle_buffer
        self.max_images, self.max_pixels = source.max_images, source.max_pixels
        self.broken = BrokenSamples(source.max_broken)

    @property
    def num_broken(self) -> int:
        """Different broken samples met so far, in all worker processes of the loader."""
        return self.broken.count

    def one_pass(self, number: int | None = None) -> Iterator[Record]:
        """This worker's share of one pass: shuffled by the number of the pass, in the order of the files without."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Record]:
        for number in itertools.count():
            is_empty = True
            for record in self.one_pass(number):
                is_empty = False
                yield record
            if is_empty:
                worker = get_worker_info()
                if worker is None:
                    raise ValueError(f"data.{self.name} holds no samples")
                logger.warning(
                    "worker %d has no part of data.%s: it has fewer shards than the loader has workers",
                    worker.id,
                    self.name,
                )
                return

    def _record(self, place: str, raw: Any, images: list[Any], read_error: str | None = None) -> Record:
        origin = Origin(self.name, place, self.broken)
        return make_record(origin, raw, images, self.max_images, self.max_pixels, read_error)


class MessagesStream(RecordStream):
    """A data set of the library `datasets`, streamed."""

    def __init__(self, source: "MessagesData", name: str, seed: int) -> None:
        super().__init__(source, name, seed)
        self.path, self.image_folder = source.path, source.image_folder
        self.dataset = open_messages(source)

    def one_pass(self, number: int | None = None) -> Iterator[Record]:
        dataset = self.dataset
        if number is not None:
            dataset = dataset.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
            dataset.set_epoch(number)
        for index, row in enumerate(dataset):
            # once shuffled, a row has no number: its text names it
            where = f"row {index}" if number is None else f"row with text {_digest(row)}"
            name = "" if row.get("id") is None else f" (id {row['id']})"
            place = f"{self.path}: {where}{name}"
            yield self._record(place, row, row_images(row, self.image_folder))


def _digest(row: Mapping[str, Any]) -> str:
    text = str(row.get("messages") or row.get("conversations"))
    return f"{text[:80]!r}... ({hashlib.blake2b(text.encode('utf-8', 'replace'), digest_size=6).hexdigest()})"


class WebdatasetStream(RecordStream):
    """Tar shards. The files of a sample share their name up to the first dot: `KEY.json` with `messages` or
    `conversations`, or `KEY.txt` with a caption, and images in the order in which they lie in the shard.

    Raises:
        ValueError: no shard matches.
    """

    def __init__(self, source: "WebdatasetData", name: str, seed: int) -> None:
        super().__init__(source, name, seed)
        self.shards = expand_shards(source.shards)

    def one_pass(self, number: int | None = None) -> Iterator[Record]:
        from webdataset.filters import shuffle

        shards = list(self.shards)
        if number is not None:
            random.Random(f"{self.seed} {number}").shuffle(shards)
        worker = get_worker_info()
        if worker is not None:
            shards = shards[worker.id :: worker.num_workers]
        samples = itertools.chain.from_iterable(map(self._read_shard, shards))
        if number is not None:
            order = random.Random(f"{self.seed} {number} {worker.id if worker else 0}")
            samples = shuffle(self.shuffle_buffer, rng=order)(samples)
        for members in samples:
            yield self._read(members)

    def _read_shard(self, shard: str) -> Iterator[dict[str, Any]]:
        from webdataset import WebDataset

        def skip(error: Exception) -> bool:
            # a damaged shard counts as one broken sample; what is left of it is lost
            self.broken.add(f"shard {shard}", str(error.args[0] if error.args else error))
            return True

        yield from WebDataset(
            [shard], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False, handler=skip
        )

    def _read(self, members: Mapping[str, Any]) -> Record:
        place = f"{members['__url__']}: sample {members['__key__']}"
        images = [data for name, data in members.items() if name.rpartition(".")[2] in IMAGE_SUFFIXES]
        if "json" in members:
            try:
                raw = json.loads(members["json"])
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                return self._record(place, None, images, f"its json is not valid: {error}")
            if isinstance(raw, dict) and ("messages" in raw or "conversations" in raw):
                return self._record(place, raw, [image_source(image, None) for image in images])
        if "txt" not in members:
            return self._record(place, None, images, "it has neither a json with messages nor a txt with a caption")
        try:
            caption = members["txt"].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            return self._record(place, None, images, f"its txt is not UTF-8: {error}")
        asked = {"role": "user", "content": IMAGE_PLACEHOLDER * len(images)}
        return self._record(place, {"messages": [asked, {"role": "assistant", "content": caption}]}, images)


def expand_shards(pattern: str) -> list[str]:
    """Paths and URLs of tar shards, by braces or by a local pattern.

    Raises:
        ValueError: nothing matches.
        ImportError: webdataset is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError("tar shards need webdataset: pip install 'flashsloth[webdataset]'") from error
    shards: list[str] = []
    for part in expand_urls(pattern):
        is_pattern = "://" not in part and glob.has_magic(part)
        shards += sorted(glob.glob(part)) if is_pattern else [part]
    if not shards:
        raise ValueError(f"shards: no file matches {pattern}")
    return shards

"""Sources without an index: data sets of messages and tar shards, read from the beginning."""

import hashlib
import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from .broken import MAX_PLACE, BrokenSamples
from .records import CONVERSATION_KEYS, ReadRecord, iterate_records
from .rows import check_first, json_files, open_table
from .schema import IMAGE_PLACEHOLDER, MAX_SHOWN, Defect, Origin, Record, make_record, named
from .shards import ending, expand_shards, image_endings, in_order, listed_names
from .sources import given_images, record_of
from .text_files import parse_json, printable

if TYPE_CHECKING:
    from .recipe import MessagesData, WebdatasetData

logger = logging.getLogger(__name__)


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


class MessagesStream(RecordStream):
    """A data set of messages read from the beginning: JSON files, or one of the library `datasets`."""

    def __init__(self, source: "MessagesData", name: str, seed: int) -> None:
        super().__init__(source, name, seed)
        self.path, self.image_folder = source.path, source.image_folder
        files = json_files(source.path)
        self.has_places = files is not None
        self.dataset = _open_table_stream(source) if files is None else _open_json_stream(files)

    def one_pass(self, number: int | None = None) -> Iterator[Record]:
        dataset = self.dataset
        if number is not None:
            dataset = dataset.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
            dataset.set_epoch(number)
        for index, row in enumerate(self._rows(dataset)):
            if self.has_places:
                read = ReadRecord(**row)
            else:  # once shuffled, a row has no number: its text names it
                where = f"row {index}" if number is None else f"row with text {_digest(row)}"
                read = ReadRecord(f"{self.path}: {where}", row)
            origin = Origin(self.name, named(read.place, read.value), self.broken)
            given = given_images(read.value)
            yield record_of(origin, read, given, self.image_folder, self.max_images, self.max_pixels)

    def _rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from dataset
        except Exception as error:  # of as many kinds as there are formats; what follows cannot be read
            raise ValueError(f"{self.path}: the data set cannot be read to its end: {error}") from error


def _open_json_stream(files: Sequence[Path]) -> Any:
    from datasets import IterableDataset

    for read in itertools.islice(iterate_records(files[0]), 1):
        check_first(read)
    return IterableDataset.from_generator(_json_rows, gen_kwargs={"files": [str(file) for file in files]})


def _json_rows(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        for read in iterate_records(Path(file)):
            yield read._asdict()


def _open_table_stream(source: "MessagesData") -> Any:
    dataset = open_table(source)
    # images stay encoded: one that is damaged is no reason to stop reading
    return dataset if dataset.features is None else dataset.decode(False)


def _digest(row: Mapping[str, Any]) -> str:
    text = str(row.get("messages") or row.get("conversations"))
    return f"{text[:80]!r}... ({hashlib.blake2b(text.encode('utf-8', 'replace'), digest_size=6).hexdigest()})"


class WebdatasetStream(RecordStream):
    """Tar shards. The files of a sample share their name up to the first dot: `KEY.json` with `messages` or
    `conversations`, or `KEY.txt` with a caption, and images.

    Where the json lists names of its images, these give their order; else the numbers in the names of the files do
    (`KEY.0.png` to `KEY.11.png`), since writers of shards sort members by name. Several images without either are a
    defect.

    Raises:
        ValueError: no shard matches.
    """

    def __init__(self, source: "WebdatasetData", name: str, seed: int) -> None:
        super().__init__(source, name, seed)
        self.shards = expand_shards(source.shards)
        self._unread: set[str] = set()

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
        place, key = f"{members['__url__']}: sample {members['__key__']}", members["__key__"]
        files = {name: data for name, data in members.items() if not name.startswith("__")}
        names = [name for name in files if ending(name) in image_endings()]
        self._note_unread(place, files)
        raw, error = _conversation(files, len(names))
        defect = None
        if error is None and len(names) > 1:
            try:
                names = in_order(names, listed_names(raw), key)
            except ValueError as problem:
                defect = Defect("image order", str(problem))
        origin = Origin(self.name, named(place, raw), self.broken)
        images = [files[name] for name in names]
        record = make_record(origin, raw, images, self.max_images, self.max_pixels, error, names)
        if defect is not None:
            record.defects.append(defect)
        return record

    def _note_unread(self, place: str, files: Mapping[str, bytes]) -> None:
        """Say once of every ending that is neither text nor an image that can be read."""
        for name in files:
            if ending(name) not in image_endings() | {"json", "txt"} | self._unread:
                self._unread.add(ending(name))
                shown = printable(ending(name), MAX_SHOWN)
                logger.warning(
                    "data.%s: files that end in .%s are not read (%s)", self.name, shown, printable(place, MAX_PLACE)
                )


def _conversation(files: Mapping[str, bytes], images: int) -> tuple[Any, str | None]:
    """The raw record of a sample, or why there is none."""
    if "json" in files:
        try:
            raw = parse_json(files["json"])
        except ValueError as error:
            return None, f"its json is {error}"
        if isinstance(raw, dict) and any(key in raw for key in CONVERSATION_KEYS):
            return raw, None
    if "txt" not in files:
        return None, "it has neither a json with messages nor a txt with a caption"
    try:
        caption = files["txt"].decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return None, f"its txt is not UTF-8: {error}"
    asked = {"role": "user", "content": IMAGE_PLACEHOLDER * images}
    return {"messages": [asked, {"role": "assistant", "content": caption}]}, None

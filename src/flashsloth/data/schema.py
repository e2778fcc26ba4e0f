"""The one format of training: records as they are read, samples as they are learned, and their defects."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from PIL import Image

from ..model.image_loading import DEFAULT_MAX_PIXELS, load_image
from .broken import BrokenSamples
from .text_files import printable

IMAGE_PLACEHOLDER = "<image>"
# What an image of a record may be; anything else is a defect of its own.
IMAGE_TYPES = (Path, bytes, Image.Image)
ROLES = ("system", "user", "assistant")
# What an image part may name its image by: its place among the record's images, or the name of one of them.
PART_NAMES = ("image", "path", "url", "name")
MAX_SHOWN = 80  # characters of a user's value in a message
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Defect(NamedTuple):
    """One thing that is wrong with a record: the sort of defect, and a sentence."""

    kind: str
    message: str


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from.

    Attributes:
        source: name of the source in the recipe's `data`.
        place: file and record.
        broken: who counts the broken samples of this source; without one, a broken sample is an error.
    """

    source: str
    place: str
    broken: BrokenSamples | None = None

    def skip(self, error: Exception) -> None:
        """Count the sample as broken.

        Raises:
            ValueError: too many are, or nobody counts them.
        """
        if self.broken is None:
            raise ValueError(f"{self.place} is broken: {error}") from error
        self.broken.add(self.place, error)


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
    origin: Origin | None = None
    keep: Callable[[Mapping[str, Any]], None] | None = None
    """Takes what it was encoded to, for later epochs."""


@dataclass
class Record:
    """A sample whose images are not read yet. The collator loads it, in the loader's worker process.

    Attributes:
        images: paths, encoded bytes or PIL images.
        defects: what is wrong with it as far as it is known without its images.
    """

    origin: Origin
    identifier: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    max_pixels: int = DEFAULT_MAX_PIXELS
    keep: Callable[[Mapping[str, Any]], None] | None = None

    @property
    def num_characters(self) -> int:
        """Length of all its text."""
        return sum(len(part.get("text", "")) for message in self.messages for part in message["content"])

    def load_image(self, index: int) -> Image.Image:
        """One image, 8-bit RGB and upright.

        Raises:
            ValueError, FileNotFoundError: it is missing, broken or too large; the message names the file.
        """
        return load_image(self.images[index], max_pixels=self.max_pixels)

    def load(self) -> Sample | None:
        """The sample with its images; None when it is broken, which is then counted.

        Raises:
            ValueError: more samples are broken than the source allows.
        """
        try:
            if self.defects:
                raise ValueError(self.defects[0].message)
            images = [self.load_image(index) for index in range(len(self.images))]
        except (ValueError, FileNotFoundError) as error:
            self.origin.skip(error)
            return None
        answers = [message["content"][0]["text"] for message in self.messages if message["role"] == "assistant"]
        return Sample(images, self.messages, answers[0], {"id": self.identifier}, self.origin, self.keep)


def count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    """Image parts of a conversation."""
    parts = (part for message in messages if not isinstance(message["content"], str) for part in message["content"])
    return sum(part["type"] == "image" for part in parts)


def named(place: str, raw: Any) -> str:
    """A record's place, with its id where it has one."""
    identifier = _identifier(raw)
    return place if identifier is None else f"{place} (id {printable(identifier, MAX_SHOWN)})"


def _identifier(raw: Any) -> str | None:
    value = raw.get("id") if isinstance(raw, Mapping) else None
    return str(value) if isinstance(value, (str, int, float)) else None


def make_record(
    origin: Origin,
    raw: Any,
    images: Sequence[Any],
    max_images: int,
    max_pixels: int,
    read_error: str | None = None,
    names: Sequence[str | None] = (),
) -> Record:
    """Turn what a file holds into a record, with every defect that shows without reading images.

    Args:
        raw: a mapping with `messages` (`role`, `content`: text or parts) or LLaVA's `conversations` (`from`, `value`).
        images: its images, in the order of their placeholders. Parts that name theirs decide where they name them.
        read_error: why there is nothing to turn into a record.
        names: of the images, where they have any.
    """
    record = Record(origin, images=list(images), max_pixels=max_pixels)
    if read_error is not None:
        record.defects.append(Defect("unreadable record", read_error))
    elif not isinstance(raw, Mapping):
        record.defects.append(Defect("unreadable record", f"a record is a mapping, got {type(raw).__name__}"))
    else:
        record.identifier = _identifier(raw)
        turns, role_key, text_key = _turns_of(raw)
        record.messages, defects = _read_turns(turns, role_key, text_key)
        record.defects += defects
        record.defects += _check_images(record, max_images)
        if not record.defects:
            try:
                record.images = _arrange(record.images, image_references(raw), names)
            except ValueError as error:
                record.defects.append(Defect("image order", str(error)))
    return record


def image_references(raw: Mapping[str, Any]) -> list[int | str | None]:
    """What every placeholder of a record says of its image: the number or the name of it, or nothing."""
    turns, role_key, text_key = _turns_of(raw)
    references: list[int | str | None] = []
    for turn in turns if isinstance(turns, Sequence) else ():
        content = turn.get(text_key) if isinstance(turn, Mapping) else None
        if isinstance(content, str):
            role = turn.get(role_key)
            is_user = isinstance(role, str) and LLAVA_ROLES.get(role) == "user"
            references += [None] * (content.count(IMAGE_PLACEHOLDER) if is_user else 0)
        elif isinstance(content, Sequence):
            references += [_reference(part) for part in content if isinstance(part, Mapping) and _is_image(part)]
    return references


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image"


def _reference(part: Mapping[str, Any]) -> int | str | None:
    index = part.get("index")
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    return next((part[key] for key in PART_NAMES if isinstance(part.get(key), str) and part[key]), None)


def _arrange(images: list[Any], references: Sequence[int | str | None], names: Sequence[str | None]) -> list[Any]:
    """The images in the order of the placeholders.

    Raises:
        ValueError: placeholders name images of which some are not there.
    """
    if len(images) < 2:
        return images
    by_name = {PurePath(name).name: index for index, name in enumerate(names) if name}
    if len(by_name) < len(images):
        by_name = {}  # without names, or with equal ones
    places = [
        reference if isinstance(reference, int) else by_name.get(PurePath(reference).name) if reference else None
        for reference in references
    ]
    if not any(isinstance(reference, int) for reference in references) and not any(
        place is not None for place in places
    ):
        return images  # nothing is said of them, or by names of another place
    if sorted(place for place in places if place is not None) != list(range(len(images))):
        said = printable(", ".join(str(reference) for reference in references), MAX_SHOWN)
        raise ValueError(f"the image parts name {said}, which are not the {len(images)} images, each once")
    return [images[place] for place in places if place is not None]


def _turns_of(raw: Mapping[str, Any]) -> tuple[Any, str, str]:
    if raw.get("messages") is not None:
        return raw["messages"], "role", "content"
    return raw.get("conversations"), "from", "value"


def _read_turns(turns: Any, role_key: str, text_key: str) -> tuple[list[dict[str, Any]], list[Defect]]:
    """Messages, and the defects of turns alone and of their order."""
    if not turns or not isinstance(turns, Sequence) or isinstance(turns, str):
        return [], [Defect("empty conversation", "the record has no conversation")]
    defects: list[Defect] = []
    messages: list[dict[str, Any]] = []
    known_roles = LLAVA_ROLES if role_key == "from" else {role: role for role in ROLES}
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn or turn.get(text_key) is None:
            defects.append(Defect("incomplete turn", f"turn {number} lacks {role_key} or {text_key}"))
            continue
        role = known_roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            shown = repr(turn[role_key]) if isinstance(turn[role_key], str) else type(turn[role_key]).__name__
            shown = printable(shown, MAX_SHOWN)
            message = f"turn {number} has the unknown role {shown}; known are {', '.join(known_roles)}"
            defects.append(Defect("unknown role", message))
            continue
        content = _read_content(turn[text_key], splits_placeholders=role == "user")
        if content is None:
            message = f"{text_key} of turn {number} is neither text nor a list of text and image parts"
            defects.append(Defect("value is not text", message))
            continue
        if not all(_is_unicode(part.get("text", "")) for part in content):
            message = f"{text_key} of turn {number} holds half of a surrogate pair, which is no character"
            defects.append(Defect("text is not Unicode", message))
            continue
        messages.append({"role": role, "content": content})
    # the order of turns says nothing where one of them could not be read
    return messages, defects or list(_check_order(messages))


def _read_content(value: Any, splits_placeholders: bool) -> list[dict[str, str]] | None:
    if isinstance(value, str):
        # only a user's placeholder stands for an image; the same text in an answer is text
        return _split_placeholders(value) if splits_placeholders else [{"type": "text", "text": value}]
    if not isinstance(value, Sequence):
        return None
    parts: list[dict[str, str]] = []
    for part in value:
        if not isinstance(part, Mapping):
            return None
        if part.get("type") == "image" and splits_placeholders:
            parts.append({"type": "image"})
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            return None
    if not splits_placeholders:
        return [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    return parts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split_placeholders(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _check_order(messages: list[dict[str, Any]]) -> Iterator[Defect]:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    answers = [message for message in turns if message["role"] == "assistant"]
    if not answers:
        yield Defect("no answer", "the record has no answer to learn")
        return
    if turns[0]["role"] != "user":
        yield Defect("first turn not from the user", f"the first turn is from {turns[0]['role']}, not from the user")
        return
    for number, (before, after) in enumerate(zip(turns, turns[1:], strict=False), start=2):
        if after["role"] == before["role"] or after["role"] == "system":
            message = (
                f"turn {number} is from {after['role']} after {before['role']}; user and assistant must alternate"
            )
            yield Defect("turns do not alternate", message)
            return
    if turns[-1]["role"] == "user":
        yield Defect("no answer", "the last turn is a question without an answer")
    # an image without a question may be a caption's; whether a stage can learn from it is for its template to say
    if not all(any(part.get("text", "?").strip() for part in turn["content"]) for turn in turns[::2]):
        yield Defect("empty question", "a question is empty")
    if any(not message["content"][0]["text"].strip() for message in answers):
        yield Defect("empty answer", "an answer is empty")


def _check_images(record: Record, max_images: int) -> Iterator[Defect]:
    placeholders = count_images(record.messages)
    unread = ("incomplete turn", "value is not text", "text is not Unicode")
    read_all = not any(defect.kind in unread for defect in record.defects)
    if record.messages and read_all and placeholders != len(record.images):
        message = f"{placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(record.images)} images"
        yield Defect("placeholder count", message)
    if len(record.images) > max_images:
        yield Defect("too many images", f"{len(record.images)} images, more than max_images {max_images}")
    for source in record.images:
        if not isinstance(source, IMAGE_TYPES):
            yield Defect(
                "image is not a file", f"an image is given as {type(source).__name__}, not as a file or its bytes"
            )

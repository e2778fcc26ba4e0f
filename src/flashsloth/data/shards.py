"""Names in tar shards: which files a pattern stands for, which members of a sample are images, and their order."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from ..model.image_decoding import REFUSED_FORMATS
from .schema import MAX_SHOWN, image_references
from .sources import given_images
from .text_files import printable


def expand_shards(pattern: str) -> list[str]:
    """Paths and URLs of tar shards, by braces or by a local pattern.

    Raises:
        ValueError: a pattern matches nothing.
        ImportError: webdataset is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError("tar shards need webdataset: pip install 'flashsloth[webdataset]'") from error
    shards: list[str] = []
    for part in expand_urls(pattern):
        is_pattern = "://" not in part and glob.has_magic(part)
        found = sorted(glob.glob(part, recursive=True)) if is_pattern else [part]
        if not found:
            raise ValueError(f"shards: no file matches {part}")
        for shard in found:
            if os.path.exists(shard) and not os.path.isfile(shard):  # a pipe would wait for a writer
                raise ValueError(f"shards: {shard} is no regular file")
        shards += found
    if not shards:
        raise ValueError(f"shards: no file matches {pattern}")
    return shards


@lru_cache
def image_endings() -> frozenset[str]:
    """Endings of names of images that Pillow can read and `load_image` lets it."""
    known = Image.registered_extensions().items()
    return frozenset(ending[1:] for ending, kind in known if kind in Image.OPEN and kind not in REFUSED_FORMATS)


def ending(name: str) -> str:
    """What follows the last dot."""
    return name.rpartition(".")[2].lower()


def listed_names(raw: Mapping[str, Any]) -> list[str]:
    """Names of images that a json lists or that its image parts give; none unless every image has one."""
    listed = [image.get("path") if isinstance(image, Mapping) else image for image in given_images(raw)]
    listed = listed or image_references(raw)
    names = [name for name in listed if isinstance(name, str)]
    return names if len(names) == len(listed) else []


def in_order(names: Sequence[str], listed: Sequence[str], key: str) -> list[str]:
    """Names of a sample's images in the order of their placeholders.

    Args:
        names: what follows the key and a dot, in the order of the shard.
        listed: names as the sample's json gives them: with the key or without, with a folder or without.

    Raises:
        ValueError: a listed name is not there, one that is there is not listed, or nothing tells the order.
    """
    return _as_listed(names, listed, key) if listed else _as_numbered(names)


def _as_listed(names: Sequence[str], listed: Sequence[str], key: str) -> list[str]:
    known = {}
    for name in names:
        known.update({name.lower(): name, f"{PurePosixPath(key).name}.{name}".lower(): name})
    found = []
    for wanted in listed:
        member = known.get(PurePosixPath(wanted).name.lower())
        if member is None:
            raise ValueError(
                f"its json names the image {printable(wanted, MAX_SHOWN)!r}, which the sample does not hold; it holds "
                f"{printable(', '.join(names), MAX_SHOWN)}"
            )
        found.append(member)
    unlisted = sorted(set(names) - set(found))
    if unlisted:
        raise ValueError(f"its json does not name the image {printable(unlisted[0], MAX_SHOWN)!r}")
    return found


def _as_numbered(names: Sequence[str]) -> list[str]:
    pieces = {name: re.split(r"([0-9]+)", name.rpartition(".")[0]) for name in names}  # text and digits in turn
    texts = {tuple(parts[::2]) for parts in pieces.values()}
    numbers = {name: tuple(int(digits) for digits in parts[1::2]) for name, parts in pieces.items()}
    if len(texts) > 1 or len(set(numbers.values())) < len(names):
        raise ValueError(
            f"nothing tells the order of its images {printable(', '.join(names), MAX_SHOWN)}: number them (0.png, "
            "1.png), or list their names in order as images of its json"
        )
    return sorted(names, key=numbers.__getitem__)

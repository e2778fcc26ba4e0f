"""Images that clients name: fetched and decoded off the event loop, within limits, kept where they are uploaded."""

import asyncio
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from ..model.image_download import download
from ..model.image_loading import load_image
from .errors import BAD_REQUEST, TOO_LARGE, TOO_MANY, UNPROCESSABLE, ApiError
from .settings import Settings

UPLOADED = "image"  # scheme of the URLs of uploads
DECODERS = 2  # more would only share the processor
FETCHERS = 32
CHANNELS = 3
ID_DIGITS = 32


class ImageStore:
    """Decoded images by an id made of their pixels; the least recently used make room."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._images: OrderedDict[str, Image.Image] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, image: Image.Image) -> str:
        """The id of an 8-bit RGB image.

        Raises:
            ApiError: it is larger than all of the store.
        """
        size = _num_bytes(image)
        if size > self.max_bytes:
            message = f"the image has {size:,} bytes of pixels, and all that are kept may have {self.max_bytes:,}"
            raise ApiError(TOO_LARGE, message)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        identifier = f"image-{digest[:ID_DIGITS]}"
        with self._lock:
            if identifier not in self._images:
                self._bytes += size
            self._images[identifier] = image
            self._images.move_to_end(identifier)
            while self._bytes > self.max_bytes:
                self._bytes -= _num_bytes(self._images.popitem(last=False)[1])
        return identifier

    def get(self, identifier: str) -> Image.Image | None:
        with self._lock:
            if identifier in self._images:
                self._images.move_to_end(identifier)
            return self._images.get(identifier)


def _num_bytes(image: Image.Image) -> int:
    return image.width * image.height * CHANNELS


class PixelCount:
    """Decoded pixels that requests hold at this moment."""

    def __init__(self, most: int, retry_after: float) -> None:
        self.most, self.retry_after, self.held = most, retry_after, 0

    def take(self, image: Image.Image) -> int:
        """The pixels of an image, to be given back.

        Raises:
            ApiError: there are too many.
        """
        pixels = image.width * image.height
        if self.held + pixels > self.most:
            raise ApiError(TOO_MANY, "the server holds as many pixels as it takes", retry_after=self.retry_after)
        self.held += pixels
        return pixels

    def give_back(self, pixels: int) -> None:
        self.held -= pixels


class ImageReader:
    """Images by URL: `data:`, `http(s):`, `image://` for uploads, `file://` under the root of the settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = ImageStore(settings.image_store_bytes)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="flashsloth-decode")
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="flashsloth-fetch")

    def close(self) -> None:
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    async def read(self, url: str, field: str | None = None) -> Image.Image:
        """An upright 8-bit RGB image.

        Raises:
            ApiError: names the field and the cause.
        """
        # Whole URLs are not parsed here: a data URL may be long.
        scheme, separator, rest = url[:16].lstrip().partition(":")
        scheme = scheme.lower() if separator else ""
        if scheme == UPLOADED:
            image = self.store.get(url.strip().removeprefix(f"{UPLOADED}://"))
            if image is None:
                message = f"there is no upload {url!r:.100}, or others took its place; upload the image again"
                raise ApiError(BAD_REQUEST, message, field, "image_not_found")
            return image
        if scheme == "data":
            header, _, payload = url.partition(",")
            # base64 has 4 characters for 3 bytes
            self._check_bytes(len(payload) * 3 // 4 if header.rstrip().lower().endswith(";base64") else 0, field)
            return await self._decode(url, field)
        if scheme in ("http", "https"):
            limits = self.settings
            data = await self._run(
                field,
                self._fetchers,
                lambda: download(url, limits.max_image_bytes, limits.fetch_seconds, limits.allow_private_urls),
            )
            return await self.decode(data, field)
        if scheme == "file":
            return await self._decode(await self._run(field, self._fetchers, lambda: self._path(url)), field)
        message = "an image is named by a data:, http:, https: or image:// URL"
        raise ApiError(BAD_REQUEST, message, field)

    async def decode(self, data: bytes, field: str | None = None) -> Image.Image:
        """An image from its encoded bytes; errors as `read`."""
        self._check_bytes(len(data), field)
        return await self._decode(data, field)

    def _check_bytes(self, size: int, field: str | None) -> None:
        if size > self.settings.max_image_bytes:
            message = f"the image is larger than this server's limit of {self.settings.max_image_bytes:,} bytes"
            raise ApiError(TOO_LARGE, message, field)

    async def _decode(self, source: Any, field: str | None) -> Image.Image:
        limits = self.settings
        return await self._run(
            field,
            self._decoders,
            lambda: load_image(
                source,
                max_pixels=limits.max_pixels,
                max_bytes=limits.max_image_bytes,
                alpha_background=limits.alpha_background,
            ),
        )

    def _path(self, url: str) -> Path:
        """The file of a `file://` URL; links are followed before it is compared with the root."""
        root = self.settings.image_root
        if root is None:
            raise ValueError("this server reads no local files; it does under the folder of --image-root")
        parts = urlsplit(url.strip())
        path = Path(os.path.realpath(unquote(parts.path)))
        if parts.netloc.lower() not in ("", "localhost") or not path.is_relative_to(os.path.realpath(root)):
            raise ValueError("the file is not under the folder that this server reads")
        return path

    @staticmethod
    async def _run(field: str | None, pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except (ValueError, OSError) as error:
            raise ApiError(UNPROCESSABLE, str(error), field, "invalid_image") from error

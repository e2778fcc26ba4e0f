"""Images of requests, read within the limits of the server's settings."""

import asyncio
from typing import Any

from PIL import Image
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from ..errors import ApiError
from ..images import ImageReader
from ..settings import Settings

CONNECTOR = "flashsloth"
_readers: list[ImageReader] = []


def read_images_within(settings: Settings) -> None:
    """Settings of this process's server; to be called before vLLM reads images by `CONNECTOR`."""
    _readers[:] = [ImageReader(settings)]


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class FlashSlothMediaConnector(MediaConnector):
    """Images as the built-in server reads them: no private addresses, no paths beyond the root, limits on size."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        return asyncio.run(self.fetch_image_async(image_url))

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        try:
            return await _readers[0].read(image_url, "messages")
        except ApiError as error:
            raise VLLMUnprocessableEntityError(str(error), parameter="messages") from error

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise VLLMUnprocessableEntityError("FlashSloth takes images only", parameter="messages")

    fetch_video = fetch_audio = fetch_image_embedding = fetch_audio_embedding = _refuse

    async def _refuse_async(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse()

    fetch_video_async = fetch_audio_async = fetch_image_embedding_async = fetch_audio_embedding_async = _refuse_async

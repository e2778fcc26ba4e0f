"""What whoever runs the server decides: its name, who may ask, and its limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Attributes:
        model_name: what clients call the model.
        api_keys: any of them is accepted; none at all asks for none.
        max_tokens: longest answer where a request names none; None for the engine's default.
        visual_tokens: of every image where a request names no number; None for the model's default.
        max_answers: that one request may ask for (`n`).
        max_in_flight: answers that are prepared, waited for or made at once; more are refused with 429.
        max_body_bytes: of one request, its data URLs included.
        max_images: of one request.
        max_image_bytes: of one encoded image, wherever it comes from.
        max_pixels: of one image, read from its header.
        max_pixels_in_flight: decoded pixels of all requests at once; more are refused with 429.
        alpha_background: colour under transparent pixels, as the model's image processor has it.
        image_store_bytes: decoded images that were uploaded; the least recently used go first.
        image_root: folder of which `file://` URLs may name files; None for none.
        allow_private_urls: also fetch images from addresses that are not public.
        fetch_seconds: for one image behind a URL.
        body_seconds: for a client to send its request.
        request_seconds: for one request, from its last byte to that of its answer.
        drain_seconds: for answers under way when the server is told to stop.
        retry_after: seconds that a refused client is told to wait where the engine does not say.
    """

    model_name: str = "nano"
    api_keys: Sequence[str] = ()
    max_tokens: int | None = None
    visual_tokens: int | None = None
    max_answers: int = 8
    max_in_flight: int = 128
    max_body_bytes: int = 32 * MEBIBYTE
    max_images: int = 8
    max_image_bytes: int = 20 * MEBIBYTE
    max_pixels: int = 50_000_000
    max_pixels_in_flight: int = 400_000_000
    alpha_background: Sequence[int] | None = None
    image_store_bytes: int = 256 * MEBIBYTE
    image_root: Path | None = None
    allow_private_urls: bool = False
    fetch_seconds: float = 10.0
    body_seconds: float = 30.0
    request_seconds: float = 120.0
    drain_seconds: float = 30.0
    retry_after: float = 1.0

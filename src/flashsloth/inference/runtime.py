"""A model on its device: views encoded, tokens generated, both compiled where asked for.

Shape suffixes: I images, V views, C channels, H W pixels, P un-pooled patches, E width of the encoder.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from ..checkpoints.loading import synchronize
from ..kernels.compilation import RecordingThread, compile_part, decoding_config, static_cache
from ..model.backbones import CACHE_ARGUMENT
from ..model.configuration_flashsloth import FlashSlothConfig
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from .attention import with_readable_attention
from .equal_views import encode_distinct_views

_process: int | None = None  # that of the first model


def refuse_after_fork() -> None:
    """Raises:
    RuntimeError: this process is a fork of one with a model, and uses several threads: torch's threads did not come
        along, and it would wait for them forever.
    """
    global _process
    if _process is None:
        _process = os.getpid()
    if _process != os.getpid() and torch.get_num_threads() > 1:
        raise RuntimeError(
            "this process was forked from one in which a model was loaded, where torch waits for threads that are not "
            'here; start it with multiprocessing\'s "spawn", or call torch.set_num_threads(1) in it'
        )


class Runtime:
    """A loaded model with its processor, and how its parts are run; it knows nothing of turns.

    Args:
        model: the model, on its device.
        processor: the processor saved beside it.
        name: shown in messages.
        compile: compile the encoder and every step of an answer, at their first use or by `warm_up`; prompts, whose
            lengths differ, run as they are. The cache then has a fixed size, 256 tokens at a time.
        share_equal_views: encode views of equal pixels once, such as the blank tiles of padded images.

    Raises:
        ValueError: compile on a machine without a compiler.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        processor: FlashSlothProcessor,
        name: str = "model",
        compile: bool = False,
        share_equal_views: bool = False,
    ) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.share_equal_views = share_equal_views
        self.compile_config: CompileConfig | None = None
        self._readable: FlashSlothForConditionalGeneration | None = None
        self._reading = threading.Lock()
        self._thread = RecordingThread() if compile and model.device.type == "cuda" else None
        if compile:
            compile_part(model.model.vision_tower, model.device, dynamic=None)
            self.compile_config = decoding_config(model.device)

    @property
    def config(self) -> FlashSlothConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def image_tokens(self, images: int, visual_tokens: int | Sequence[int] | None) -> list[int] | None:
        """Visual tokens of each image; None where they are the model's default.

        Raises:
            ValueError: a number that the model cannot make, or a list that does not fit the images.
        """
        if visual_tokens is None:
            return None
        counts = [visual_tokens] * images if isinstance(visual_tokens, int) else list(visual_tokens)
        if len(counts) != images:
            raise ValueError(f"visual_tokens names {len(counts)} images, but there are {images}")
        for count in counts:
            self.config.window_of(count)
        return counts

    def encode_views(self, pixel_values: Tensor) -> Tensor:
        """Un-pooled features (I, P, E) of images (I, V, C, H, W), which may still be on the CPU."""
        if self.share_equal_views:
            return self._call(encode_distinct_views, self.model.model, pixel_values)
        return self._call(self.model.model.encode_views, pixel_values.to(self.device))

    def generate(self, **arguments: Any) -> Any:
        """As the model's `generate`, in the thread of its CUDA graphs where they are recorded."""
        return self._call(self.model.generate, **arguments)

    @contextmanager
    def readable_model(self) -> Iterator[FlashSlothForConditionalGeneration]:
        """The same weights in a model that tells its attention, made at its first use; for one thread at a time.

        The model that answers stays as it is, and may answer meanwhile.
        """
        with self._reading:
            if self._readable is None:
                self._readable = with_readable_attention(self.model)
            yield self._readable

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        refuse_after_fork()
        return function(*args, **kwargs) if self._thread is None else self._thread.call(function, *args, **kwargs)

    def compile_options(self, cache_tokens: int) -> dict[str, Any]:
        """Arguments of `generate` that compile decoding: an empty cache for so many tokens; none without `compile`."""
        if self.compile_config is None:
            return {}
        cache = static_cache(self.config.text_config, cache_tokens)
        return {CACHE_ARGUMENT: cache, "compile_config": self.compile_config}

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        synchronize(self.device)

"""Load a model by name and ask it about images, with the time of every stage.

    model = flashsloth.inference.load("nano")
    answer = model.ask("photo.jpg", "What is in the picture?")

Folders are read by `loading`; turns, answers and their times are in `conversation`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from . import hub
from .compilation import RecordingThread, check_compiler, compile_part, decoding_config, static_cache
from .conversation import DEFAULT_MAX_NEW_TOKENS, Answer, AnswerStream, Conversation, Timings
from .cpu_kernels import chosen_kernels, prepare_for_cpu_
from .equal_views import encode_distinct_views
from .loading import DTYPES, load_model, select_device, synchronize
from .model.backbones import CACHE_ARGUMENT
from .model.configuration_flashsloth import FlashSlothConfig
from .model.modeling_flashsloth import FlashSlothForConditionalGeneration
from .model.processing_flashsloth import FlashSlothProcessor
from .quantization import check_scheme, quantize_

__all__ = [
    "DEFAULT_MAX_NEW_TOKENS",
    "DEFAULT_MODEL",
    "DTYPES",
    "Answer",
    "AnswerStream",
    "Conversation",
    "FlashSloth",
    "Timings",
    "load",
    "load_model",
    "select_device",
]

DEFAULT_MODEL = "nano"


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    compile: bool = False,
    share_equal_views: bool = False,
    kernels: str = "auto",
) -> FlashSloth:
    """A model ready to be asked.

    Args:
        name: packaged model ("nano"), folder, or hub id; an authors' checkpoint is converted into the cache first,
            an adapter is merged into its base model in memory.
        device: "auto" (CUDA, MPS, CPU), or a torch device.
        dtype: "auto" (as saved; float32 on a CPU), "float32", "bfloat16" or "float16".
        quantization: scheme of `quantization.quantize_`, applied in memory, on the device.
        compile, share_equal_views: as in `FlashSloth`.
        kernels: "auto" packs layers for oneDNN on a CPU (`cpu_kernels`), after which the model only answers;
            "torch" leaves it as it is, to be trained or moved.

    Raises:
        ValueError: unknown model, device, dtype, kernels or scheme; a checkpoint that does not hold exactly the
            model's tensors; a model that is quantized already; compile without a compiler.
        ImportError: quantization without torchao.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
    target = select_device(device)
    kernels = chosen_kernels(kernels, target.type)
    folder = hub.resolve(name)
    if not (folder / "processor_config.json").is_file():
        raise ValueError(f"{folder} has no processor (processor_config.json); was the checkpoint without a tokenizer?")
    if quantization is not None:
        _check_quantization(folder, quantization)
    if compile:
        check_compiler(target)
    wanted = "float32" if dtype == "auto" and target.type == "cpu" else dtype
    model = load_model(folder, wanted).to(target).eval()
    processor = FlashSlothProcessor.from_pretrained(folder)
    if quantization is not None:
        quantize_(model, quantization)
    if kernels == "packed":
        prepare_for_cpu_(model)
    return FlashSloth(model, processor, name=os.fspath(name), compile=compile, share_equal_views=share_equal_views)


def _check_quantization(folder: Path, scheme: str) -> None:
    """Refuse before the weights are read what `quantize_` would refuse after it."""
    from .train.adapters import base_folder

    check_scheme(scheme)
    source = base_folder(folder) if hub.is_adapter(folder) else folder
    if "quantization_config" in hub.read_config(source):
        raise ValueError(
            f"{source} is quantized already, so {scheme} cannot be applied to it; load it without a scheme, or give "
            "the folder it was made from"
        )


class FlashSloth:
    """A loaded model with its processor.

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

    def ask(
        self,
        images: Any,
        question: str,
        *,
        max_new_tokens: int | None = None,
        system: str | None = None,
        on_text: Callable[[str], None] | None = None,
        **generation: Any,
    ) -> Answer:
        """Answer one question about one or several images.

        Args:
            images: path, URL, data URL, PIL, numpy or torch image, or a list of these (an empty one for text only).
            question: the user's text.
            max_new_tokens: longest answer; default that of the model, else 128.
            system: system prompt; default that of the model's chat template.
            on_text: called with each piece of text as it is generated.
            generation: further arguments of `generate`.

        Raises:
            ValueError, OSError: a bad image, an empty question, or a prompt longer than the context.
        """
        return Conversation(self, images, system=system).ask(
            question, max_new_tokens=max_new_tokens, on_text=on_text, **generation
        )

    def stream(self, images: Any, question: str, **options: Any) -> AnswerStream:
        """Like `ask`, but returns at once an iterator over pieces of the answer's text."""
        return self.conversation(images, system=options.pop("system", None)).stream(question, **options)

    def conversation(self, images: Any, system: str | None = None) -> Conversation:
        """Several turns about the same images, which are encoded once; the cache of earlier turns is used again."""
        return Conversation(self, images, system=system)

    def encode_views(self, pixel_values: Tensor) -> Tensor:
        """Un-pooled features (I, P, E) of images (I, V, C, H, W), which may still be on the CPU."""
        if self.share_equal_views:
            return self._call(encode_distinct_views, self.model.model, pixel_values)
        return self._call(self.model.model.encode_views, pixel_values.to(self.device))

    def generate(self, **arguments: Any) -> Any:
        """As the model's `generate`, in the thread of its CUDA graphs where they are recorded."""
        return self._call(self.model.generate, **arguments)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if self._thread is None else self._thread.call(function, *args, **kwargs)

    def compile_options(self, cache_tokens: int) -> dict[str, Any]:
        """Arguments of `generate` that compile decoding: an empty cache for so many tokens; none without `compile`."""
        if self.compile_config is None:
            return {}
        cache = static_cache(self.config.text_config, cache_tokens)
        return {CACHE_ARGUMENT: cache, "compile_config": self.compile_config}

    @torch.inference_mode()
    def warm_up(self, images: Any, max_new_tokens: int | None = None) -> float:
        """Pay what a first question pays, compilation above all; returns its seconds.

        Args:
            images: as in `ask`; their number decides what is compiled.
            max_new_tokens: of the questions to come; decides about the size of the first cache.

        Raises:
            ValueError, OSError: a bad image, before anything is compiled.
        """
        started = time.perf_counter()
        self.conversation(images).warm_up(max_new_tokens)
        return time.perf_counter() - started

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        synchronize(self.device)

"""Load a model by name and ask it about images, with the time of every stage.

    model = flashsloth.inference.load("nano")
    answer = model.ask("photo.jpg", "What is in the picture?")

Folders are read by `loading`; turns, answers and their times are in `conversation`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from . import hub
from .conversation import DEFAULT_MAX_NEW_TOKENS, Answer, AnswerStream, Conversation, Timings
from .loading import DTYPES, load_model, select_device
from .model.configuration_flashsloth import FlashSlothConfig
from .model.modeling_flashsloth import FlashSlothForConditionalGeneration
from .model.processing_flashsloth import FlashSlothProcessor

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


def load(name: str | os.PathLike[str] = DEFAULT_MODEL, device: str = "auto", dtype: str = "auto") -> FlashSloth:
    """A model ready to be asked.

    Args:
        name: packaged model ("nano"), folder, or hub id; an authors' checkpoint is converted into the cache first,
            an adapter is merged into its base model in memory.
        device: "auto" (CUDA, MPS, CPU), or a torch device.
        dtype: "auto" (as saved; float32 on a CPU), "float32", "bfloat16" or "float16".

    Raises:
        ValueError: unknown model, device or dtype; a checkpoint that does not hold exactly the model's tensors.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
    target = select_device(device)
    folder = hub.resolve(name)
    if not (folder / "processor_config.json").is_file():
        raise ValueError(f"{folder} has no processor (processor_config.json); was the checkpoint without a tokenizer?")
    wanted = "float32" if dtype == "auto" and target.type == "cpu" else dtype
    model = load_model(folder, wanted)
    processor = FlashSlothProcessor.from_pretrained(folder)
    return FlashSloth(model.to(target).eval(), processor, name=os.fspath(name))


class FlashSloth:
    """A loaded model with its processor.

    Args:
        model: the model, on its device.
        processor: the processor saved beside it.
        name: shown in messages.
    """

    def __init__(
        self, model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, name: str = "model"
    ) -> None:
        self.model, self.processor, self.name = model, processor, name

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

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

"""A model loaded by its name, ready to be asked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import hub
from ..checkpoints.adapters import base_folder
from ..checkpoints.loading import DTYPES, load_model, select_device
from ..checkpoints.pretrained import load_processor
from ..checkpoints.untrusted import read_config
from ..kernels.compilation import check_compiler
from ..kernels.packed_layers import chosen_kernels, prepare_for_cpu_
from ..kernels.quantization import check_scheme, quantize_
from .answer import Answer
from .conversation import AnswerStream, Conversation
from .explaining import explain_answer
from .explanation import Explanation
from .runtime import Runtime, refuse_after_fork

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
        compile: as in `Runtime`.
        share_equal_views: as in `Runtime`.
        kernels: "auto" packs layers for oneDNN on a CPU (`kernels.packed_layers`), after which the model only answers;
            "torch" leaves it as it is, to be trained or moved.

    Raises:
        ValueError: unknown model, device, dtype, kernels or scheme; a checkpoint that does not hold exactly the
            model's tensors; a model that is quantized already; compile without a compiler.
        ImportError: quantization without torchao.
        RuntimeError: in a process forked from one with a model, unless torch uses one thread in it.
    """
    refuse_after_fork()
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
    processor = load_processor(folder)
    if processor.num_image_tokens != model.config.num_image_tokens:
        raise ValueError(
            f"{folder}: its processor makes {processor.num_image_tokens} visual tokens of an image, its model "
            f"{model.config.num_image_tokens}; correct num_image_tokens in processor_config.json"
        )
    if quantization is not None:
        quantize_(model, quantization)
    if kernels == "packed":
        prepare_for_cpu_(model)
    return FlashSloth(model, processor, name=os.fspath(name), compile=compile, share_equal_views=share_equal_views)


def _check_quantization(folder: Path, scheme: str) -> None:
    """Refuse before the weights are read what `quantize_` would refuse after it."""
    check_scheme(scheme)
    source = base_folder(folder) if hub.is_adapter(folder) else folder
    if "quantization_config" in read_config(source):
        raise ValueError(
            f"{source} is quantized already, so {scheme} cannot be applied to it; load it without a scheme, or give "
            "the folder it was made from"
        )


class FlashSloth(Runtime):
    """A loaded model that answers; arguments and errors as `Runtime`."""

    def ask(
        self,
        images: Any,
        question: str,
        *,
        max_new_tokens: int | None = None,
        system: str | None = None,
        visual_tokens: int | Sequence[int] | None = None,
        on_text: Callable[[str], None] | None = None,
        schema: Mapping[str, Any] | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        confidence: bool = False,
        **generation: Any,
    ) -> Answer:
        """Answer one question about one or several images.

        Args:
            images: path, URL, data URL, PIL, numpy or torch image, or a list of these (an empty one for text only).
            question: the user's text.
            max_new_tokens: longest answer; default that of the model, else 128.
            system: system prompt; default that of the model's chat template.
            visual_tokens: tokens of every image, or one number for each, of `config.visual_token_choices`: fewer are
                quicker, more show more. Default the model's own.
            on_text: called with each piece of text as it is generated.
            schema: JSON schema of the answer; of these three at most one, see `AnswerForm`.
            choices: texts of which the answer is one.
            regex: regular expression of the whole answer.
            confidence: note the probability of the answer, as `Guide.confidences` has it.
            generation: further arguments of `generate`.

        Raises:
            ValueError, OSError: a bad image, an empty question, a number of visual tokens that the model cannot make,
                or a prompt longer than the context; a form that cannot be used, or an answer that max_new_tokens cut
                before its form was complete.
            ImportError: a form without llguidance.
        """
        form: dict[str, Any] = {"schema": schema, "choices": choices, "regex": regex, "confidence": confidence}
        return Conversation(self, images, system=system, visual_tokens=visual_tokens).ask(
            question, max_new_tokens=max_new_tokens, on_text=on_text, **form, **generation
        )

    def stream(self, images: Any, question: str, **options: Any) -> AnswerStream:
        """Like `ask`, but returns at once an iterator over pieces of the answer's text."""
        own = {name: options.pop(name, None) for name in ("system", "visual_tokens")}
        return self.conversation(images, **own).stream(question, **options)

    def conversation(
        self, images: Any, system: str | None = None, visual_tokens: int | Sequence[int] | None = None
    ) -> Conversation:
        """Several turns about the same images, which are encoded once; the cache of earlier turns is used again."""
        return Conversation(self, images, system=system, visual_tokens=visual_tokens)

    def explain(
        self,
        images: Any,
        question: str,
        *,
        answer: str | None = None,
        system: str | None = None,
        visual_tokens: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Explanation:
        """Answer a question as `ask` does, and say what the model attended to.

        The answer is that of `ask`; prompt and answer are then read once more, by a second model over the same
        weights whose attention can be read.

        Args:
            images: as in `ask`; at least one.
            question: as in `ask`.
            answer: explain this answer instead of the model's own.
            system: of the conversation.
            visual_tokens: of the images.
            options: further ones of `ask`.

        Raises:
            ValueError, OSError: as `ask` and `explain_answer`.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not question.strip():
            raise ValueError("the question is empty")
        if answer is None:
            answer = self.ask(images, question, system=system, visual_tokens=visual_tokens, **options).text
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return explain_answer(self, images, messages, answer, visual_tokens)

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

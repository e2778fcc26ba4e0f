"""From the folder of a whole model to configuration, processor and weights; nothing less than all tensors is accepted.

Folders are other people's: whatever a library raises while it reads one becomes a `ValueError` here, no Python code of
theirs is run, and no more memory is taken than their files can fill.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..model.configuration_flashsloth import FlashSlothConfig
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from .files import read_json
from .folder import TensorFolder
from .untrusted import CONFIG, check_folder, code_hint, entries, read_config

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MOST_NAMED_TENSORS = 5
# A model has the parameters its files hold, in 4 bits at least. The rest is room for what is computed, such
# as tables of positions, and for misfits small enough to be named tensor by tensor.
_ELEMENTS_PER_BYTE = 2
_SPARE_ELEMENTS = 2**28
_ENTRIES_PER_STORED = 10
_SPARE_ENTRIES = 1000
_GENERATION_TOKENS = (
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "eos_token_id",
    "force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "pad_token_id", "suppress_tokens",
)  # fmt: skip
_GENERATION_NUMBERS = (
    "epsilon_cutoff", "eta_cutoff", "guidance_scale", "length_penalty", "max_length", "max_new_tokens", "max_time",
    "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_beams", "num_return_sequences",
    "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
)  # fmt: skip


@contextmanager
def reading(name: str | os.PathLike[str], file: str = "") -> Iterator[None]:
    """What a library raises about a folder (or a hub id), or a file in it, becomes a ValueError that names it.

    What a folder cannot be blamed for stays: a library or memory that is missing, a disk that fails.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error)
        reason = reason or type(error).__name__
        folder = Path(name)
        place = "" if str(folder / file) in reason else f"{folder / file} cannot be loaded: "
        hint = code_hint(folder) if folder.is_dir() else ""
        raise ValueError(f"{place}{reason}{hint}") from error


@contextmanager
def no_larger_than(stored: TensorFolder) -> Iterator[None]:
    """Stop the making of modules, in this thread, once they are larger than the files whose weights they wait for.

    A configuration can ask for any size, which costs nothing on the meta device until weights that the files lack are
    made.
    """
    thread = threading.get_ident()
    most_elements = _ELEMENTS_PER_BYTE * stored.num_bytes + _SPARE_ELEMENTS
    most_entries = _ENTRIES_PER_STORED * len(stored.shapes) + _SPARE_ENTRIES
    elements = entries = 0

    def count(_module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal elements, entries
        if threading.get_ident() != thread or tensor is None:
            return
        elements, entries = elements + tensor.numel(), entries + 1
        if elements > most_elements or entries > most_entries:
            raise ValueError(
                f"{stored.folder / CONFIG} describes a model far larger than its files, which hold "
                f"{len(stored.shapes)} tensors in {stored.num_bytes} bytes; one of its sizes is wrong"
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_layers(config: dict[str, Any], stored: TensorFolder) -> None:
    """Numbers of layers, which configurations turn into lists before any layer is made."""
    for key, value in entries(config):
        if "layer" in key and isinstance(value, int) and value > len(stored.shapes):
            raise ValueError(
                f"{stored.folder / CONFIG}: {key} is {value}, but the files hold {len(stored.shapes)} tensors in all"
            )


def load_config(folder: str | os.PathLike[str]) -> FlashSlothConfig:
    """The configuration of a FlashSloth folder.

    Raises:
        ValueError: a broken file, or sizes that its weights cannot have.
    """
    folder = Path(folder)
    values = read_config(folder)
    if values.get("model_type") != FlashSlothConfig.model_type:
        raise ValueError(
            f"{folder} holds a {values.get('model_type')!r} model, not a FlashSloth; see `flashsloth convert`"
        )
    _check_layers(values, TensorFolder(folder))
    with reading(folder, CONFIG):
        return FlashSlothConfig.from_pretrained(folder, trust_remote_code=False)


def _check_generation(file: Path, config: FlashSlothConfig) -> None:
    """Refuse what would fail in the middle of an answer: tokens that the vocabulary has not, numbers that are none."""
    for key, value in (read_json(file) if file.exists() else {}).items():
        if key in _GENERATION_TOKENS and not all(
            type(token) is int and 0 <= token < config.text_config.vocab_size for token in _leaves(value)
        ):
            raise ValueError(f"{file}: {key} is {value!r}, which are no tokens of the model's vocabulary")
        if key in _GENERATION_NUMBERS and not isinstance(value, int | float | None):
            raise ValueError(f"{file}: {key} is {value!r}, which is no number")


def _leaves(value: Any) -> Iterator[Any]:
    """What nested lists hold; nothing of None."""
    pending = [] if value is None else [value]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        else:
            yield value


def load_any_config(name: str | os.PathLike[str]) -> PreTrainedConfig:
    """The configuration of any model that transformers knows: a folder, or a hub id.

    Raises:
        ValueError: no such model, or a broken file.
    """
    if Path(name).is_dir():
        check_folder(Path(name))
    with reading(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_processor(folder: str | os.PathLike[str]) -> FlashSlothProcessor:
    """The processor of a FlashSloth folder.

    Raises:
        ValueError: there is none, or a broken file.
    """
    check_folder(Path(folder))
    with reading(folder):
        processor = FlashSlothProcessor.from_pretrained(folder, trust_remote_code=False)
    # what is only looked at when a prompt is made
    of_types = {
        str: (processor, ("question_marker", "user_header", "assistant_header")),
        int: (processor, ("num_image_tokens", "num_query_tokens")),
        int | float: (processor.tokenizer, ("model_max_length",)),
        int | float | None: (processor.image_processor, ("max_pixels", "rescale_factor")),
    }
    for kind, (holder, names) in of_types.items():
        _check_types(folder, {name: getattr(holder, name, None) for name in names}, kind)
    return processor


def _check_types(folder: str | os.PathLike[str], values: dict[str, Any], kind: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"{folder} cannot be loaded: {name} of its processor is {value!r}")


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of any model: a folder, or a hub id.

    Raises:
        ValueError: there is none, or a broken file.
    """
    if Path(name).is_dir():
        check_folder(Path(name))
    with reading(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_weights(model_class: Any, folder: str | os.PathLike[str], **options: Any) -> tuple[PreTrainedModel, dict]:
    """`from_pretrained` of a class of transformers, from safetensors in a folder, without code of the folder.

    Args:
        model_class: a model class or an Auto class.
        folder: of a whole model.
        options: of `from_pretrained`.

    Returns:
        the model and the report of `output_loading_info`.

    Raises:
        ValueError: a broken file, or a model larger than its files.
    """
    stored = TensorFolder(Path(folder))
    _check_layers(read_config(Path(folder)), stored)
    with reading(folder), no_larger_than(stored):
        return model_class.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )


def load_plain(
    folder: str | os.PathLike[str], dtype: str = "auto", quantization_config: Any = None
) -> FlashSlothForConditionalGeneration:
    """`from_pretrained` that accepts nothing less than all tensors of the model.

    Args:
        folder: of a whole model.
        dtype: "auto" (as saved) or a name of `DTYPES`.
        quantization_config: of transformers, to quantize weights while they are read.

    Raises:
        ValueError: a broken configuration or file; a tensor that is missing, unexpected or of another shape.
    """
    config = load_config(folder)
    _check_generation(Path(folder) / "generation_config.json", config)
    model, report = load_weights(
        FlashSlothForConditionalGeneration,
        folder,
        config=config,
        dtype=DTYPES.get(dtype, "auto"),
        ignore_mismatched_sizes=True,
        **({} if quantization_config is None else {"quantization_config": quantization_config}),
    )
    problems = [f"missing {key}" for key in sorted(report["missing_keys"])]
    problems += [f"unexpected {key}" for key in sorted(report["unexpected_keys"])]
    problems += [
        f"{key} has shape {list(found)} instead of {list(expected)}"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    if problems:
        rest = len(problems) - MOST_NAMED_TENSORS
        more = f" and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {', '.join(problems[:MOST_NAMED_TENSORS])}{more}"
        )
    return model

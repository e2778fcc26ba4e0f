"""LoRA adapters on disk: the model that one stands on, and both merged into a plain model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from . import hub
from .folder import check_destination, read_json, size_of, write_folder
from .pretrained import load_plain

BASE_FILE = "base_model.json"
"""Name of the base model as the recipe gives it; the folder in adapter_config.json is one of the training machine."""
CARD_FILE = "README.md"
# Largest file of a merged model, as `flashsloth convert` writes them.
MAX_SHARD_SIZE = "2GB"


def base_folder(adapter: Path, base: str | None = None) -> Path:
    """The folder of the whole model that an adapter, or a stack of them, stands on.

    Args:
        base: a model to take instead of the recorded one.

    Raises:
        ValueError: no base model is recorded, it cannot be found, or an adapter stands on itself.
    """
    return _stack(adapter, base)[-1]


def _stack(adapter: Path, base: str | None) -> list[Path]:
    """The adapter, what it stands on, and so on down to a whole model."""
    folders = [adapter, _folder_below(adapter, base)]
    while hub.is_adapter(folders[-1]):
        below = _folder_below(folders[-1], None)
        if any(below.samefile(folder) for folder in folders):
            raise ValueError(f"the adapter {folders[-1]} stands on itself ({below}); give a whole model as --base")
        folders.append(below)
    return folders


def _folder_below(adapter: Path, base: str | None) -> Path:
    if not hub.is_adapter(adapter):
        raise ValueError(f"{adapter} is no adapter: it has no {hub.ADAPTER_CONFIG}; a whole model needs no merging")
    if base is not None:
        return hub.resolve(base)
    recorded = read_json(adapter / hub.ADAPTER_CONFIG).get("base_model_name_or_path")
    if recorded and Path(recorded).is_dir():
        return hub.resolve(recorded)
    named = read_json(adapter / BASE_FILE).get("name") if (adapter / BASE_FILE).is_file() else recorded
    if not named:
        raise ValueError(f"{adapter / hub.ADAPTER_CONFIG} names no base model; give it as --base")
    try:
        return hub.resolve(named)
    except ValueError as error:
        raise ValueError(f"the base model of the adapter {adapter} is missing: {error}; give it as --base") from error


def load_merged(adapter: Path, base: str | None = None, dtype: str = "auto") -> FlashSlothForConditionalGeneration:
    """The plain model that an adapter makes of its base model.

    The base is read unquantized, also when the adapter was trained on 4-bit weights.

    Args:
        adapter: PEFT folder.
        base: base model, instead of the one the adapter names.
        dtype: number format, as in `inference.load`; "auto" is that of the base.

    Raises:
        ValueError: a weight of the adapter that the model has not, or the reverse; a broken folder.
        ImportError: peft is missing.
    """
    peft = import_peft()
    *adapters, whole = _stack(adapter, base)
    model = load_plain(whole, dtype)
    for folder in reversed(adapters):
        model = _merged(model, folder, peft)
    return model.eval()


def _merged(model: FlashSlothForConditionalGeneration, adapter: Path, peft: Any) -> FlashSlothForConditionalGeneration:
    model_dtype = model.dtype
    try:
        with safe_open(adapter / peft.utils.SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            found = set(file.keys())
        wrapped = peft.PeftModel(model, peft.PeftConfig.from_pretrained(str(adapter)))
        expected = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        problems = [f"missing {name}" for name in sorted(expected - found)]
        problems += [f"unexpected {name}" for name in sorted(found - expected)]
        if problems:
            raise ValueError(f"{len(problems)} weights differ, first {problems[0]}")
        wrapped.load_adapter(str(adapter), "default")
    except (RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter {adapter} does not fit its base model: {error}") from error
    merged = wrapped.merge_and_unload(safe_merge=True)
    return merged.to(model_dtype)


def merge(adapter: Path, destination: Path, base: str | None = None, overwrite: bool = False) -> Path:
    """Write the plain model that an adapter makes of its base model, whole or not at all.

    Args:
        adapter: PEFT folder.
        destination: folder to write; the same adapter always gives the same files.
        base: base model, instead of the one the adapter names.
        overwrite: replace `destination` where it exists.

    Raises:
        ValueError: the destination is taken, or the adapter does not fit.
        OSError: the disk is full.
    """
    check_destination(adapter, destination, overwrite)
    source = base_folder(adapter, base)
    check_destination(source, destination, overwrite)
    model = load_merged(adapter, base)
    processor = FlashSlothProcessor.from_pretrained(adapter)

    def write(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        processor.save_pretrained(folder)
        card = adapter / CARD_FILE
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            (folder / CARD_FILE).write_text(_card_of_merged(text), encoding="utf-8")

    return write_folder(destination, overwrite, write, size_of(source) + size_of(adapter))


def _card_of_merged(text: str) -> str:
    """The adapter's card, as that of a whole model."""
    text = re.sub(r"^library_name: peft$", "library_name: transformers", text, flags=re.MULTILINE)
    return text.rstrip() + "\n\nThe adapter is merged into the base model; this folder is a whole model.\n"


def import_peft() -> Any:
    """The library, or a sentence that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft; pip install 'flashsloth[train]'") from error
    return peft

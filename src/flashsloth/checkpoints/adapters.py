"""LoRA adapters on disk: the model that one stands on, and both merged into a plain model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from . import hub
from .files import read_json
from .folder import check_destination, open_safetensors, size_of, write_folder
from .pretrained import load_plain, load_processor, reading
from .untrusted import check_folder

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
    return stack(adapter, base)[-1]


def stack(adapter: Path, base: str | None = None) -> list[Path]:
    """The adapter, what it stands on, and so on down to a whole model; errors as `base_folder`."""
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
    check_folder(adapter)
    if base is not None:
        return hub.resolve(base)
    recorded = read_json(adapter / hub.ADAPTER_CONFIG).get("base_model_name_or_path")
    if isinstance(recorded, str) and recorded and Path(recorded).is_dir():
        return hub.resolve(recorded)
    named = read_json(adapter / BASE_FILE).get("name") if (adapter / BASE_FILE).exists() else recorded
    if not named or not isinstance(named, str):
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
    *adapters, whole = stack(adapter, base)
    model = load_plain(whole, dtype)
    for folder in reversed(adapters):
        model = _merged(model, folder, peft)
    return model.eval()


def _merged(model: FlashSlothForConditionalGeneration, adapter: Path, peft: Any) -> FlashSlothForConditionalGeneration:
    model_dtype = model.dtype
    with open_safetensors(adapter / peft.utils.SAFETENSORS_WEIGHTS_NAME) as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not iterable itself
    with _fitting(adapter):
        config = peft.PeftConfig.from_pretrained(str(adapter))
        _check_adapter_config(config, max((size for shape in found.values() for size in shape), default=0))
        wrapped = peft.PeftModel(model, config)
        expected = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        problems = [f"missing {name}" for name in sorted(expected - found.keys())]
        problems += [f"unexpected {name}" for name in sorted(found.keys() - expected)]
        if problems:
            raise ValueError(f"{len(problems)} weights differ, first {problems[0]}")
        wrapped.load_adapter(str(adapter), "default")
        merged = wrapped.merge_and_unload(safe_merge=True)
    return merged.to(model_dtype)


@contextmanager
def _fitting(adapter: Path) -> Iterator[None]:
    try:
        with reading(adapter):
            yield
    except ValueError as error:
        raise ValueError(f"the adapter {adapter} does not fit its base model: {error}") from error


def _check_adapter_config(config: Any, largest_size: int) -> None:
    """Refuse what peft would import, open or make room for because the file says so.

    Args:
        config: of peft.
        largest_size: of any dimension of the adapter's tensors, which no rank exceeds.
    """
    if config.is_prompt_learning or not hasattr(config, "target_modules"):
        raise ValueError(f"{config.peft_type.value} adapters cannot be merged into the weights of a model")
    if getattr(config, "megatron_config", None):
        raise ValueError("megatron_config names a module to import; only null is read")
    for part in ("corda_config", "lora_ga_config"):
        settings = getattr(config, part, None)
        settings = settings if isinstance(settings, dict) else vars(settings) if settings is not None else {}
        named = [key for key, value in settings.items() if key.endswith("_file") and value]
        if named:
            raise ValueError(f"{part}.{named[0]} names a file elsewhere; only null is read")
    ranks = {key: getattr(config, key, None) for key in ("r", "init_r", "target_r")}
    for key, rank in {**ranks, **(getattr(config, "rank_pattern", None) or {})}.items():
        if rank is not None and not (isinstance(rank, int) and rank <= largest_size):
            raise ValueError(f"{key} is {rank!r}, but the adapter's tensors have no dimension above {largest_size}")


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
    processor = load_processor(adapter)

    def write(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        processor.save_pretrained(folder)
        card = adapter / CARD_FILE
        if card.is_file():
            text = card.read_text(encoding="utf-8", errors="replace")
            (folder / CARD_FILE).write_text(_card_of_merged(text), encoding="utf-8")

    return write_folder(destination, overwrite, write, size_of(source) + size_of(adapter))


def _card_of_merged(text: str) -> str:
    """The adapter's card, as that of a whole model."""
    text = re.sub(r"^library_name: peft$", "library_name: transformers", text, flags=re.MULTILINE)
    return text.rstrip() + "\n\nThe adapter is merged into the base model; this folder is a whole model.\n"


def import_peft() -> Any:
    """The library, or a sentence that says how to get it."""
    # peft imports bitsandbytes where it is installed, which warns of kernels for weights in 4 bits that it lacks
    noisy = logging.getLogger("bitsandbytes")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft; pip install 'flashsloth[train]'") from error
    finally:
        noisy.setLevel(level)
    return peft

"""LoRA adapters: added for a stage, saved with the parts that were trained in full, merged into a plain model.

A saved adapter is an ordinary PEFT folder. Projector, compressor, query tokens and embedded query module lie in it
whole (PEFT's `modules_to_save`), the language model and the vision encoder as low-rank matrices.
"""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import hub
from ..loading import load_model
from ..model.checkpoint_folder import check_destination, read_json, size_of, write_folder, write_json
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from .freeze import PART_PREFIXES, PartName

if TYPE_CHECKING:
    from peft import PeftModel

    from .recipe import StageRecipe

logger = logging.getLogger(__name__)

BASE_FILE = "base_model.json"
"""Name of the base model as the recipe gives it; the folder in adapter_config.json is one of the training machine."""
CARD_FILE = "README.md"
LORA_PARTS: tuple[PartName, ...] = ("vision_encoder", "language_model")
# Largest file of a merged model, as `flashsloth convert` writes them.
MAX_SHARD_SIZE = "2GB"


def add_adapter(model: FlashSlothForConditionalGeneration, stage: "StageRecipe", base: str) -> "PeftModel":
    """Wrap a model for a stage with `lora`; exactly the adapters and the other parts in `train` learn.

    Args:
        base: name or folder of the model as it is now, which the saved adapter will refer to.

    Raises:
        ValueError: a target module that the model has not.
        ImportError: peft is missing.
    """
    peft = _import_peft()
    assert stage.lora is not None, "only called for stages with lora"
    whole = [part for part in stage.train if part not in LORA_PARTS]
    names = [name for name, _ in model.named_parameters()]
    for part in list(whole):
        if not any(name.startswith(PART_PREFIXES[part]) for name in names):
            logger.warning("part %r is listed as trainable, but this model has no parameters there", part)
            whole.remove(part)
    model.name_or_path = _reference(base)
    config = peft.LoraConfig(
        r=stage.lora.rank,
        lora_alpha=stage.lora.alpha,
        lora_dropout=stage.lora.dropout,
        target_modules=_target_pattern(model, stage),
        modules_to_save=[prefix.rstrip(".") for part in whole for prefix in PART_PREFIXES[part]] or None,
    )
    wrapped = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return wrapped


def _target_pattern(model: nn.Module, stage: "StageRecipe") -> str:
    """A regular expression that matches the full names of the linear layers to adapt, as PEFT takes it."""
    assert stage.lora is not None, "only called for stages with lora"
    parts = [part for part in LORA_PARTS if part in stage.train]
    # the head is no layer between hidden spaces, and tied to the embeddings in half of the families
    prefixes = [prefix for part in parts for prefix in PART_PREFIXES[part] if not prefix.startswith("lm_head")]
    known = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(prefixes))
    }
    wanted = known if stage.lora.target_modules == "all-linear" else set(stage.lora.target_modules)
    unknown = sorted(wanted - known)
    if unknown:
        raise ValueError(
            f"stage {stage.name!r}: lora.target_modules names {unknown[0]!r}, which is no linear layer of "
            f"{' or '.join(parts)}; these are {', '.join(sorted(known))}"
        )
    starts = "|".join(re.escape(prefix) for prefix in prefixes)
    return rf"(?:{starts}).*\.(?:{'|'.join(sorted(wanted))})"


def _reference(base: str) -> str:
    """What adapter_config.json calls the base model: a hub name where that repository loads as it is, else a folder.

    A packaged model and a converted checkpoint are folders of this machine.
    """
    folder = hub.resolve(base)
    is_on_hub = base not in hub.PACKAGED_MODELS and not Path(base).expanduser().is_dir()
    return base if is_on_hub and folder == hub.locate(base) else str(folder.resolve())


def finish_adapter_folder(folder: Path, base_name: str) -> None:
    """Complete what PEFT has saved, so that `AutoPeftModel` and `flashsloth merge` find the base model.

    Args:
        base_name: of the base model, as the recipe gives it.
    """
    config = read_json(folder / hub.ADAPTER_CONFIG)
    # PEFT imports the class of the base model from a list of libraries, in which transformers' Auto classes are
    config["auto_mapping"] = {"parent_library": "transformers", "base_model_class": "AutoModelForImageTextToText"}
    write_json(folder / hub.ADAPTER_CONFIG, config)
    write_json(folder / BASE_FILE, {"name": base_name})


def base_folder(adapter: Path, base: str | None = None) -> Path:
    """The folder of the model an adapter stands on.

    Args:
        base: a model to take instead of the recorded one.

    Raises:
        ValueError: no base model is recorded, or it cannot be found.
    """
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
    peft = _import_peft()
    model = load_model(base_folder(adapter, base), dtype)
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
    return merged.to(model_dtype).eval()


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


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft; pip install 'flashsloth[train]'") from error
    return peft

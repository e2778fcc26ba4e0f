"""LoRA adapters: added for a stage, saved with the parts that were trained in full.

A saved adapter is an ordinary PEFT folder. Projector, compressor, query tokens and embedded query module lie in it
whole (PEFT's `modules_to_save`), the language model and the vision encoder as low-rank matrices.
"""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checkpoints import hub
from ..checkpoints.adapters import BASE_FILE, import_peft
from ..checkpoints.files import read_json, write_json
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from .freeze import PART_PREFIXES, PartName

if TYPE_CHECKING:
    from peft import PeftModel

    from .recipe import StageRecipe

logger = logging.getLogger(__name__)

LORA_PARTS: tuple[PartName, ...] = ("vision_encoder", "language_model")


def add_adapter(model: FlashSlothForConditionalGeneration, stage: "StageRecipe", base: str) -> "PeftModel":
    """Wrap a model for a stage with `lora`; exactly the adapters and the other parts in `train` learn.

    Args:
        base: name or folder of the model as it is now, which the saved adapter will refer to.

    Raises:
        ValueError: a target module that the model has not.
        ImportError: peft is missing.
    """
    peft = import_peft()
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

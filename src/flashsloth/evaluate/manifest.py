"""How lmms-eval finds the model: the entry point `flashsloth` of its group `lmms_eval.models` names this function."""

from __future__ import annotations

from typing import Any

MODEL_NAME = "flashsloth"


def manifest() -> Any:
    """What `lmms-eval --model flashsloth` loads, a `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_NAME, chat_class_path=f"{__package__}.adapter.FlashSlothAdapter")

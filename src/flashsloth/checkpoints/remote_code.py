"""Folders that load where this package is not installed, through `trust_remote_code=True`."""

from pathlib import Path

from ..model.configuration_flashsloth import FlashSlothConfig
from ..model.image_processing_flashsloth import FlashSlothImageProcessor
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration, FlashSlothModel
from ..model.processing_flashsloth import FlashSlothProcessor


def save_with_code(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, folder: str | Path
) -> None:
    """Save weights, processor and the Python files of `flashsloth.model` to one folder.

    Args:
        folder: destination; may be pushed to the hub as it is.
    """
    FlashSlothConfig.register_for_auto_class()
    FlashSlothModel.register_for_auto_class("AutoModel")
    FlashSlothForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    FlashSlothProcessor.register_for_auto_class()
    FlashSlothImageProcessor.register_for_auto_class()
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:  # registration is global; an ordinary save afterwards must stay ordinary
        for cls in (
            FlashSlothConfig,
            FlashSlothModel,
            FlashSlothForConditionalGeneration,
            FlashSlothProcessor,
            FlashSlothImageProcessor,
        ):
            cls._auto_class = None

"""FlashSloth: a tiny multimodal language model with few visual tokens, on the Hugging Face ecosystem.

Importing the package registers its classes with the Auto classes of transformers.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

# From its module: transformers 5.16 offers the name at its top level only where torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .model.configuration_flashsloth import FlashSlothConfig
from .model.image_processing_flashsloth import FlashSlothImageProcessor
from .model.modeling_flashsloth import FlashSlothForConditionalGeneration, FlashSlothModel
from .model.processing_flashsloth import FlashSlothProcessor

__version__ = "0.1.0"

AutoConfig.register(FlashSlothConfig.model_type, FlashSlothConfig)
AutoModel.register(FlashSlothConfig, FlashSlothModel)
AutoModelForImageTextToText.register(FlashSlothConfig, FlashSlothForConditionalGeneration)
AutoModelForMultimodalLM.register(FlashSlothConfig, FlashSlothForConditionalGeneration)
AutoProcessor.register(FlashSlothConfig, FlashSlothProcessor)
AutoImageProcessor.register(FlashSlothConfig, image_processor_classes={"pil": FlashSlothImageProcessor})

__all__ = [
    "FlashSlothConfig",
    "FlashSlothForConditionalGeneration",
    "FlashSlothImageProcessor",
    "FlashSlothModel",
    "FlashSlothProcessor",
]

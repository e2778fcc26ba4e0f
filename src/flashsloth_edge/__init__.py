"""FlashSloth without torch: exported models in onnxruntime, with numpy, pillow and tokenizers.

import flashsloth_edge

model = flashsloth_edge.load("nano-onnx")
print(model.ask("photo.jpg", "What is in the picture?").text)
"""

from .session import Conversation, EdgeModel, load
from .shared.answer import Answer, Timings
from .streaming import AnswerStream

__version__ = "0.1.0"

__all__ = ["Answer", "AnswerStream", "Conversation", "EdgeModel", "Timings", "load"]

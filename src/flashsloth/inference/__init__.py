"""Load a model by name and ask it about images, with the time of every stage.

model = flashsloth.inference.load("nano")
answer = model.ask("photo.jpg", "What is in the picture?")
"""

from ..checkpoints.loading import DTYPES, load_model, select_device
from .answer import Answer, Timings
from .conversation import DEFAULT_MAX_NEW_TOKENS, AnswerStream, Conversation
from .explanation import Explanation
from .session import DEFAULT_MODEL, FlashSloth, load
from .structured import AnswerForm, compile_form

__all__ = [
    "DEFAULT_MAX_NEW_TOKENS",
    "DEFAULT_MODEL",
    "DTYPES",
    "Answer",
    "AnswerForm",
    "AnswerStream",
    "Conversation",
    "Explanation",
    "FlashSloth",
    "Timings",
    "compile_form",
    "load",
    "load_model",
    "select_device",
]

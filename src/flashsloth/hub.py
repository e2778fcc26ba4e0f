"""Names of models, for users; see `checkpoints.hub`."""

from .checkpoints.hub import ASSETS, PACKAGED_MODELS, locate, resolve

__all__ = ["ASSETS", "PACKAGED_MODELS", "locate", "resolve"]

"""Folders that carry their code, for users; see `checkpoints.remote_code`."""

from .checkpoints.remote_code import save_with_code

__all__ = ["save_with_code"]

"""Models as graphs that run without torch: `export_folder` writes and checks them, `flashsloth_edge` runs them."""

from .writing import FORMATS, WEIGHTS, export_folder

__all__ = ["FORMATS", "WEIGHTS", "export_folder"]

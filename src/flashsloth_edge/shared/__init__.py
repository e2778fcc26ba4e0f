"""Modules that the main package and this one share; they need no torch.

In the repository they stand once, beside the model and its sessions; a built distribution carries them here.
"""

from pathlib import Path

# where the shared modules stand in the repository: package of the main distribution -> modules
SOURCES = {
    "flashsloth/model": (
        "chat_text", "image_decoding", "image_download", "image_loading", "image_views", "pixel_values",
        "prompt_encoding",
    ),
    "flashsloth/inference": ("answer",),
}  # fmt: skip

_own = Path(__file__).parent
if not (_own / "chat_text.py").is_file():  # a checkout, not a built distribution
    __path__ += [str(_own.parent.parent / package) for package in SOURCES]

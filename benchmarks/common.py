"""What the benchmarks share: shapes of models, and the machine they run on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

import flashsloth

SIGLIP_BASE = {
    "model_type": "siglip_vision_model",
    "image_size": 384,
    "patch_size": 16,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def machine() -> dict[str, Any]:
    """Processor, cores and threads in use, GPU if there is one, and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "processor": ", ".join(sorted(models)) or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "flashsloth": flashsloth.__version__,
    }

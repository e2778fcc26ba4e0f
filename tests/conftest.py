"""Settings shared by all tests: no hub, one thread per worker, recorded outputs by environment variable."""

from __future__ import annotations

import os
from pathlib import Path

# Before transformers and huggingface_hub are imported, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Folder with `official-tiny` and `phi2-tokenizer`."""
    folder = os.environ.get("FLASHSLOTH_PARITY_DIR")
    if not folder:
        pytest.skip("FLASHSLOTH_PARITY_DIR is not set")
    return Path(folder)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for converted checkpoints."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLASHSLOTH_CACHE", str(folder))
    return folder

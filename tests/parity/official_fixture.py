"""The recorded outputs of the authors' implementation, and the tiny checkpoint they were computed with."""

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

IMAGE_PLACEHOLDER = -200


class OfficialFixture:
    """Reads the folder `official-tiny`."""

    def __init__(self, parity_dir: Path) -> None:
        self.folder = parity_dir / "official-tiny"
        self.tokenizer = parity_dir / "phi2-tokenizer"
        recorded = json.loads((self.folder / "cases.json").read_text())
        self.cases: dict[str, dict[str, Any]] = recorded["cases"]
        self.pixels_sha256: dict[str, str] = recorded["pixels_sha256"]
        self.expected: dict[str, Tensor] = load_file(self.folder / "expected.safetensors")
        self.vocab_columns = self.expected["vocab_columns"]

    def image(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    @functools.cache  # noqa: B019 - one fixture a run
    def tensors(self) -> dict[str, Tensor]:
        """The weights, by the rule in the manifest."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
        made = {}
        for entry in manifest["tensors"]:
            state = np.random.RandomState((zlib.crc32(entry["name"].encode()) ^ manifest["seed"]) & 0xFFFFFFFF)
            values = entry["offset"] + entry["scale"] * state.standard_normal(entry["shape"])
            made[entry["name"]] = torch.from_numpy(values.astype(manifest["dtype"]))
        return made

    def write_checkpoint(self, folder: Path, *, image_hd: bool = False, num_shards: int = 1) -> Path:
        """An authors' checkpoint as it is on the hub, with its tokenizer."""
        folder.mkdir(parents=True)
        config = json.loads((self.folder / "config.json").read_text())
        config["image_hd"] = image_hd
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        for file in (self.folder / "generation_config.json", *self.tokenizer.iterdir()):
            (folder / file.name).write_bytes(file.read_bytes())
        write_shards(folder, self.tensors(), num_shards)
        return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    """One `model.safetensors`, or several with their index."""
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard, names in enumerate(np.array_split(np.array(list(tensors)), num_shards), start=1):
        file = f"model-{shard:05d}-of-{num_shards:05d}.safetensors"
        save_file({str(name): tensors[str(name)] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= {str(name): file for name in names}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def expand(values: Tensor, input_ids: Tensor, image_tokens: int, query_token_id: int, query_tokens: int) -> Tensor:
    """Repeat each element of `values` (T,) as often as its token takes positions after expansion."""
    repeats = torch.ones_like(input_ids)
    repeats[input_ids == IMAGE_PLACEHOLDER] = image_tokens
    repeats[input_ids == query_token_id] = query_tokens
    return values.repeat_interleave(repeats)

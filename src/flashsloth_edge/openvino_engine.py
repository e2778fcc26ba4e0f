"""OpenVINO on the CPU runs the graphs of a folder.

Shape suffixes: B rows, T tokens, I images, V views, C channels, H W pixels, V vocabulary of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import Graph, Manifest


class ArrayCache:
    """Arrays of keys and values of each layer in turn, (B, heads, T, width) each."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays
        self.length = arrays[0].shape[2] if arrays else 0


class OpenVinoEngine:
    """OpenVINO. It computes in float32 where the weights are, and in what is quickest here where they are not.

    Raises:
        ImportError: without openvino.
        ValueError: a file that OpenVINO refuses.
    """

    name = "openvino"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        no_images: Mapping[str, np.ndarray],
        threads: int,
    ) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ImportError("this model needs openvino; pip install openvino") from error
        self.manifest, self.no_images = manifest, no_images
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if manifest.weights == "float32":
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        core = openvino.Core()

        def open_graph(graph: Graph) -> Any:
            file = folder / graph.file
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; copy or export the whole folder again")
            try:
                return core.compile_model(str(file), "CPU", settings).create_infer_request()
            except RuntimeError as error:
                raise ValueError(f"OpenVINO {openvino.__version__} cannot load {file}: {error}") from error

        self._vision, self._decoder = open_graph(manifest.vision), open_graph(manifest.decoder)
        self._inputs = {port.name for port in manifest.decoder.inputs}
        self._past = [port.name for port in manifest.decoder.inputs if port.name.startswith("past_")]
        self._logits, *self._present = (port.name for port in manifest.decoder.outputs)

    def encode(self, pixels_IVCHW: np.ndarray) -> dict[str, np.ndarray]:
        results = self._vision.infer({"pixel_values": pixels_IVCHW})
        return {port.name: results[port.name] for port in self.manifest.vision.outputs}

    def decode(self, inputs: Mapping[str, np.ndarray], cache: ArrayCache) -> tuple[np.ndarray, ArrayCache]:
        feeds = {name: np.ascontiguousarray(value) for name, value in inputs.items() if name in self._inputs}
        results = self._decoder.infer({**feeds, **dict(zip(self._past, cache.arrays, strict=True))})
        return results[self._logits], ArrayCache([results[name] for name in self._present])

    def empty_cache(self, rows: int) -> ArrayCache:
        return ArrayCache(
            [np.zeros((rows, heads, 0, width), dtype=np.float32) for heads, width in self.manifest.sizes.cache]
        )

    def cut(self, cache: ArrayCache, length: int) -> ArrayCache:
        if length == cache.length:
            return cache
        return ArrayCache([np.ascontiguousarray(array[:, :, :length]) for array in cache.arrays])

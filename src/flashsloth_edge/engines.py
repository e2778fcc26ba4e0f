"""What runs the graphs: onnxruntime.

Shape suffixes: B rows, T tokens, I images, V views, C channels, H W pixels, P un-pooled patches, N visual tokens,
E width of the encoder, D width of the language model, K images of a row, G query groups of a row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .manifest import Manifest, Sizes

VISUAL_TOKENS = "visual_tokens_{}"
FEATURES = "image_features"
LOGITS = "logits"


class Cache(Protocol):
    """Keys and values of a row or several. `length` in tokens."""

    length: int


class Engine(Protocol):
    """Runs both graphs of a folder. `no_images` are the inputs of a decoder without images."""

    name: str
    no_images: Mapping[str, np.ndarray]

    def encode(self, pixels_IVCHW: np.ndarray) -> dict[str, np.ndarray]:
        """Un-pooled features (I, P, E) and, for each number of visual tokens, those (I, N, D)."""

    def decode(self, inputs: Mapping[str, np.ndarray], cache: Any) -> tuple[np.ndarray, Any]:
        """Logits of the last position (B, V) float32, and the cache with the tokens of this call."""

    def empty_cache(self, rows: int) -> Any:
        """A cache of no tokens."""

    def cut(self, cache: Any, length: int) -> Any:
        """The first tokens of a cache."""


def num_threads(asked: int | None) -> int:
    """Threads for an engine: those asked for, else the processors that this process may use."""
    if asked is not None:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxCache:
    """Tensors in onnxruntime's memory, keys and values of each layer in turn, (B, heads, T, width) each."""

    def __init__(self, tensors: list[Any], length: int) -> None:
        self.tensors, self.length = tensors, length


class OnnxEngine:
    """onnxruntime on the CPU.

    Raises:
        ImportError: without onnxruntime.
        ValueError: a file that onnxruntime refuses.
    """

    name = "onnx"

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("this model needs onnxruntime; pip install onnxruntime") from error
        self._ort = onnxruntime
        self.manifest = manifest
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads(threads)
        options.log_severity_level = 3  # the graphs are checked when they are written
        self._vision = self._open(folder / manifest.vision.file, options)
        self._decoder = self._open(folder / manifest.decoder.file, options)
        self._inputs = {port.name for port in manifest.decoder.inputs}
        self._past = [port.name for port in manifest.decoder.inputs if port.name.startswith("past_")]
        self._outputs = [port.name for port in manifest.decoder.outputs]
        self.no_images: Mapping[str, np.ndarray] = no_images(manifest.sizes)

    def _open(self, file: Path, options: Any) -> Any:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; copy or export the whole folder again")
        try:
            return self._ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes, one for each code
            raise ValueError(f"onnxruntime {self._ort.__version__} cannot load {file}: {error}") from error

    def encode(self, pixels_IVCHW: np.ndarray) -> dict[str, np.ndarray]:
        names = [port.name for port in self.manifest.vision.outputs]
        return dict(zip(names, self._vision.run(names, {"pixel_values": pixels_IVCHW}), strict=True))

    def decode(self, inputs: Mapping[str, np.ndarray], cache: OnnxCache) -> tuple[np.ndarray, OnnxCache]:
        feeds = {
            name: self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
            for name, value in inputs.items()
            if name in self._inputs
        }
        feeds |= zip(self._past, cache.tensors, strict=True)
        logits_BV, *present = self._decoder.run_with_ort_values(self._outputs, feeds)
        return logits_BV.numpy(), OnnxCache(present, cache.length + inputs["input_ids"].shape[1])

    def empty_cache(self, rows: int) -> OnnxCache:
        return self._cache_of([np.zeros((rows, heads, 0, width), np.float32) for heads, width in self._cache_sizes])

    def cut(self, cache: OnnxCache, length: int) -> OnnxCache:
        if length == cache.length:
            return cache
        return self._cache_of([np.ascontiguousarray(tensor.numpy()[:, :, :length]) for tensor in cache.tensors])

    @property
    def _cache_sizes(self) -> list[list[int]]:
        return self.manifest.sizes.cache

    def _cache_of(self, arrays: list[np.ndarray]) -> OnnxCache:
        length = arrays[0].shape[2] if arrays else 0
        return OnnxCache([self._ort.OrtValue.ortvalue_from_numpy(array) for array in arrays], length)


def no_images(sizes: Sizes) -> dict[str, np.ndarray]:
    """Inputs of the decoder of a call without images."""
    return {
        FEATURES: np.zeros((0, sizes.patches, sizes.feature_width), dtype=np.float32),
        "visual_tokens": np.zeros((0, 1, sizes.text_width), dtype=np.float32),
        "image_token_counts": np.zeros(0, dtype=np.int64),
    }


def select_tokens(encoded: Mapping[str, np.ndarray], counts: list[int]) -> dict[str, np.ndarray]:
    """Inputs of the decoder that describe images, each with its own number of tokens and zeros behind them."""
    features_IPE = encoded[FEATURES]
    most = max(counts)
    tokens_IND = np.zeros((len(counts), most, encoded[VISUAL_TOKENS.format(most)].shape[2]), dtype=np.float32)
    for image, count in enumerate(counts):
        tokens_IND[image, :count] = encoded[VISUAL_TOKENS.format(count)][image]
    return {
        FEATURES: features_IPE,
        "visual_tokens": tokens_IND,
        "image_token_counts": np.array(counts, dtype=np.int64),
    }


def open_engine(folder: Path, manifest: Manifest, threads: int | None = None) -> Engine:
    """The engine for a folder's format.

    Raises:
        ValueError: a format that this release does not know.
        ImportError: its library is not installed.
    """
    if manifest.format == "onnx":
        return OnnxEngine(folder, manifest, threads)
    if manifest.format == "openvino":
        from .openvino_engine import OpenVinoEngine

        return OpenVinoEngine(folder, manifest, no_images(manifest.sizes), num_threads(threads))
    raise ValueError(f"{folder} holds a model in the format {manifest.format!r}, which this release does not run")

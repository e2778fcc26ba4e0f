"""Compile what runs again and again with the same shapes: the encoder, and decoding with a cache of fixed size.

Kernels are kept by torch in TORCHINDUCTOR_CACHE_DIR, so that a second process finds them.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedConfig, StaticCache
from transformers.utils import ModelOutput

Result = TypeVar("Result")

# room of a cache in tokens is a multiple of this: neighbouring lengths then share a graph
CACHE_STEP = 256


def check_compiler(device: torch.device) -> None:
    """Raises:
    ValueError: this machine lacks what torch.compile builds kernels with, or the device is not supported.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError("compiling for a GPU needs Triton; pip install triton, or leave --compile out")
    elif device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                "compiling for a CPU needs a C++ compiler: install g++ (on Debian and Ubuntu: apt install g++), name "
                "yours in the environment variable CXX, or leave --compile out"
            ) from error
    else:
        raise ValueError(f"compiling is for cpu and cuda, not for {device.type}; leave --compile out")


def compile_part(part: nn.Module, device: torch.device, dynamic: bool | None) -> None:
    """Compile the forward pass of a module in place, at its next call.

    On a GPU the launches of a call are recorded and replayed as CUDA graphs; a cache must stay where it is in memory.

    Args:
        device: where the module runs.
        dynamic: False compiles anew for every shape, None for a second one and then for all.

    Raises:
        ValueError: as in `check_compiler`.
    """
    check_compiler(device)
    part.compile(dynamic=dynamic, mode=_mode(device))
    if device.type == "cuda":
        replay = part._compiled_call_impl
        part._compiled_call_impl = lambda *args, **kwargs: _copied(replay(*args, **kwargs))


def _mode(device: torch.device) -> str:
    """Of torch.compile: with CUDA graphs where there are any."""
    return "reduce-overhead" if device.type == "cuda" else "default"


def _copied(output: Any) -> Any:
    """The output in memory of its own: the next replay writes where this one did."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _copied(value) for name, value in output.items()})
    return tuple(map(_copied, output)) if isinstance(output, tuple) else output


def decoding_config(device: torch.device) -> CompileConfig:
    """How `generate` compiles the steps after the prompt, given a static cache."""
    # one graph for all sizes of cache; its launches on a GPU are recorded for each size
    config = CompileConfig(mode=_mode(device), dynamic=True)
    config._compile_all_devices = True  # otherwise `generate` compiles for accelerators only
    return config


class RecordingThread:
    """One thread for every call of a model whose launches are recorded.

    torch keeps CUDA graphs by thread: another one would record its own, and before torch 2.13 it fails. And a replay
    writes where the one before it wrote, so that calls must take turns.
    """

    def __init__(self) -> None:
        self._thread: int | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flashsloth-recorded", initializer=self._prepare)

    def _prepare(self) -> None:
        from torch._inductor import cudagraph_trees

        self._thread = threading.get_ident()
        # torch before 2.13 does this for the thread that imports the module only
        if not hasattr(cudagraph_trees.local, "tree_manager_containers"):
            cudagraph_trees.local.tree_manager_containers = {}
            cudagraph_trees.local.tree_manager_locks = defaultdict(threading.Lock)

    def call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """What the function returns or raises, called in that thread, without gradients."""
        function = torch.inference_mode()(function)
        if threading.get_ident() == self._thread:
            return function(*args, **kwargs)
        return self._pool.submit(function, *args, **kwargs).result()


def room_for(tokens: int) -> int:
    """Tokens a static cache is made for, so that `tokens` fit."""
    return -(-tokens // CACHE_STEP) * CACHE_STEP


def static_cache(config: PreTrainedConfig, tokens: int) -> StaticCache:
    """An empty cache of fixed size with room for at least so many tokens."""
    return StaticCache(config=config, max_cache_len=room_for(tokens))


def keep_first(cache: StaticCache, tokens: int) -> None:
    """Forget what is behind the first tokens; not for layers with a sliding window."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


def enlarge(cache: StaticCache, config: PreTrainedConfig, tokens: int) -> StaticCache:
    """A larger cache with the same content; not for layers with a sliding window."""
    larger = static_cache(config, tokens)
    length = int(cache.get_seq_length())
    for old, new in zip(cache.layers, larger.layers, strict=True):
        new.update(old.keys[:, :, :length], old.values[:, :, :length])
    return larger

"""Compile what runs again and again with the same shapes: the encoder, and decoding with a cache of fixed size.

Kernels are kept by torch in TORCHINDUCTOR_CACHE_DIR, so that a second process finds them.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedConfig, StaticCache

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


def compile_part(part: nn.Module, device: torch.device, dynamic: bool | None, cuda_graphs: bool = False) -> None:
    """Compile the forward pass of a module in place, at its next call.

    Args:
        device: where the module runs.
        dynamic: False compiles anew for every shape, None for a second one and then for all.
        cuda_graphs: on a GPU, record the launches of a call and replay them; the next call overwrites what this one
            returned, and a cache must stay where it is in memory.

    Raises:
        ValueError: as in `check_compiler`.
    """
    check_compiler(device)
    part.compile(dynamic=dynamic, mode="reduce-overhead" if cuda_graphs and device.type == "cuda" else None)


def decoding_config(device: torch.device) -> CompileConfig:
    """How `generate` compiles the steps after the prompt, given a static cache."""
    # a GPU: transformers' default, CUDA graphs recorded for every size of cache; a CPU: one graph for all sizes
    config = CompileConfig() if device.type == "cuda" else CompileConfig(mode="default", dynamic=True)
    config._compile_all_devices = True  # otherwise `generate` compiles for accelerators only
    return config


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

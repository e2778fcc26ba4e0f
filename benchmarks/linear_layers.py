"""What a decoder's packed linear layers alone reach of the machine's rates: prefill and decoding cannot pass it.

    python benchmarks/linear_layers.py --positions 1 122 --output layers.json

The layers of the whole decoder run one after the other on inputs of so many positions, nothing in between; each weight
comes from memory, as in a model. For one position the share is that of reading, probed before and after each
repetition, else that of the matrix rate. Weights are random.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import machine

from flashsloth.bench.machine import ReadingRate, measure_roofline
from flashsloth.bench.models import model_named
from flashsloth.bench.stages import build_filled
from flashsloth.checkpoints.loading import DTYPES
from flashsloth.kernels.packed_layers import PackedLinear, keep_freed_memory, prepare_for_cpu_, supported


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="flashsloth", help="one of our own of `flashsloth bench tokens --list`")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--positions", type=int, nargs="+", default=[1, 122], help="rows of the products")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("layers.json"))
    settings = parser.parse_args()
    if not supported(DTYPES[settings.dtype]):
        parser.error(f"this processor has no oneDNN kernels for {settings.dtype}, so that nothing is packed")
    return settings


def packed_layers(name: str, dtype: torch.dtype) -> tuple[list[PackedLinear], ...]:
    """Those of the decoder, and the head, which a prompt has at its last position only."""
    entry = model_named(name)
    model = build_filled(entry, dtype, "cpu")
    prepare_for_cpu_(model)
    parts = entry.dissect(model)
    modules = [module for part in parts.layers for module in part.modules()]
    return tuple([module for module in some if isinstance(module, PackedLinear)] for some in (modules, [parts.head]))


@torch.inference_mode()
def main() -> None:
    settings = parse()
    dtype = DTYPES[settings.dtype]
    roofline = measure_roofline(settings.dtype, "cpu", torch.get_num_threads())
    reading = ReadingRate(settings.dtype, "cpu")
    decoder, head = packed_layers(settings.model, dtype)
    keep_freed_memory()
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {**vars(settings), "output": str(settings.output)},
        "matrix_flops_per_second": roofline.matrix_flops_per_second,
        "results": {},
    }
    print(f"matrix rate {roofline.matrix_flops_per_second / 1e12:.2f} TFLOP/s")
    for positions in settings.positions:
        layers = [*decoder, *head] if positions == 1 else decoder
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        inputs = {layer.in_features: torch.randn(1, positions, layer.in_features).to(dtype) for layer in layers}
        shares, seconds, rates = [], [], []
        for repetition in range(settings.repetitions + 1):
            before = reading.measure()
            begun = time.perf_counter()
            for layer in layers:
                layer(inputs[layer.in_features])
            taken = time.perf_counter() - begun
            if repetition == 0:  # the first run makes the kernels
                continue
            rates.append((before + reading.measure()) / 2)
            seconds.append(taken)
            if positions == 1:
                shares.append(weights * dtype.itemsize / taken / rates[-1])
            else:
                shares.append(2 * weights * positions / taken / roofline.matrix_flops_per_second)
        report["results"][positions] = {
            "weights": weights,
            "seconds": seconds,
            "bytes_per_second_beside": rates,
            "share": shares,
        }
        print(
            f"{positions:5} positions: {statistics.median(seconds) * 1e3:7.1f} ms, {statistics.median(shares):.0%} "
            f"({min(shares):.0%} to {max(shares):.0%}) of the {'reading' if positions == 1 else 'matrix'} rate; "
            f"reading {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GB/s",
            flush=True,
        )
    settings.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

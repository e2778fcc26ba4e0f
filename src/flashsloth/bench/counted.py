"""The static tier for the settings of a measurement: operations, bytes read and bytes held, by arithmetic."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .anatomy import Anatomy
from .arithmetic import decode_flops, prefill_flops
from .memory import DTYPES, cache_bytes, count_parameters, widest_block_elements
from .models import MODELS, BenchModel
from .results import Roofline, Settings
from .stock import STOCK
from .tokens import Memory


@dataclass(frozen=True)
class Counted:
    """What a setting costs by arithmetic. Of the whole batch throughout.

    Attributes:
        flops: by stage: encode, compress, prefill.
        weight_bytes: that each of these stages reads.
        decode_flops, decode_bytes: of the token in the middle of the answer; bytes of weights and cache.
        output_tokens: of the answer, the first included.
        memory: cache at the end of the answer.
    """

    flops: dict[str, int]
    weight_bytes: dict[str, int]
    decode_flops: int
    decode_bytes: int
    output_tokens: int
    memory: Memory

    @property
    def first_token_flops(self) -> int:
        return sum(self.flops.values())

    def first_token(self, roofline: Roofline | None) -> float:
        """Seconds at the roofline: each stage takes the time of its operations or of its weights, the longer one.

        Without a roofline operations, which stand in the same ratios where no stage waits for its weights.
        """
        if roofline is None:
            return float(self.first_token_flops)
        return sum(_seconds(self.flops[stage], self.weight_bytes[stage], roofline) for stage in self.flops)

    def per_token(self, roofline: Roofline | None) -> float | None:
        """Seconds of a token after the first at the roofline, None without one."""
        return None if roofline is None else _seconds(self.decode_flops, self.decode_bytes, roofline)

    def total(self, roofline: Roofline | None) -> float | None:
        """Seconds of the whole answer at the roofline, None without one."""
        step = self.per_token(roofline)
        return None if step is None else self.first_token(roofline) + (self.output_tokens - 1) * step


def _seconds(flops: int, read: int, roofline: Roofline) -> float:
    return max(flops / roofline.matrix_flops_per_second, read / roofline.bandwidth_bytes_per_second)


def _entry(model: str, assembly: str) -> BenchModel | None:
    entry = (STOCK if assembly == "stock" else MODELS).get(model)
    return entry if entry is not None and entry.available else None


@functools.lru_cache(maxsize=64)
def _parts(entry: BenchModel) -> tuple[Anatomy, dict[str, int], int, int]:
    """Anatomy, weights by stage, all weights, and elements alive per position of the language model."""
    model = entry.on_meta()
    parts = entry.dissect(model)
    weights = {
        # a connector may lie inside the encoder
        "encode": count_parameters([parts.vision], {p for module in parts.connector for p in module.parameters()}),
        "compress": count_parameters([*parts.connector, *parts.embedded_query], set()),
        "prefill": count_parameters([*parts.layers, parts.head], set()),
    }
    return (
        parts, weights, count_parameters([model], set()),
        widest_block_elements(parts.layers[0], parts.text_config.hidden_size),
    )  # fmt: skip


def count(settings: Settings) -> Counted | None:
    """Counts a setting on the meta device; None for a model that is not known or cannot be built here.

    Quantised weights are counted as those they stand for.
    """
    entry = _entry(settings.model, settings.assembly)
    if entry is None or settings.dtype not in DTYPES:
        return None
    element = DTYPES[settings.dtype]
    parts, weights, total_weights, block = _parts(entry)
    image, config = entry.rule(settings.width, settings.height), parts.text_config
    batch, images = settings.batch, settings.batch * settings.images
    prompt = settings.images * image.tokens + parts.query_tokens + settings.text_tokens
    middle = prompt + max(1, settings.output_tokens // 2)
    alive = max(
        images * parts.vision_elements(image),
        batch * prompt * block + images * parts.kept_elements(image),
    )
    return Counted(
        flops={
            "encode": images * parts.vision_flops(image),
            "compress": images * parts.connector_flops(image, prompt),
            "prefill": batch * prefill_flops(parts.layers, config, parts.head, prompt),
        },
        weight_bytes={stage: elements * element for stage, elements in weights.items()},
        decode_flops=batch * decode_flops(parts.layers, config, parts.head, middle),
        decode_bytes=weights["prefill"] * element + batch * cache_bytes(config, middle, element),
        output_tokens=settings.output_tokens,
        memory=Memory(
            weights=total_weights * element,
            cache=batch * cache_bytes(config, prompt + settings.output_tokens - 1, element),
            activations=alive * element,
        ),
    )

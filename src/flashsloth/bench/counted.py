"""What a setting costs by arithmetic: operations, bytes read and bytes held, on any machine."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from flashsloth.checkpoints.loading import DTYPES

from .anatomy import Anatomy
from .arithmetic import decode_flops, prefill_flops
from .memory import cache_bytes, count_parameters, widest_block_elements
from .models import BenchModel
from .results import Roofline, Settings
from .stock import find_entry
from .token_rules import VisualInput

PARTS = ("vision", "connector", "embedded_query", "language_model", "head")


@dataclass(frozen=True)
class Memory:
    """Bytes of a batch.

    Attributes:
        weights: of all parts.
        cache: keys, values and recurrent states at the end of the answer.
        activations: estimate of what else is alive at the widest point, the encoder's or the language model's.
    """

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


@dataclass(frozen=True)
class Dissected:
    """A model taken apart on the meta device.

    Attributes:
        parameters: elements by part, see `PARTS`; a part that is tied to an earlier one counts nothing.
        weights: elements that each stage up to the first token reads; one more token reads those of `prefill`.
        block: elements alive per position in a layer of the language model.
    """

    anatomy: Anatomy
    parameters: dict[str, int]
    weights: dict[str, int]
    block: int


@functools.lru_cache(maxsize=64)
def dissect(entry: BenchModel) -> Dissected:
    """A model's parts and what they weigh. No memory is taken for weights."""
    parts = entry.dissect(entry.on_meta())
    seen: set = set()
    # a connector may lie inside the encoder: it is counted first
    modules = {
        "connector": parts.connector, "embedded_query": parts.embedded_query, "vision": [parts.vision],
        "language_model": [parts.language_model], "head": [parts.head],
    }  # fmt: skip
    parameters = {part: count_parameters(found, seen) for part, found in modules.items()}
    weights = {
        "encode": parameters["vision"],
        "compress": parameters["connector"] + parameters["embedded_query"],
        "prefill": count_parameters([*parts.layers, parts.head], set()),
    }
    block = widest_block_elements(parts.layers[0], parts.text_config.hidden_size)
    return Dissected(parts, {part: parameters[part] for part in PARTS}, weights, block)


@dataclass(frozen=True)
class Counted:
    """What a setting costs by arithmetic. Of the whole batch throughout.

    Attributes:
        image: what one image becomes.
        prompt_tokens: visual tokens, text tokens, and the model's own query tokens of a prompt.
        flops: by stage: encode, compress, prefill.
        weight_bytes: that each of these stages reads.
        decode_flops, decode_bytes: of the token in the middle of the answer; bytes of weights and cache.
        output_tokens: of the answer, the first included.
    """

    image: VisualInput
    prompt_tokens: int
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
        return sum(roofline.seconds(self.flops[stage], self.weight_bytes[stage]) for stage in self.flops)

    def per_token(self, roofline: Roofline | None) -> float | None:
        """Seconds of a token after the first at the roofline, None without one."""
        return None if roofline is None else roofline.seconds(self.decode_flops, self.decode_bytes)

    def total(self, roofline: Roofline | None) -> float | None:
        """Seconds of the whole answer at the roofline, None without one."""
        step = self.per_token(roofline)
        return None if step is None else self.first_token(roofline) + (self.output_tokens - 1) * step


def count(settings: Settings) -> Counted | None:
    """Operations and bytes of a setting, None for a model or dtype that is not known here."""
    entry = find_entry(settings.model, settings.assembly)
    if entry is None or not entry.available or settings.dtype not in DTYPES:
        return None
    element, dissected = DTYPES[settings.dtype].itemsize, dissect(entry)
    parts, image = dissected.anatomy, entry.rule(settings.width, settings.height)
    config, batch, images = parts.text_config, settings.batch, settings.batch * settings.images
    prompt = settings.images * image.tokens + parts.query_tokens + settings.text_tokens
    middle = prompt + max(1, settings.output_tokens // 2)
    alive = max(
        images * parts.vision_elements(image),
        batch * prompt * dissected.block + images * parts.kept_elements(image),
    )
    return Counted(
        image=image,
        prompt_tokens=prompt,
        flops={
            "encode": images * parts.vision_flops(image),
            "compress": images * parts.connector_flops(image, prompt),
            "prefill": batch * prefill_flops(parts.layers, config, parts.head, prompt),
        },
        weight_bytes={stage: elements * element for stage, elements in dissected.weights.items()},
        decode_flops=batch * decode_flops(parts.layers, config, parts.head, middle),
        decode_bytes=dissected.weights["prefill"] * element + batch * cache_bytes(config, middle, element),
        output_tokens=settings.output_tokens,
        memory=Memory(
            weights=sum(dissected.parameters.values()) * element,
            cache=batch * cache_bytes(config, prompt + settings.output_tokens - 1, element),
            activations=alive * element,
        ),
    )

"""Running prompts: images encoded once, what is known of a conversation not run again, the others side by side.

Shape suffixes: B rows, T tokens, I images, P un-pooled patches, E width of the encoder, V vocabulary.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..inference.session import FlashSloth
from ..model.backbones import CACHE_ARGUMENT
from ..model.compressors import ImageFeatures, select_images
from ..model.embedded_query import EmbeddedQueryInputs
from .batch import RowStates, prompt_cache
from .caches import FeatureCache, PrefixCache
from .prompts import RECORD, Prompt

# images that are encoded in one call
IMAGES_AT_ONCE = 16
# A call of its own has to spare so many tokens: reading all weights once more, or starting all kernels, costs as much.
TOKENS_OF_A_CALL = 64


@dataclass
class PrefilledPrompts:
    """Prompts that were run together.

    Attributes:
        prompts: which.
        cache: their keys and values, padded on the left.
        logits_BV: of the first token of each answer.
        cached_tokens: of each prompt, tokens that were known before.
        seconds: by stage, of all together.
    """

    prompts: list[Prompt]
    cache: Cache
    logits_BV: Tensor
    cached_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Prefill:
    """Runs prompts, with the caches of images and of turns.

    Attributes:
        embedded_query_prompts: prompts for which the embedded query module has run.

    Args:
        session: the model.
        feature_bytes: of the cache of encoded images.
        prefix_bytes: of the cache of turns.
    """

    def __init__(self, session: FlashSloth, feature_bytes: int, prefix_bytes: int) -> None:
        self.session = session
        self.features = FeatureCache(feature_bytes)
        self.prefixes = PrefixCache(prefix_bytes, RECORD.itemsize)
        self.embedded_query_prompts = 0
        self.reused_tokens = 0
        self._counting: Any = None
        self._thread: int | None = None

    def start_counting(self) -> None:
        """Count the prompts that this thread brings through the embedded query module."""
        self._thread, module = threading.get_ident(), self.session.model.model.embedded_query
        if module is not None:
            self._counting = module.register_forward_pre_hook(self._count)

    def stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.remove()

    def _count(self, module: nn.Module, args: tuple[Tensor, EmbeddedQueryInputs]) -> None:
        if threading.get_ident() == self._thread:
            self.embedded_query_prompts += int(args[1].image_mask_BGK.flatten(1).any(dim=1).sum())

    def groups(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Which prompts to run together: those whose longer half is known, if that is long enough to pay for a call of
        its own, run alone, the others side by side."""
        if len(prompts) == 1:
            return [[0]]
        alone = [
            index
            for index, prompt in enumerate(prompts)
            if self._known(prompt)[0] >= max(TOKENS_OF_A_CALL, prompt.tokens / 2)
        ]
        together = [index for index in range(len(prompts)) if index not in alone]
        return [[index] for index in alone] + ([together] if together else [])

    def _known(self, prompt: Prompt) -> tuple[int, RowStates]:
        shared, states = self.prefixes.find(prompt.key)
        return prompt.cut(shared), states

    def run(self, prompts: list[Prompt]) -> PrefilledPrompts:
        """Run prompts in one call of the model; a single one goes on from what is known of it."""
        session = self.session
        known, states = self._known(prompts[0]) if len(prompts) == 1 else (0, [])
        seconds = {"encode": 0.0, "compress": 0.0}
        features = self._image_features(prompts, seconds)
        started = time.perf_counter()
        cache = prompt_cache(states, known)
        inputs = self._inputs(prompts, known)
        output = session.model(
            **inputs, image_features=features, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}
        )
        session.synchronize()
        seconds["prefill"] = time.perf_counter() - started
        self.reused_tokens += known
        return PrefilledPrompts(prompts, cache, output.logits[:, -1], known, seconds)

    def _inputs(self, prompts: list[Prompt], known: int) -> dict[str, Tensor]:
        rows = [prompt.inputs for prompt in prompts]
        inputs = dict(self.session.processor.pad(rows, padding_side="left").to(self.session.device))
        if len(prompts) == 1:  # no padding, so no mask
            mask_1T = inputs.pop("attention_mask")
            inputs["position_ids"] = torch.arange(known, mask_1T.shape[1], device=mask_1T.device).unsqueeze(0)
            inputs["input_ids"] = inputs["input_ids"][:, known:]
        return inputs

    def _image_features(self, prompts: list[Prompt], seconds: dict[str, float]) -> ImageFeatures | None:
        """Features of the images of all rows in reading order; every different image is encoded once."""
        hashes = [image for prompt in prompts for image in prompt.images]
        if not hashes:
            return None
        session, started = self.session, time.perf_counter()
        distinct = list(dict.fromkeys(hashes))
        order = torch.tensor([distinct.index(image) for image in hashes], device=session.device)
        features_IPE = torch.stack(self._encoded(distinct, prompts))
        session.synchronize()
        encoded = time.perf_counter()
        base = session.model.model
        if all(prompt.counts is None for prompt in prompts):
            features = select_images(base.compress_images(features_IPE), order)
        else:
            default = session.config.num_image_tokens
            counts = [count for prompt in prompts for count in prompt.counts or [default] * len(prompt.images)]
            features = base.compress_images(features_IPE[order], torch.tensor(counts))
        session.synchronize()
        seconds["encode"], seconds["compress"] = encoded - started, time.perf_counter() - encoded
        return features

    def _encoded(self, distinct: list[bytes], prompts: list[Prompt]) -> list[Tensor]:
        """Features (P, E) of each image."""
        features = {image: self.features.get(image) for image in distinct}
        pixels = {image: pixels for prompt in prompts for image, pixels in prompt.pixels.items()}
        missing = [image for image in distinct if features[image] is None]
        for first in range(0, len(missing), IMAGES_AT_ONCE):
            images = missing[first : first + IMAGES_AT_ONCE]
            pixels_IVCHW = torch.stack([pixels[image] for image in images])
            features_IPE = self.session.encode_views(pixels_IVCHW.to(self.session.model.dtype))
            for image, features_PE in zip(images, features_IPE, strict=True):
                features[image] = features_PE.clone()  # not a view that keeps its neighbours
                self.features.put(image, features[image])
        return [features[image] for image in distinct]

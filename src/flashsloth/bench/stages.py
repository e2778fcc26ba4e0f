"""Run the stages of a model with real tensors, one after the other, under a clock.

Shape suffixes: B prompts, K images of a prompt, N patches or tokens, T positions, D width of the language model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.initialization import no_init_weights

from flashsloth.checkpoints.loading import DTYPES, synchronize
from flashsloth.kernels.compilation import compile_part
from flashsloth.model.backbones import CACHE_ARGUMENT
from flashsloth.model.image_processing_flashsloth import FlashSlothImageProcessor

from . import anatomy
from .models import BenchModel
from .results import Settings
from .stock import StockFlashSloth
from .token_rules import VisualInput

_FILL = 2**22  # numbers that weights are filled with, over and over
_SCALE = 0.02


def build_filled(entry: BenchModel, dtype: torch.dtype, device: str) -> nn.Module:
    """The model with random weights in memory that is really used.

    Weights repeat a block of random numbers: drawing billions of them would take longer than the measurement.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), torch.device(device):
            model = entry.build()
    finally:
        torch.set_default_dtype(before)
    getattr(model, "tie_weights", model.modules)()
    model = model.to(dtype).eval().requires_grad_(False)
    block = (torch.randn(_FILL, generator=torch.Generator().manual_seed(0)) * _SCALE).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), _FILL):
                flat[start : start + _FILL] = block[: flat.numel() - start]
    return model


class Clock:
    """Times laps; what happens inside `inner` modules is taken out of the lap they lie in and counted apart.

    Args:
        inner: modules whose time goes to `compress`.
    """

    def __init__(self, device: str, inner: list[nn.Module]) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self._inside = 0.0
        self._begun: list[float] = []
        for module in inner:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def _enter(self, *unused: Any) -> None:
        self._begun.append(self._now())

    def _leave(self, *unused: Any) -> None:
        begun = self._begun.pop()
        if not self._begun:  # not inside another of the modules
            self._inside += self._now() - begun

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a stage."""
        self._inside, begun = 0.0, self._now()
        yield
        elapsed = self._now() - begun
        self.laps[name] = self.laps.get(name, 0.0) + elapsed - self._inside
        if self._inside:
            self.laps["compress"] = self.laps.get("compress", 0.0) + self._inside


def _pixels(case: Settings, views: int, rows: int, columns: int, patch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(views, 3, rows * patch, columns * patch, device=case.device).to(dtype)


def _qwen(model: nn.Module, case: Settings, image: VisualInput, dtype: torch.dtype) -> Callable[[], Any]:
    visual, count = model.model.visual, case.batch * case.images
    config = visual.config
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
    width = channels * config.temporal_patch_size * config.patch_size**2
    patches = torch.randn(count * image.patches, width, device=case.device).to(dtype)
    grids = torch.tensor([[1, *image.grids[0]]] * count, device=case.device)
    return lambda: visual(patches, grid_thw=grids)


def _tiles(model: nn.Module, case: Settings, image: VisualInput, dtype: torch.dtype) -> Callable[[], Any]:
    count = case.batch * case.images
    (rows, columns) = image.grids[0]
    patch = model.config.vision_config.patch_size
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    pixels = _pixels(case, count * image.views, rows, columns, patch, dtype)
    if model.config.model_type in ("smolvlm", "idefics3"):
        pixels = pixels.unsqueeze(0)
    return lambda: model.model.get_image_features(pixel_values=pixels)


def _siglip_and_projector(
    model: nn.Module, case: Settings, image: VisualInput, dtype: torch.dtype
) -> Callable[[], Any]:
    vision = model.config.vision_config
    if vision.model_type != "siglip2_vision_model":
        return _tiles(model, case, image, dtype)
    longest, count = max(image.patches_of_views), case.batch * case.images
    grids = list(image.grids) * count
    pixels = torch.randn(len(grids), longest, 3 * vision.patch_size**2, device=case.device).to(dtype)
    shapes = torch.tensor(grids, device=case.device)
    mask = (torch.arange(longest, device=case.device) < shapes.prod(1)[:, None]).long()
    return lambda: model.model.get_image_features(
        pixel_values=pixels, spatial_shapes=shapes, pixel_attention_mask=mask
    )


def _patches_in_a_row(model: nn.Module, case: Settings, image: VisualInput, dtype: torch.dtype) -> Callable[[], Any]:
    patch, grids = model.config.vision_config.patch_size, list(image.grids) * (case.batch * case.images)
    width = patch * sum(rows * columns for rows, columns in grids)
    pixels = torch.randn(1, 3, patch, width, device=case.device).to(dtype)
    sizes = torch.tensor(grids, device=case.device, dtype=torch.int32)
    return lambda: model.model.get_image_features(pixel_values=pixels, target_sizes=sizes)


def _rebuilt(model: nn.Module, case: Settings, image: VisualInput, dtype: torch.dtype) -> Callable[[], Any]:
    tower, count = model.vision_tower, case.batch * case.images
    (rows, columns) = image.grids[0]
    stride = getattr(tower, "stride", None) or tower.config.patch_size
    pixels = _pixels(case, count * image.views, rows, columns, stride, dtype)

    def run() -> Tensor:
        output = tower(pixels)
        features = output if isinstance(output, Tensor) else output.last_hidden_state
        if features.ndim == 4:  # a feature map
            features = features.flatten(2).transpose(1, 2)
        return model.connector(features[:, features.shape[1] - rows * columns :])

    return run


def _stock(model: StockFlashSloth, case: Settings, image: VisualInput, dtype: torch.dtype) -> Callable[[], Any]:
    side, patch = image.grids[0][0], model.vision_tower.config.patch_size
    extra = model.vision_tower.config.image_size - side * patch  # pixels beyond the last whole patch
    size = side * patch + extra
    pixels = torch.randn(case.batch * case.images * image.views, 3, size, size, device=case.device).to(dtype)
    return lambda: model.connector(model.encode(pixels))


# how to run the vision side of a family, from tensors that lie ready to visual tokens
_VISION: dict[anatomy.Dissect, Callable[..., Callable[[], Any]]] = {
    anatomy.qwen2_vl: _qwen,
    anatomy.qwen2_5_vl: _qwen,
    anatomy.qwen3_vl: _qwen,
    anatomy.internvl: _tiles,
    anatomy.smolvlm: _tiles,
    anatomy.siglip_and_projector: _siglip_and_projector,
    anatomy.mobilevlm_v2: _rebuilt,
    anatomy.minicpm_v_2: _rebuilt,
    anatomy.minicpm_v_4_6: _patches_in_a_row,
    anatomy.fastvlm: _rebuilt,
}


class Stages:
    """A model whose stages can be run.

    Args:
        entry: what it was built from.
        model: with its weights.
        case: what to run.

    Raises:
        ValueError: the vision side of this family cannot be run here.
    """

    def __init__(self, entry: BenchModel, model: nn.Module, case: Settings) -> None:
        self.model, self.case = model, case
        self.parts = parts = entry.dissect(model)
        self.image = entry.rule(case.width, case.height)
        self.dtype = DTYPES[case.dtype]
        self.own = entry.origin == "own"
        clocked = [*parts.connector, *parts.embedded_query]
        if case.compile:
            # a clock inside a compiled part would cut its graph: there what lies in the encoder counts as encoding,
            # and the embedded query as prefill
            compiled = {*parts.vision.modules(), *parts.embedded_query}
            clocked = [module for module in clocked if module not in compiled]
        self.clock = Clock(case.device, clocked)
        self.visual_tokens = case.images * self.image.tokens
        self.prompt_tokens = self.visual_tokens + case.text_tokens + parts.query_tokens
        shape = (case.batch, self.prompt_tokens, parts.text_config.hidden_size)
        self.embeds_BTD = (torch.randn(shape, device=case.device) * _SCALE).to(self.dtype)
        if self.own:
            self._prepare_own()
        elif isinstance(model, StockFlashSloth):
            self.vision = _stock(model, case, self.image, self.dtype)
        elif entry.dissect in _VISION:
            self.vision = _VISION[entry.dissect](model, case, self.image, self.dtype)
        else:
            raise ValueError(f"{case.model} is in the static tier only: its vision side is not run here")
        self.mask: dict[str, Tensor] = {}
        if case.compile:
            self._compile()

    @torch.inference_mode()
    def _compile(self) -> None:
        parts, device = self.parts, torch.device(self.case.device)
        room = self.prompt_tokens + self.case.output_tokens
        self.static_cache = StaticCache(config=parts.text_config, max_cache_len=room)
        # with a mask of the cache's length there is nothing about it that a graph would have to look up
        self.mask = {"attention_mask": torch.ones(self.case.batch, room, dtype=torch.long, device=device)}
        # a cache gets its memory in its first call: in a recorded one it would lie in what replays overwrite
        self._step(self.embeds_BTD, self.static_cache)
        compile_part(parts.vision, device, dynamic=False)
        compile_part(parts.language_model, device, dynamic=False)

    def _prepare_own(self) -> None:
        from PIL import Image

        config, case = self.model.config, self.case
        size = {"height": config.image_height, "width": config.image_width}
        self.processor = FlashSlothImageProcessor(size=size, view_grid=config.view_grid)
        noise = torch.randint(0, 256, (case.height, case.width, 3), dtype=torch.uint8).numpy()
        self.pictures = [Image.fromarray(noise)] * (case.batch * case.images)
        starts = torch.arange(case.images, device=case.device) * self.image.tokens
        self.image_positions_BK = starts.expand(case.batch, -1)
        question = torch.zeros(case.batch, self.prompt_tokens, dtype=torch.long, device=case.device)
        question[:, self.visual_tokens : self.visual_tokens + case.text_tokens] = 1
        last = self.prompt_tokens - self.parts.query_tokens
        queries = torch.full((case.batch, 1), last, device=case.device)
        self.more = {"question_ids": question, "query_positions": queries} if self.parts.query_tokens else {}

    def _cache(self) -> Any:
        if not self.case.compile:
            return DynamicCache(config=self.parts.text_config)
        self.static_cache.reset()  # a recorded CUDA graph reads it where it was
        return self.static_cache

    @torch.inference_mode()
    def run(self) -> dict[str, float]:
        """Seconds of every stage; `decode_per_token` is the mean of the tokens after the first."""
        clock, case = self.clock, self.case
        clock.laps = {}
        if self.own:
            with clock.lap("preprocess"):
                pixels = self.processor(self.pictures, return_tensors="pt")["pixel_values"]
            pixels = pixels.to(case.device, self.dtype)
            self._begin_step()
            with clock.lap("encode"):
                features = self.model.get_image_features(pixels)
        else:
            features = None
            self._begin_step()
            with clock.lap("encode"):
                self.vision()
        cache = self._cache()
        with clock.lap("prefill"):
            token_B1 = self._prefill(features, cache)
        for _ in range(case.output_tokens - 1):
            with clock.lap("decode_per_token"):
                token_B1 = self._decode(token_B1, cache)
        laps = dict(clock.laps)
        decoding = laps.get("decode_per_token", 0.0)
        # preprocessing is left out: it is measured for our own models only
        laps["time_to_first_token"] = laps["encode"] + laps.get("compress", 0.0) + laps["prefill"]
        laps["total"] = laps["time_to_first_token"] + decoding
        if decoding:
            laps["decode_per_token"] = decoding / (case.output_tokens - 1)
        return laps

    def _begin_step(self) -> None:
        # where the compiler cuts a model into several CUDA graphs, they belong to one step
        if self.case.compile and self.case.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()

    def _prefill(self, features: Any, cache: Any) -> Tensor:
        self._begin_step()
        if self.own:
            output = self.model(
                inputs_embeds=self.embeds_BTD,
                image_features=features,
                image_positions=self.image_positions_BK,
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_ARGUMENT: cache},
                **self.more,
                **self.mask,
            )
            return output.logits[:, -1:].argmax(-1)
        if isinstance(self.model, StockFlashSloth):  # all logits, as when nobody asks for less
            output = self.model.language_model(
                inputs_embeds=self.embeds_BTD, use_cache=True, **{CACHE_ARGUMENT: cache}, **self.mask
            )
            return output.logits[:, -1:].argmax(-1)
        return self._step(self.embeds_BTD, cache)

    def _decode(self, token_B1: Tensor, cache: Any) -> Tensor:
        self._begin_step()
        if self.own:
            output = self.model(
                input_ids=token_B1, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}, **self.mask
            )
            return output.logits.argmax(-1)
        return self._step(self.parts.language_model.get_input_embeddings()(token_B1), cache)

    def _step(self, embeds_BTD: Tensor, cache: Any) -> Tensor:
        output = self.parts.language_model(
            inputs_embeds=embeds_BTD, use_cache=True, **{CACHE_ARGUMENT: cache}, **self.mask
        )
        return self.parts.head(output.last_hidden_state[:, -1:]).argmax(-1)

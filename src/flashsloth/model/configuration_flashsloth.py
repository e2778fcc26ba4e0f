"""Configuration of FlashSloth: any vision encoder, any causal language model, compression between them."""

import difflib
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from .backbones import image_size_of, num_kept_layers, patch_grid
from .compressors import COMPRESSORS
from .conv_stem import ConvStemVisionConfig  # noqa: F401  # known to transformers once it is imported

logger = logging.get_logger(__name__)

# keys that transformers itself writes into, or reads from, any config.json beside the declared fields
_TRANSFORMERS_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_experts_implementation_internal",
    "_name_or_path", "attn_implementation", "auto_map", "bos_token_id", "custom_pipelines", "eos_token_id",
    "experts_implementation", "model_type", "name_or_path", "num_labels", "output_attentions", "pad_token_id",
    "quantization_config", "torch_dtype", "use_cache",
})  # fmt: skip

# an unknown key as like a known one as this is a misspelt one
_MISSPELT = 0.8
# Beyond these no computer follows; they are compared before anything is built.
_MOST_LAYERS = 2**12
_MOST_WEIGHTS = 2**40
_MOST_PIXELS = 2**28  # of all views of an image
_MOST_TOKENS = 2**20  # of all views of an image, before compression
_LARGEST_SIZE = 2**32
# what makes the extent of an encoder or a decoder; not all families have all of them
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "num_channels", "num_patches", "image_size", "patch_size",
)  # fmt: skip
_LONGEST_MESSAGE = 500


# backbones of the published 3.2B model: SigLIP so400m at 384 pixels, Phi-2
_DEFAULT_VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
_DEFAULT_TEXT = {
    "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 32, "num_attention_heads": 32, "partial_rotary_factor": 0.4,
}  # fmt: skip


def _resolve_sub_config(name: str, value: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(default if value is None else value)
    model_type = value.pop("model_type", default["model_type"])
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name}.model_type is {model_type!r:.80}, which transformers does not know; use the model_type of a "
            "Hugging Face model."
        )
    try:
        return CONFIG_MAPPING[model_type](**value)
    except Exception as error:  # whatever a family's own checks raise, the values are the user's
        raise ValueError(f"{name} is no configuration of {model_type!r}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _refuse_in_words(init: Callable[..., None]) -> Callable[..., None]:
    """Values of wrong type or shape end in a ValueError, whatever notices them first."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValueError as error:
            if len(str(error)) <= _LONGEST_MESSAGE:
                raise
            raise ValueError(f"{str(error)[:_LONGEST_MESSAGE]} ...") from error
        except Exception as error:
            raise ValueError(f"the FlashSloth configuration has a value of the wrong kind: {_brief(error)}") from error

    return checked


@strict
class FlashSlothConfig(PreTrainedConfig):
    """Sizes and wiring of a FlashSloth model.

    Attributes:
        vision_config: configuration of the vision encoder (any ViT known to `AutoModel`); default SigLIP so400m.
        text_config: configuration of the causal language model (any known to `AutoModelForCausalLM`); default Phi-2.
        image_token_id: token id whose embedding is replaced by a visual token.
        query_token_id: token id whose embedding is replaced by a learned query token.
        vision_feature_layer: hidden state of the encoder that is used, numbered as in `hidden_states` (0 is the patch
            embedding, -1 the last layer, -2 the layer before it). Layers beyond it are not built.
        vision_final_norm: apply the encoder's final norm to the features; only with the last layer.
        compressor: name in `compressors.COMPRESSORS`.
        compressor_window: side of the pooling window in patches (paper section 3.2: 3).
        compressor_windows: all windows that the weights were trained with, `compressor_window` among them; each gives
            another number of visual tokens, which a request may choose. None: that one window alone.
        compressor_dropout: dropout inside the score network of spatial attention pooling.
        compressor_padding: what to do with a patch grid that the window does not divide: `refuse` or `pad`.
        projector_hidden_act: activation between the two linear layers of the projector.
        num_query_tokens: learned query tokens per user turn; 0 switches them and the embedded query module off.
        embedded_query_layer: index of the decoder layer before which the embedded query module runs.
        embedded_query_hidden_size: its inner width; default half of the encoder's width.
        embedded_query_num_heads: its attention heads.
        embedded_query_uses_question: let the queries read the question before they read the image.
        view_grid: `[rows, columns]` of high-resolution tiles that are seen beside the whole image (HD: `[2, 2]`);
            None sees the whole image only.
        tie_word_embeddings: follows `text_config`.

    A key that is none of these, nor like one, is kept with a warning: other tools note things of their own.

    Raises:
        ValueError: a misspelt key, a value of the wrong type, or sizes that do not fit each other or any computer; the
            message names the fields.
    """

    model_type = "flashsloth"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # what the Trainer leaves out of its predictions
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_features"]

    # a configuration first: each type it is not costs its whole text, for an error message that nobody reads
    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    image_token_id: int | None = None
    query_token_id: int | None = None
    vision_feature_layer: int = -2
    vision_final_norm: bool = False
    compressor: str = "spatial_attention"
    compressor_window: int = 3
    compressor_windows: list[int] | tuple[int, ...] | None = None
    compressor_dropout: float = 0.1
    compressor_padding: Literal["refuse", "pad"] = "refuse"
    projector_hidden_act: str = "gelu"
    num_query_tokens: int = 9
    embedded_query_layer: int = 7
    embedded_query_hidden_size: int | None = None
    embedded_query_num_heads: int = 32
    embedded_query_uses_question: bool = True
    view_grid: list[int] | tuple[int, ...] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        known = _TRANSFORMERS_KEYS.union(self.__dataclass_fields__)
        for key in sorted(kwargs.keys() - known):
            if near := difflib.get_close_matches(key, known, n=1, cutoff=_MISSPELT):
                raise ValueError(f"unknown key {key!r:.80} in the FlashSloth configuration; did you mean {near[0]!r}?")
            logger.warning_once(f"key {key!r:.80} of the FlashSloth configuration is kept, but nothing here reads it")
        self.vision_config = _resolve_sub_config("vision_config", self.vision_config, _DEFAULT_VISION)
        self.text_config = _resolve_sub_config("text_config", self.text_config, _DEFAULT_TEXT)
        for name, part in (("vision_config", self.vision_config), ("text_config", self.text_config)):
            _check_sizes(name, part)
        if self.embedded_query_hidden_size is None:
            self.embedded_query_hidden_size = self.vision_config.hidden_size // 2
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
        self._validate_sizes()

    def _validate_sizes(self) -> None:
        if self.compressor not in COMPRESSORS:
            raise ValueError(f"compressor is {self.compressor!r:.80}; known are {', '.join(COMPRESSORS)}.")
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"projector_hidden_act is {self.projector_hidden_act!r:.80}; known are {', '.join(ACT2FN)}."
            )
        if not 0 <= self.compressor_dropout <= 1:
            raise ValueError(f"compressor_dropout is {self.compressor_dropout}; it must be from 0 to 1.")
        if self.compressor_window < 1:
            raise ValueError(f"compressor_window is {self.compressor_window}; it must be at least 1.")
        if self.view_grid is not None and (len(self.view_grid) != 2 or min(self.view_grid) < 1):
            raise ValueError(f"view_grid is {self.view_grid!r:.80}; give [rows, columns], both at least 1, or null.")
        depth = self.vision_config.num_hidden_layers
        kept = num_kept_layers(self.vision_config, self.vision_feature_layer)
        if not 0 <= kept <= depth:
            raise ValueError(
                f"vision_feature_layer {self.vision_feature_layer} is outside the {depth} layers of vision_config."
            )
        if self.vision_final_norm and kept != depth:
            raise ValueError("vision_final_norm needs the last layer: set vision_feature_layer to -1.")
        rows, columns = self.grid_height, self.grid_width
        if rows < 1 or columns < 1:
            raise ValueError("vision_config.patch_size is larger than its image_size; an image has no whole patch.")
        if self.compressor_windows is not None:
            self._validate_windows()
        for window in self.trained_windows:
            if not self._takes_window(window):
                raise ValueError(
                    f"compressor_window {window} does not divide the {rows} x {columns} patch grid of vision_config; "
                    'choose another window or image size, or set compressor_padding to "pad".'
                )
        self._validate_amounts()
        if self.num_query_tokens < 0:
            raise ValueError(f"num_query_tokens is {self.num_query_tokens}; it must be 0 (off) or more.")
        if self.num_query_tokens:
            self._validate_embedded_query()
        vocabulary = self.text_config.vocab_size
        for name in ("image_token_id", "query_token_id"):
            token_id = getattr(self, name)
            if token_id is not None and not 0 <= token_id < vocabulary:
                raise ValueError(f"{name} is {token_id}, outside the vocabulary of text_config ({vocabulary}).")
        if self.image_token_id is not None and self.image_token_id == self.query_token_id:
            raise ValueError(f"image_token_id and query_token_id are both {self.image_token_id}; they must differ.")

    def _validate_windows(self) -> None:
        windows = list(self.compressor_windows or ())
        if self.compressor_window not in windows or min(windows) < 1 or len(set(windows)) < len(windows):
            raise ValueError(
                f"compressor_windows is {windows!r:.80}; give different windows of at least 1, and compressor_window "
                f"({self.compressor_window}) among them."
            )
        if len({self.tokens_of_window(window) for window in windows}) < len(windows):
            raise ValueError(f"compressor_windows is {windows!r:.80}; two of them make the same number of tokens.")
        compressor = COMPRESSORS[self.compressor]
        if len(windows) > 1 and compressor.uses_window and not compressor.any_window:
            raise ValueError(
                f"compressor_windows is {windows!r:.80}, but the weights of {self.compressor} fit one window only."
            )

    def _takes_window(self, window: int) -> bool:
        return self.compressor_padding == "pad" or not (self.grid_height % window or self.grid_width % window)

    def _validate_amounts(self) -> None:
        window, vision, text = self.effective_window, self.vision_config, self.text_config
        largest = max(self.trained_windows)
        padded = (-(-self.grid_height // largest) * largest) * (-(-self.grid_width // largest) * largest)
        with torch.device("meta"):
            compressed = COMPRESSORS[self.compressor](vision.hidden_size, window, 0.0).out_features
        inner = (self.embedded_query_hidden_size or 0) if self.num_query_tokens else 0
        amounts = {
            "pixels of an image's views": (self.num_views * self.image_height * self.image_width, _MOST_PIXELS),
            "patches of an image's views": (self.num_views * padded, _MOST_TOKENS),
            "num_query_tokens": (self.num_query_tokens, _MOST_TOKENS),
            "weights of projector, query tokens and embedded query module": (
                text.hidden_size * (compressed + self.num_query_tokens + inner) + vision.hidden_size * inner,
                _MOST_WEIGHTS,
            ),
        }
        for name, (amount, most) in amounts.items():
            if amount > most:
                raise ValueError(f"{name}: {float(amount):.3g} are more than any computer holds (at most {most}).")

    def _validate_embedded_query(self) -> None:
        layers = self.text_config.num_hidden_layers
        if not 0 <= self.embedded_query_layer < layers:
            raise ValueError(
                f"embedded_query_layer is {self.embedded_query_layer}, but text_config has {layers} layers; give an "
                f"index from 0 to {layers - 1}, or set num_query_tokens to 0."
            )
        heads = self.embedded_query_num_heads
        widths = {
            "embedded_query_hidden_size": self.embedded_query_hidden_size,
            "vision_config.hidden_size": self.vision_config.hidden_size,
        }
        for name, width in widths.items():
            if heads < 1 or width % heads:
                raise ValueError(f"{name} ({width}) is not a multiple of embedded_query_num_heads ({heads}).")

    @property
    def image_height(self) -> int:
        """Height in pixels of one view."""
        return image_size_of(self.vision_config)[0]

    @property
    def image_width(self) -> int:
        """Width in pixels of one view."""
        return image_size_of(self.vision_config)[1]

    @property
    def grid_height(self) -> int:
        """Rows of patches in one view."""
        return patch_grid(self.vision_config)[0]

    @property
    def grid_width(self) -> int:
        """Columns of patches in one view."""
        return patch_grid(self.vision_config)[1]

    @property
    def effective_window(self) -> int:
        """Window of the compressor; 1 for a compressor that keeps every patch."""
        return self.compressor_window if COMPRESSORS[self.compressor].uses_window else 1

    @property
    def trained_windows(self) -> tuple[int, ...]:
        """Windows that the weights were trained with, the smallest first."""
        if self.compressor_windows is None or not COMPRESSORS[self.compressor].uses_window:
            return (self.effective_window,)
        return tuple(sorted(self.compressor_windows))

    @property
    def num_views(self) -> int:
        """Views of one image: the whole, and the tiles of `view_grid`."""
        return 1 if self.view_grid is None else 1 + self.view_grid[0] * self.view_grid[1]

    @property
    def num_patches_per_view(self) -> int:
        """Un-pooled encoder tokens of one view."""
        return self.grid_height * self.grid_width

    def tokens_of_window(self, window: int) -> int:
        """Visual tokens of one image, all views, with this window."""
        return self.num_views * -(-self.grid_height // window) * -(-self.grid_width // window)

    @property
    def visual_token_choices(self) -> dict[int, int]:
        """Window of each number of visual tokens that the weights were trained for, the most tokens first."""
        return {self.tokens_of_window(window): window for window in self.trained_windows}

    def window_of(self, visual_tokens: int) -> int:
        """The window that makes so many visual tokens of an image, trained or not.

        Raises:
            ValueError: no window does, or the compressor has only one.
        """
        choices = dict(self.visual_token_choices)
        if COMPRESSORS[self.compressor].any_window:
            for window in range(1, max(self.grid_height, self.grid_width) + 1):
                if self._takes_window(window):
                    choices.setdefault(self.tokens_of_window(window), window)
        if visual_tokens not in choices:
            raise ValueError(
                f"visual_tokens is {visual_tokens!r:.80}; an image of this model can be "
                f"{', '.join(map(str, sorted(choices, reverse=True)))} visual tokens."
            )
        return choices[visual_tokens]

    @property
    def num_tokens_per_view(self) -> int:
        """Visual tokens of one view after compression."""
        return self.num_image_tokens // self.num_views

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one image, all views, where a request does not choose."""
        return self.tokens_of_window(self.effective_window)


def _check_sizes(name: str, config: PreTrainedConfig) -> None:
    """Refuse an encoder or a decoder without extent, or beyond any memory."""
    largest = dict.fromkeys(_SIZES, 0)
    for field in _SIZES:
        value = getattr(config, field, None)
        sizes = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        for size in sizes:  # a list has one for each side, or for each layer
            if not isinstance(size, int) or not 1 <= size <= _LARGEST_SIZE:
                raise ValueError(
                    f"{name}.{field} is {value!r:.80}; it must be a whole number of at least 1, and of a size that a "
                    "computer holds."
                )
            largest[field] = max(largest[field], size)
    width, layers, heads = config.hidden_size, config.num_hidden_layers, largest["num_attention_heads"] or 1
    if layers > _MOST_LAYERS:
        raise ValueError(f"{name}.num_hidden_layers is {layers}, more than {_MOST_LAYERS}.")
    if not largest["head_dim"] and width % heads:
        raise ValueError(f"{name}.hidden_size ({width}) is not a multiple of num_attention_heads ({heads}).")
    inner = largest["intermediate_size"] or width * getattr(config, "mlp_ratio", 1)
    rows = largest["vocab_size"] + largest["max_position_embeddings"]
    weights = width * (rows + layers * max(inner, heads * (largest["head_dim"] or width // heads)))
    if weights > _MOST_WEIGHTS:
        raise ValueError(
            f"{name} describes about {float(weights):.3g} weights, more than any computer holds; hidden_size is "
            f"{width}, num_hidden_layers {layers}."
        )


FlashSlothConfig.__init__ = _refuse_in_words(FlashSlothConfig.__init__)  # type: ignore[method-assign]

__all__ = ["FlashSlothConfig"]

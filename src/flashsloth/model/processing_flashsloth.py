"""From conversations and images to the tensors of the model.

Shape suffixes: B rows, T tokens, I images of the batch, V views, C H W pixels, K images of a row, G query groups of a
row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.utils import PaddingStrategy, TensorType, logging
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_text import (
    DEFAULT_CHAT_TEMPLATE,
    PLAIN_CHAT_TEMPLATE,
    Kind,
    Piece,
    PromptText,
    mark_answers,
    mark_questions,
)
from .conversations import as_batch, match_images, merge_sources, normalize_conversation
from .image_processing_flashsloth import FlashSlothImageProcessor
from .prompt_encoding import (
    IGNORED_LABEL,
    POSITION_NAMES,
    TOKEN_FILLS,
    Expansion,
    Features,
    encode_pieces,
    fit_to_length,
    pad_features,
    tokenize_pieces,
)

logger = logging.get_logger(__name__)

# Tokenizers without a limit of their own say something like 1e30.
NO_LIMIT = int(1e9)
# Templates that need no saving; a template of the same name saved with the processor comes first.
BUILT_IN_TEMPLATES = {"default": DEFAULT_CHAT_TEMPLATE, "plain": PLAIN_CHAT_TEMPLATE}


class FlashSlothTextKwargs(TextKwargs, total=False):
    """Options for text beyond those of every processor."""

    return_labels: bool | None
    return_pixel_values: bool | None


class FlashSlothProcessorKwargs(ProcessingKwargs, total=False):
    """Options of `FlashSlothProcessor.__call__`."""

    text_kwargs: FlashSlothTextKwargs
    _defaults = {"text_kwargs": {"padding": True}}


class FlashSlothProcessor(ProcessorMixin):
    """Image processor and tokenizer in one, with the chat template; expands placeholders and marks questions.

    Args:
        image_processor: a `FlashSlothImageProcessor`.
        tokenizer: any fast tokenizer that has the two placeholder tokens.
        chat_template: Jinja template, or a dict of them by name; default the published checkpoints' conversation.
        num_image_tokens: visual tokens of one image, all its views together (`config.num_image_tokens`).
        num_query_tokens: query tokens of a group, 0 for a model without (`config.num_query_tokens`).
        image_token, query_token: placeholders in text.
        question_marker: zero-width mark that templates put before a question; never a token.
        user_header, assistant_header: where questions and answers begin in prompts written by hand, without marker.
    """

    valid_processor_kwargs = FlashSlothProcessorKwargs

    def __init__(
        self,
        image_processor: FlashSlothImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        num_image_tokens: int | None = None,
        num_query_tokens: int | None = None,
        image_token: str = "<image>",
        query_token: str = "<learnable>",
        question_marker: str = "<question>",
        user_header: str = "USER:",
        assistant_header: str = "ASSISTANT:",
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"FlashSlothProcessor needs a fast tokenizer (backed by tokenizers), got {type(tokenizer).__name__}"
            )
        if not num_image_tokens or num_image_tokens < 1 or num_query_tokens is None or num_query_tokens < 0:
            raise ValueError(
                "num_image_tokens (at least 1) and num_query_tokens (at least 0) must be given, as in the model's "
                f"configuration; got {num_image_tokens} and {num_query_tokens}"
            )
        self.num_image_tokens = num_image_tokens
        self.num_query_tokens = num_query_tokens
        self.image_token = image_token
        self.query_token = query_token
        self.question_marker = question_marker
        self.user_header = user_header
        self.assistant_header = assistant_header
        vocabulary = tokenizer.get_vocab()
        for name, token in (("image_token", image_token), ("query_token", query_token)):
            if token not in vocabulary and (name == "image_token" or num_query_tokens):
                raise ValueError(
                    f"{name} {token!r} is not in the tokenizer's vocabulary; add it with "
                    f"tokenizer.add_tokens([{token!r}], special_tokens=True) and give the model room for it"
                )
        self._cache: dict[str, tuple[Any, Any]] = {}
        self.image_token_id: int = vocabulary[image_token]
        self.query_token_id: int | None = vocabulary.get(query_token)

    @classmethod
    def from_config(cls, config: Any, tokenizer: Any, **kwargs: Any) -> "FlashSlothProcessor":
        """Builds the processor that fits a `FlashSlothConfig`.

        Args:
            config: sizes, views and token counts are taken from it.
            tokenizer: a tokenizer that has the two placeholder tokens, with the ids the configuration names. It is set
                to pad on the left, as generation from a batch needs.
            kwargs: arguments of this class, or of `FlashSlothImageProcessor` (such as `image_mean`).
        """
        own = cls.__init__.__code__.co_varnames[: cls.__init__.__code__.co_argcount]
        arguments = {key: kwargs.pop(key) for key in list(kwargs) if key in own}
        tokenizer.padding_side = "left"
        tokenizer.init_kwargs["padding_side"] = "left"  # what is saved
        image_processor = FlashSlothImageProcessor(
            size={"height": config.image_height, "width": config.image_width}, view_grid=config.view_grid, **kwargs
        )
        processor = cls(
            image_processor,
            tokenizer,
            num_image_tokens=config.num_image_tokens,
            num_query_tokens=config.num_query_tokens,
            **arguments,
        )
        for name in ("image_token_id", "query_token_id"):
            expected, found = getattr(config, name), getattr(processor, name)
            if expected is not None and expected != found and (name == "image_token_id" or config.num_query_tokens):
                raise ValueError(f"the tokenizer's {name} is {found}, the configuration's is {expected}")
        return processor

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors this processor can emit."""
        positions = ["image_positions", "query_positions", "question_ids"]
        return ["input_ids", "attention_mask", "pixel_values", *positions]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Unpack[FlashSlothProcessorKwargs],
    ) -> BatchFeature:
        """Encodes prompts that already hold placeholders, and their images.

        Args:
            images: one image, a flat list in reading order, or one list a row; any form `load_image` takes.
            text: a prompt or several, written by hand or by `apply_chat_template(..., tokenize=False)`.
            kwargs: options of tokenizers (padding, truncation, max_length, padding_side, pad_to_multiple_of,
                add_special_tokens, return_tensors), of the image processor, and
                `return_labels`: add labels of the answers;
                `return_pixel_values`: `False` leaves images out, for features encoded before.

        Returns:
            `input_ids`, `attention_mask` (B, T); `pixel_values` (I, V, 3, H, W) float32 and `image_positions` (B, K)
            when there are images; `query_positions` (B, G) and `question_ids` (B, T) when there are query groups;
            `labels` (B, T) when asked for.

        Raises:
            ValueError: numbers of placeholders and images that differ, an empty question, a prompt that is too long
                or whose truncation would cut what must stay whole.
        """
        if text is None and images is None:
            raise ValueError("FlashSlothProcessor needs text, images, or both")
        options = self._merge_kwargs(FlashSlothProcessorKwargs, **kwargs)
        text_options, image_options = options["text_kwargs"], options["images_kwargs"]
        if text is None:
            return self.image_processor(images, **image_options)
        prompts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("text must be a string or a list of strings")
        rows = [self.prompt_text.split(prompt) for prompt in prompts]
        for row, pieces in enumerate(rows):
            kinds = {piece.kind for piece in pieces}
            if self.num_query_tokens and Kind.IMAGE in kinds and Kind.QUERY not in kinds:
                logger.warning_once(
                    f"A prompt has an image but no {self.query_token}: its answer is made without EmbQ."
                )
            if text_options.get("return_labels"):
                with _naming_row(row, len(rows)):
                    mark_answers(pieces, self.assistant_header, self.tokenizer.eos_token)
        return self._encode_batch(rows, images, text_options, image_options)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | TensorType | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Renders conversations with the chat template, and encodes them when `tokenize`.

        Args:
            conversation: messages, or a list of conversations. Content is text or a list of parts: {"type": "text",
                "text": ...}, {"type": "image", "image" | "url" | "path" | "base64": ...}, OpenAI's "image_url".
                Whatever it says stays text: placeholders and special tokens in it are not read as such.
            chat_template: a template, the name of one of the processor's, or "plain" for captions.
            images: for image parts without a source, as in `__call__`.
            processor_kwargs: options of `__call__`; they may also be given directly.
            kwargs: variables of the template, such as `space_before_query=True`.

        Returns:
            The prompt (a list for several conversations), for `__call__` with the images; with `tokenize` the
            `input_ids`, or what `__call__` returns when `return_dict`, plus `assistant_masks` (B, T) when
            `return_assistant_tokens_mask`.

        Raises:
            ValueError: as `__call__`; and what the template refuses.
        """
        conversations, batched = as_batch(conversation)
        template = self._template(chat_template)
        options = dict(processor_kwargs or {})
        options.update({name: kwargs.pop(name) for name in list(kwargs) if name in self._call_options()})
        for name in [name for name in kwargs if name not in template and name != "sanitize_control_tokens"]:
            logger.warning_once(f"{name!r} is neither an option of the processor nor in the chat template; ignored")
        prompts, spans, sources = self._render(
            conversations,
            template,
            with_spans=tokenize and not continue_final_message,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
        if not tokenize:
            return prompts if batched else prompts[0]
        merged = self._merge_kwargs(
            FlashSlothProcessorKwargs,
            **(options | ({} if return_tensors is None else {"return_tensors": return_tensors})),
        )
        text_options, image_options = merged["text_kwargs"], merged["images_kwargs"]
        if continue_final_message and text_options.get("return_labels"):
            raise ValueError("labels need complete answers: return_labels does not go with continue_final_message")
        rows = [self.prompt_text.split(prompt, answers) for prompt, answers in zip(prompts, spans, strict=True)]
        text_options["return_assistant_tokens_mask"] = return_assistant_tokens_mask
        if text_options.get("return_pixel_values") is not False:
            images = merge_sources(sources, images)
        batch = self._encode_batch(rows, images, text_options, image_options)
        return batch if return_dict else batch["input_ids"]

    def encode_captions(self, captions: Sequence[str], images: Any, **kwargs: Any) -> BatchFeature:
        """Batch of pretraining: `<image>{caption}` and a newline, labels on caption and newline, no queries.

        Args:
            captions: one text an image.
            images: as many images.
            kwargs: as `apply_chat_template`; tensors are PyTorch's unless `return_tensors` says otherwise.
        """
        conversations = [
            [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": caption}]
            for caption in captions
        ]
        options: dict[str, Any] = {"return_tensors": "pt", "return_labels": True} | kwargs
        return self.apply_chat_template(
            conversations, chat_template="plain", images=images, tokenize=True, return_dict=True, **options
        )

    def pad(
        self,
        features: Sequence[Mapping[str, Any]],
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | TensorType | None = "pt",
    ) -> BatchFeature:
        """Makes a batch of samples that were encoded one by one (each without padding, batch axis or not)."""
        known = {*TOKEN_FILLS, *POSITION_NAMES, "pixel_values"}
        if unknown := sorted({name for row in features for name in row if name not in known}):
            raise ValueError(f"cannot pad {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        rows = [_without_batch_axis(row) for row in features]
        optional = {name for row in rows for name in row}
        for row in rows:
            if "question_ids" in optional:
                row.setdefault("question_ids", np.zeros(len(row["input_ids"]), dtype=np.int64))
            if missing := sorted((optional & TOKEN_FILLS.keys()) - row.keys()):
                raise ValueError(f"{', '.join(missing)} is in some samples and not in others")
        pixels = [np.asarray(row["pixel_values"]) for row in rows if row.get("pixel_values") is not None]
        options = {
            "padding": padding,
            "max_length": max_length,
            "pad_to_multiple_of": pad_to_multiple_of,
            "padding_side": padding_side,
            "return_tensors": return_tensors,
        }
        return self._stack(rows, np.concatenate(pixels) if pixels else None, options)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Placeholder tokens and views of images of the given (height, width): what serving engines plan with."""
        if image_sizes is None:
            return MultiModalData()
        patches = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * len(patches), num_image_patches=patches)

    @property
    def prompt_text(self) -> PromptText:
        """Escapes typed text (`prompt_text.escape`) for prompts that are written by hand."""
        return self._cached("prompt_text", self._make_prompt_text)

    def _make_prompt_text(self) -> PromptText:
        special = {
            token.content: (token.lstrip, token.rstrip)
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special
        }
        return PromptText(self.image_token, self.query_token, self.question_marker, special)

    def _find_prefix_ids(self) -> list[int]:
        """What the tokenizer puts before a text, such as a beginning-of-sequence token. (What it puts after a text
        would end the prompt before the answer.)"""
        plain = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        full = self.tokenizer(PROBE, add_special_tokens=True)["input_ids"]
        return full[: full.index(plain[0])]

    def _opens_texts(self) -> bool:
        """Whether the tokenizer puts a token of its own before a text, but not before text after a special token."""
        alone = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        after = self.tokenizer(self.image_token + PROBE, add_special_tokens=False)["input_ids"]
        return after[1:] != alone

    def _cached(self, name: str, make: Callable[[], Any]) -> Any:
        """A value derived from the tokenizer, made anew when tokens were added or its prefix switched."""
        key = (len(self.tokenizer), getattr(self.tokenizer, "add_bos_token", None))
        if self._cache.get(name, (None,))[0] != key:
            self._cache[name] = (key, make())
        return self._cache[name][1]

    def _template(self, name_or_template: str | None) -> str:
        own = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if name_or_template is None:
            name_or_template = "default"
            if name_or_template not in own:
                raise ValueError(f"none of the chat templates {sorted(own)} is the default; name one as chat_template")
        return own.get(name_or_template) or BUILT_IN_TEMPLATES.get(name_or_template) or name_or_template

    def _call_options(self) -> set[str]:
        image_options = self.image_processor.valid_kwargs.__annotations__
        return {"text_kwargs", "images_kwargs", "common_kwargs", *FlashSlothTextKwargs.__annotations__, *image_options}

    def _render(
        self, conversations: Sequence[Any], template: str, with_spans: bool, **variables: Any
    ) -> tuple[list[str], list[Sequence], list[list[Any]]]:
        """Prompts, answer spans (start, stop) in each, and the image sources of each."""
        messages, sources = [], []
        for row, conversation in enumerate(conversations):
            with _naming_row(row, len(conversations)):
                normalized, images = normalize_conversation(conversation, self.prompt_text)
            messages.append(normalized)
            sources.append(images)
        variables = {
            **self.tokenizer.special_tokens_map,
            "image_token": self.image_token,
            "query_token": self.query_token if self.num_query_tokens else "",
            "question_marker": self.question_marker,
            **variables,
        }
        try:
            prompts, spans = render_jinja_template(
                messages, chat_template=template, return_assistant_tokens_mask=with_spans, **variables
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return prompts, spans or [()] * len(prompts), sources

    def _encode_batch(
        self,
        rows: list[list[Piece]],
        images: Any,
        text_options: dict[str, Any],
        image_options: dict[str, Any],
    ) -> BatchFeature:
        features = self._encode_rows(rows, text_options)
        pixels = None
        counts = [len(row["image_positions"]) for row in features]
        if text_options.get("return_pixel_values") is not False or images is not None:
            images = match_images(images, counts, self.image_token)
            if images and text_options.get("return_pixel_values") is not False:
                pixels = self.image_processor(images, **{**image_options, "return_tensors": None})["pixel_values"]
        return self._stack(features, pixels, text_options)

    def _encode_rows(self, rows: list[list[Piece]], options: Mapping[str, Any]) -> list[Features]:
        """Token tensors of each row, unpadded. All texts of the batch go to the tokenizer at once."""
        if self.num_query_tokens:
            for row, pieces in enumerate(rows):
                with _naming_row(row, len(rows)):
                    mark_questions(pieces, self.user_header)
        tokenize_pieces(rows, self.tokenizer, self._cached("opens_texts", self._opens_texts))
        expansion = self._expansion(rows, options.get("add_special_tokens") is not False)
        limit, limit_name = options.get("max_length"), "max_length"
        if limit is None:
            limit, limit_name = self.tokenizer.model_max_length, "the tokenizer's model_max_length"
        truncation = options.get("truncation") not in (None, False, "do_not_truncate")
        features = []
        for row, pieces in enumerate(rows):
            with _naming_row(row, len(rows)):
                encoded_row = encode_pieces(pieces, expansion)
                if limit < NO_LIMIT:
                    side = self.tokenizer.truncation_side
                    encoded_row = fit_to_length(encoded_row, limit, truncation, side, expansion, limit_name)
            if options.get("return_assistant_tokens_mask"):
                encoded_row["assistant_masks"] = (encoded_row["labels"] != IGNORED_LABEL).astype(np.int64)
            if not options.get("return_labels"):
                del encoded_row["labels"]
            features.append(encoded_row)
        return features

    def _expansion(self, rows: list[list[Piece]], add_special_tokens: bool) -> Expansion:
        special = {piece.text for pieces in rows for piece in pieces if piece.kind is Kind.TOKEN}
        return Expansion(
            image_token_id=self.image_token_id,
            num_image_tokens=self.num_image_tokens,
            query_token_id=self.query_token_id,
            num_query_tokens=self.num_query_tokens,
            token_ids={token: self.tokenizer.convert_tokens_to_ids(token) for token in special},
            prefix_ids=self._cached("prefix_ids", self._find_prefix_ids) if add_special_tokens else (),
        )

    def _stack(self, rows: Sequence[Features], pixels: np.ndarray | None, options: Mapping[str, Any]) -> BatchFeature:
        tensor_type = options.get("return_tensors")
        strategy = PaddingStrategy.LONGEST if options.get("padding") is True else options.get("padding")
        if strategy in (None, False, PaddingStrategy.DO_NOT_PAD):
            lengths = {len(row["input_ids"]) for row in rows}
            if len(lengths) > 1 and tensor_type is not None:
                raise ValueError(f"rows of {min(lengths)} to {max(lengths)} tokens need padding=True to form a tensor")
        length = None
        if strategy == PaddingStrategy.MAX_LENGTH:
            length = options.get("max_length") or self.tokenizer.model_max_length
            if length >= NO_LIMIT:
                raise ValueError('padding="max_length" needs max_length: the tokenizer has no limit of its own')
        if strategy in (None, False, PaddingStrategy.DO_NOT_PAD) and tensor_type is None:
            names = [name for name in rows[0] if any(len(row[name]) for row in rows)]
            data: dict[str, Any] = {name: [row[name].tolist() for row in rows] for name in names}
        else:
            side = options.get("padding_side") or self.tokenizer.padding_side
            multiple = options.get("pad_to_multiple_of")
            data = dict(pad_features(rows, self.tokenizer.pad_token_id, length, multiple, side))
            if tensor_type is None:
                data = {name: value.tolist() for name, value in data.items()}
        if pixels is not None:
            data["pixel_values"] = pixels
        return BatchFeature(data, tensor_type=tensor_type)


# Any text that a tokenizer turns into tokens of its own.
PROBE = "a"


@contextmanager
def _naming_row(row: int, rows: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if rows == 1:
            raise
        raise ValueError(f"row {row}: {error}") from error


def _without_batch_axis(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as arrays, (T,) instead of (1, T)."""
    arrays = {name: np.asarray(value) for name, value in row.items() if value is not None}
    for name, value in arrays.items():
        if name == "pixel_values" or value.ndim == 1:
            continue
        if value.ndim != 2 or value.shape[0] != 1:
            raise ValueError(f"pad takes single samples; {name} of one has shape {value.shape}")
        arrays[name] = value[0]
    return arrays


__all__ = ["FlashSlothProcessor"]

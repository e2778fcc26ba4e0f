"""From conversations and images to the tensors of the model.

Shape suffixes: B rows, T tokens, I images of the batch, V views, C H W pixels, K images of a row, G query groups of a
row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.utils import PaddingStrategy, TensorType, logging

from .chat_text import (
    DEFAULT_CHAT_TEMPLATE,
    PLAIN_CHAT_TEMPLATE,
    Kind,
    Piece,
    PromptText,
    mark_answers,
    mark_questions,
)
from .conversations import as_batch, match_images, merge_sources, render_conversations
from .image_processing_flashsloth import FlashSlothImageProcessor
from .prompt_batches import stack_rows, without_batch_axis
from .prompt_encoding import (
    IGNORED_LABEL,
    NO_LIMIT,
    POSITION_NAMES,
    TOKEN_FILLS,
    Expansion,
    Features,
    encode_pieces,
    fit_to_length,
    naming_row,
    tokenize_pieces,
)

logger = logging.get_logger(__name__)

# Templates that need no saving; a template of the same name saved with the processor comes first.
BUILT_IN_TEMPLATES = {"default": DEFAULT_CHAT_TEMPLATE, "plain": PLAIN_CHAT_TEMPLATE}


class FlashSlothTextKwargs(TextKwargs, total=False):
    """Options for text beyond those of every processor."""

    return_labels: bool | None
    return_pixel_values: bool | None
    visual_tokens: int | list[int] | None


# Options that every tokenizer has and that say nothing here.
IGNORED_OPTIONS = ("text_pair", "text_target", "text_pair_target", "stride", "is_split_into_words",
    "return_token_type_ids", "return_overflowing_tokens", "return_special_tokens_mask", "return_offsets_mapping",
    "return_length", "return_text_replacement_offsets")  # fmt: skip


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
        visual_token_choices: all numbers of them that the model was trained for (`config.visual_token_choices`).
        num_query_tokens: query tokens of a group, 0 for a model without (`config.num_query_tokens`).
        image_token: placeholder of a visual token in text.
        query_token: placeholder of a learned query token.
        question_marker: zero-width mark that templates put before a question; never a token.
        user_header: where a question begins in prompts written by hand, without marker.
        assistant_header: where an answer begins there.
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
        visual_token_choices: list[int] | None = None,
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
        self.visual_token_choices = visual_token_choices
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
            visual_token_choices=list(config.visual_token_choices) if len(config.trained_windows) > 1 else None,
            **arguments,
        )
        for name in ("image_token_id", "query_token_id"):
            expected, found = getattr(config, name), getattr(processor, name)
            if expected is not None and expected != found and (name == "image_token_id" or config.num_query_tokens):
                raise ValueError(f"the tokenizer's {name} is {found}, the configuration's is {expected}")
        return processor

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors this processor can emit, of those for tokens as far as its tokenizer wants them."""
        mask = ["attention_mask"] if self._wants_mask else []
        queries = ["query_positions", "question_ids"] if self.num_query_tokens else []
        return ["input_ids", *mask, "pixel_values", "image_positions", *queries]

    @property
    def _wants_mask(self) -> bool:
        return "attention_mask" in self.tokenizer.model_input_names

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
                add_special_tokens, return_attention_mask, return_tensors), of the image processor, and
                `return_mm_token_type_ids`: add 1 for tokens of images, 0 for others;
                `return_labels`: add labels of the answers;
                `return_pixel_values`: `False` leaves images out, for features encoded before;
                `visual_tokens`: tokens of every image, or a list with one number for each in reading order, of those
                that the model can make (`config.window_of`).

        Returns:
            `input_ids`, `attention_mask` (B, T); `pixel_values` (I, V, 3, H, W) float32 and `image_positions` (B, K)
            when there are images, `image_token_counts` (I,) with `visual_tokens`; `query_positions` (B, G) and
            `question_ids` (B, T) when there are query groups;
            `labels` and `mm_token_type_ids` (B, T) when asked for.

        Raises:
            ValueError: numbers of placeholders and images that differ, an empty question, a prompt that is too long
                or whose truncation would cut what must stay whole.
        """
        if text is None and images is None:
            raise ValueError("FlashSlothProcessor needs text, images, or both")
        text_options, image_options = self._options(kwargs)
        if text is None:
            return self.image_processor(images, **image_options)
        prompts = list(text) if isinstance(text, Iterable) and not isinstance(text, str) else [text]
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("text must be a string or a list of strings")
        rows = [self.prompt_text.split(prompt) for prompt in prompts]
        for row, pieces in enumerate(rows):
            kinds = {piece.kind for piece in pieces}
            if self.num_query_tokens and Kind.IMAGE in kinds and Kind.QUERY not in kinds:
                logger.warning_once(
                    f"A prompt has an image but no {self.query_token}: its answer is made without EmbQ."
                )
            if text_options.get("return_labels"):
                with naming_row(row, len(rows)):
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
        variables = {
            **self.tokenizer.special_tokens_map,
            "image_token": self.image_token,
            "query_token": self.query_token if self.num_query_tokens else "",
            "question_marker": self.question_marker,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **kwargs,
        }
        prompts, spans, sources = render_conversations(
            conversations, template, self.prompt_text, tokenize, tools, documents, variables
        )
        if not tokenize:
            return prompts if batched else prompts[0]
        text_options, image_options = self._options(
            options | ({} if return_tensors is None else {"return_tensors": return_tensors})
        )
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
        known = {*TOKEN_FILLS, *POSITION_NAMES, "image_token_counts", "pixel_values"}
        if unknown := sorted({name for row in features for name in row if name not in known}):
            raise ValueError(f"cannot pad {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        rows = [without_batch_axis(row) for row in features]
        optional = {name for row in rows for name in row}
        for row in rows:
            if "image_token_counts" in optional:
                images = len(row.get("image_positions", ()))
                row.setdefault("image_token_counts", np.full(images, self.num_image_tokens, dtype=np.int64))
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
        return stack_rows(rows, np.concatenate(pixels) if pixels else None, self.tokenizer, options)

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

    def find_prefix_ids(self) -> list[int]:
        """What the tokenizer puts before a text, such as a beginning-of-sequence token. (What it puts after a text
        would end the prompt before the answer.)"""
        plain = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        full = self.tokenizer(PROBE, add_special_tokens=True)["input_ids"]
        return full[: full.index(plain[0])]

    def opens_texts(self) -> bool:
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

    def _options(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options for text and for images: the given ones, else the tokenizer's own, else this processor's."""
        own = self.tokenizer.init_kwargs
        merged = self._merge_kwargs(FlashSlothProcessorKwargs, tokenizer_init_kwargs=own, **given)
        text_options = merged["text_kwargs"]
        for name in IGNORED_OPTIONS:
            if text_options.get(name) and name not in own:
                logger.warning_once(f"{name!r} is no option of FlashSlothProcessor; ignored")
        is_used = truncates(text_options) or text_options.get("padding") == PaddingStrategy.MAX_LENGTH
        given_text = {**given, **(given.get("text_kwargs") or {})}
        if not is_used and "max_length" not in given_text:  # as with the tokenizer, whose limit then says nothing
            text_options.pop("max_length", None)
        return text_options, merged["images_kwargs"]

    def _template(self, name_or_template: str | None) -> str:
        own = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if name_or_template is None:
            name_or_template = "default"
            if name_or_template not in own:
                raise ValueError(f"none of the chat templates {sorted(own)} is the default; name one as chat_template")
        if not isinstance(name_or_template, str):
            raise ValueError(f"chat_template must be a string, got {type(name_or_template).__name__}")
        template = own.get(name_or_template) or BUILT_IN_TEMPLATES.get(name_or_template) or name_or_template
        if not isinstance(template, str):
            raise ValueError(f"the chat template {name_or_template!r:.80} is no string, but {type(template).__name__}")
        return template

    def _call_options(self) -> set[str]:
        image_options = self.image_processor.valid_kwargs.__annotations__
        return {"text_kwargs", "images_kwargs", "common_kwargs", *FlashSlothTextKwargs.__annotations__, *image_options}

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
        return stack_rows(features, pixels, self.tokenizer, text_options)

    def _encode_rows(self, rows: list[list[Piece]], options: Mapping[str, Any]) -> list[Features]:
        """Token tensors of each row, unpadded. All texts of the batch go to the tokenizer at once."""
        if self.num_query_tokens:
            for row, pieces in enumerate(rows):
                with naming_row(row, len(rows)):
                    mark_questions(pieces, self.user_header)
        image_tokens = self._image_tokens(rows, options.get("visual_tokens"))
        tokenize_pieces(rows, self.tokenizer, self._cached("opens_texts", self.opens_texts))
        expansion = self._expansion(rows, options.get("add_special_tokens") is not False)
        limit, limit_name = options.get("max_length"), "max_length"
        if limit is None:
            limit, limit_name = self.tokenizer.model_max_length, "the tokenizer's model_max_length"
        truncation = truncates(options)
        features = []
        for row, pieces in enumerate(rows):
            with naming_row(row, len(rows)):
                encoded_row = encode_pieces(pieces, expansion, None if image_tokens is None else image_tokens[row])
                if limit < NO_LIMIT:
                    side = self.tokenizer.truncation_side
                    encoded_row = fit_to_length(encoded_row, limit, truncation, side, expansion, limit_name)
            if options.get("return_assistant_tokens_mask"):
                encoded_row["assistant_masks"] = (encoded_row["labels"] != IGNORED_LABEL).astype(np.int64)
            if options.get("return_mm_token_type_ids"):
                encoded_row["mm_token_type_ids"] = (encoded_row["input_ids"] == self.image_token_id).astype(np.int64)
            if image_tokens is None:
                del encoded_row["image_token_counts"]
            if not options.get("return_labels"):
                del encoded_row["labels"]
            if not (self._wants_mask if (wanted := options.get("return_attention_mask")) is None else wanted):
                del encoded_row["attention_mask"]
            features.append(encoded_row)
        return features

    @staticmethod
    def _image_tokens(rows: list[list[Piece]], visual_tokens: Any) -> list[list[int]] | None:
        """Visual tokens of the images of each row; None where they are the processor's."""
        if visual_tokens is None:
            return None
        images = [sum(piece.kind is Kind.IMAGE for piece in pieces) for pieces in rows]
        values = np.asarray(visual_tokens)
        counts = [visual_tokens] * sum(images) if values.ndim == 0 else values.tolist()
        if any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
            raise ValueError(f"visual_tokens is {visual_tokens!r:.80}; give a whole number of at least 1, or a list")
        if len(counts) != sum(images):
            raise ValueError(f"visual_tokens names {len(counts)} images, but the prompts have {sum(images)}")
        remaining = iter(counts)
        return [[next(remaining) for _ in range(number)] for number in images]

    def _expansion(self, rows: list[list[Piece]], add_special_tokens: bool) -> Expansion:
        special = {piece.text for pieces in rows for piece in pieces if piece.kind is Kind.TOKEN}
        return Expansion(
            image_token_id=self.image_token_id,
            num_image_tokens=self.num_image_tokens,
            query_token_id=self.query_token_id,
            num_query_tokens=self.num_query_tokens,
            token_ids={token: self.tokenizer.convert_tokens_to_ids(token) for token in special},
            prefix_ids=self._cached("prefix_ids", self.find_prefix_ids) if add_special_tokens else (),
        )


# Any text that a tokenizer turns into tokens of its own.
PROBE = "a"


def truncates(options: Mapping[str, Any]) -> bool:
    """Whether options of a tokenizer ask for truncation."""
    return options.get("truncation") not in (None, False, "do_not_truncate")


__all__ = ["FlashSlothProcessor"]

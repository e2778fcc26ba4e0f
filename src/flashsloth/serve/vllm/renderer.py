"""Chats and texts to tokens and items, by the project's own processor: what users type stays text."""

import threading
from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.utils.async_utils import make_async

from flashsloth import FlashSlothConfig

from . import IMAGE
from .prompts import EncodedPrompt, encoded_prompt, engine_input, longest_question

logger = init_logger(f"vllm.{__name__}")

ENCODED = "_flashsloth"
# what a request may choose of the processor's options
REQUEST_OPTIONS = ("visual_tokens",)
# of a chat's template
TEMPLATE_OPTIONS = ("add_generation_prompt", "continue_final_message")
# said by vLLM itself, whatever the model
VLLM_OPTIONS = ("chat_template", "return_dict", "tokenize", "cohere_format")


class FlashSlothRenderer(HfRenderer):
    """Renders by FlashSlothProcessor, which knows images, questions and queries by their places, not by their text."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        info = self.get_mm_processor().info
        self._processor: Any = info.get_hf_processor()
        self._config: FlashSlothConfig = info.get_hf_config()
        # a tokenizer's settings are changed and read by every call
        self._tokenizing = threading.Lock()
        self._encode_chat_async = make_async(self._encode_chat, executor=self._executor)
        self._engine_input_async = make_async(self._engine_input, executor=self._mm_executor)

    def render_messages(self, messages: Any, params: Any) -> Any:
        conversation, data, uuids = parse_chat_messages(messages, self.model_config, "openai", params.media_io_kwargs)
        return conversation, self._encode_chat(conversation, data, uuids, params)

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        conversation, data, uuids = await parse_chat_messages_async(
            messages, self.model_config, "openai", params.media_io_kwargs
        )
        return conversation, await self._encode_chat_async(conversation, data, uuids, params)

    def _encode_chat(self, conversation: Any, data: Any, uuids: Any, params: Any) -> dict[str, Any]:
        template = params.chat_template or self._processor.chat_template
        arguments = {name: value for name, value in params.get_apply_chat_template_kwargs().items() if value}
        if "tools" in arguments:
            raise VLLMValidationError("FlashSloth has no tools; leave them out", parameter="tools")
        chosen: dict[str, Any] = {"chat_template": params.chat_template}
        for name, value in arguments.items():
            if name in TEMPLATE_OPTIONS or (name in template and name not in self._processor._call_options()):
                chosen[name] = value
            elif name not in VLLM_OPTIONS:
                logger.warning_once("the chat template has no %s; it is ignored", name)
        images = self._images(data, uuids)
        options = self._options(params.mm_processor_kwargs)
        with self._tokenizing:
            batch = self._processor.apply_chat_template(
                conversation,
                images=images or None,
                tokenize=True,
                return_dict=True,
                processor_kwargs=options,
                **chosen,
            )
        return self._tokens_prompt(batch, images)

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        images = self._images(prompt.get("multi_modal_data"), prompt.get("multi_modal_uuids"))
        options = self._options(prompt.get("mm_processor_kwargs"))
        with self._tokenizing:
            batch = self._processor(images=images or None, text=prompt["prompt"], **options)
        return {**self._tokens_prompt(batch, images), "prompt": prompt["prompt"]}

    def _images(self, data: Any, uuids: Any) -> list[Any]:
        if uuids and any(identifier is not None for own in uuids.values() for identifier in own):
            raise VLLMValidationError("FlashSloth tells images by their pixels; leave uuid out", parameter="uuid")
        items = self.get_mm_processor().info.parse_mm_data(data or {})
        if unknown := set(items) - {IMAGE}:
            raise VLLMValidationError(f"FlashSloth takes images, not {', '.join(unknown)}", parameter="messages")
        return items[IMAGE].get_all() if IMAGE in items else []

    def _options(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        given = {**(self.model_config.multimodal_config.mm_processor_kwargs or {}), **(given or {})}
        if unknown := given.keys() - set(REQUEST_OPTIONS):
            raise VLLMValidationError(
                f"mm_processor_kwargs has {', '.join(sorted(unknown))}; FlashSloth knows {', '.join(REQUEST_OPTIONS)}",
                parameter="mm_processor_kwargs",
            )
        return {"return_tensors": "np", "return_pixel_values": False, **given}

    def _tokens_prompt(self, batch: Any, images: list[Any]) -> dict[str, Any]:
        encoded = encoded_prompt(batch, images, self._config)
        if len(images) != len(encoded.image_positions):
            raise VLLMValidationError(
                f"the prompt has {len(encoded.image_positions)} image placeholders, but {len(images)} images came",
                parameter="messages",
            )
        step = self.config.scheduler_config.max_num_batched_tokens
        needed = longest_question(encoded) + self._config.num_query_tokens
        if needed > step:
            raise VLLMValidationError(
                f"a question and its queries are {needed} tokens, but a step of the engine takes {step}; shorten it, "
                "or start the server with a larger --max-num-batched-tokens",
                parameter="messages",
            )
        return {"prompt_token_ids": encoded.ids, ENCODED: encoded}

    def _process_tokens(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        self._check(prompt)
        return self._engine_input(prompt)

    async def _process_tokens_async(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        self._check(prompt)
        return await self._engine_input_async(prompt)

    def _check(self, prompt: Any) -> None:
        encoded: EncodedPrompt | None = prompt.get(ENCODED)
        if encoded is None:
            placeholders = {self._config.image_token_id, self._config.query_token_id}
            if prompt.get("multi_modal_data") or placeholders.intersection(prompt["prompt_token_ids"]):
                raise VLLMValidationError(
                    "FlashSloth takes chat messages, or a text as its processor's apply_chat_template renders it; "
                    "token ids do not tell which of them are the question",
                    parameter="prompt",
                )
        elif prompt["prompt_token_ids"] != encoded.ids:
            raise VLLMValidationError(
                "truncating a prompt could cut images or questions; leave truncate_prompt_tokens out",
                parameter="truncate_prompt_tokens",
            )

    def _engine_input(self, prompt: Any) -> Any:
        encoded: EncodedPrompt | None = prompt.pop(ENCODED, None)
        if encoded is None or not (encoded.images or encoded.query_positions):
            return super()._process_tokens(prompt)
        pixels = None
        if encoded.images:
            pixels = self._processor.image_processor(encoded.images, return_tensors="pt")["pixel_values"]
        result = engine_input(encoded, pixels, self._config)
        for name in ("prompt", "cache_salt"):
            if prompt.get(name):
                result[name] = prompt[name]
        return result

"""What vLLM asks a multimodal model about its inputs."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo

from flashsloth import FlashSlothConfig

from . import IMAGE, TURN
from .prompts import encoded_prompt, engine_input


class FlashSlothProcessingInfo(BaseProcessingInfo):
    """Modalities, and how many tokens they take."""

    def get_hf_config(self) -> FlashSlothConfig:
        return self.ctx.get_hf_config(FlashSlothConfig)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {IMAGE: None, TURN: None} if self.get_hf_config().num_query_tokens else {IMAGE: None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        config = self.get_hf_config()
        tokens = {IMAGE: max(config.visual_token_choices), TURN: config.num_query_tokens}
        return {modality: tokens[modality] for modality in mm_counts}


class FlashSlothDummyInputs(BaseDummyInputsBuilder[FlashSlothProcessingInfo]):
    """Of the run in which vLLM measures memory; the processor makes them whole."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        return {}


class FlashSlothMultiModalProcessor(BaseMultiModalProcessor[FlashSlothProcessingInfo]):
    """Only for the run in which vLLM measures memory: requests come from the renderer as items."""

    def get_dummy_mm_inputs(self, mm_counts: Mapping[str, int], **options: Any) -> Any:
        config, processor = self.info.get_hf_config(), self.info.get_hf_processor()
        images = [Image.new("RGB", (config.image_width, config.image_height))] * max(1, mm_counts.get(IMAGE, 1))
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "?"}]
        options = {"return_tensors": "np", "return_pixel_values": False}
        if len(config.trained_windows) > 1:
            options["visual_tokens"] = max(config.visual_token_choices)
        batch = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            images=images,
            tokenize=True,
            return_dict=True,
            processor_kwargs=options,
        )
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return engine_input(encoded_prompt(batch, images, config), pixels, config)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Raises:
        ValueError: always; only the renderer knows which tokens are a question.
        """
        raise ValueError(
            "FlashSloth takes chat messages, or a text as its processor's apply_chat_template renders it; tokens do "
            "not tell which of them are the question"
        )

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        raise NotImplementedError

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        raise NotImplementedError

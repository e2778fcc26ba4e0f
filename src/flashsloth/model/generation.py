"""What `generate` of transformers has to know about prompts with images, queries and questions.

Shape suffixes: B rows, T tokens, D width of the language model, K images of a row at most.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationMixin

from .backbones import CACHE_ARGUMENT
from .compressors import ImageFeatures, select_images
from .positions import is_placeholder, placeholder_positions

# inputs that belong to the prompt: a step that continues from a cache must not see them again
PROMPT_INPUTS = (
    "pixel_values", "image_features", "image_token_counts", "image_positions", "query_positions", "question_ids"
)  # fmt: skip


class FlashSlothGenerationMixin(GenerationMixin):
    """`generate` for a model whose prompts hold placeholders."""

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """Inputs of one step. What belongs to the prompt comes with the step that runs the prompt, or with every step
        where no cache is used."""
        tokens = input_ids.shape[1]
        position_ids = kwargs.get("position_ids")
        row_tokens = _row_length(input_ids, position_ids, attention_mask)
        if not kwargs.get("use_cache", True):
            if row_tokens == tokens or inputs_embeds is not None:
                kwargs.pop(CACHE_ARGUMENT, None)
                next_sequence_length = None
            if inputs_embeds is not None and not is_first_iteration:
                new_ids_BT = input_ids[:, tokens - (row_tokens - inputs_embeds.shape[1]) :]
                new_embeds_BTD = self.get_input_embeddings()(new_ids_BT).to(inputs_embeds)
                inputs_embeds = torch.cat([inputs_embeds, new_embeds_BTD], dim=1)
            is_first_iteration = True
        elif is_first_iteration or any(kwargs.get(name) is not None for name in PROMPT_INPUTS):
            cache = kwargs.get(CACHE_ARGUMENT)
            past_length = 0 if cache is None else int(cache.get_seq_length())
            # an assistant's first step is not called the first
            is_first_iteration = is_first_iteration or past_length == 0
            is_cached = past_length and next_sequence_length is None and row_tokens == tokens
            if is_cached and (position_ids is None or not position_ids[..., 0].any()):
                # the ids begin where the row does, and its beginning is in the cache
                next_sequence_length = tokens - past_length
        if not is_first_iteration:
            for name in PROMPT_INPUTS:
                kwargs.pop(name, None)
        elif (question_ids := kwargs.get("question_ids")) is not None:
            missing = max(row_tokens - question_ids.shape[1], 0)  # candidates and answers ask nothing
            kwargs["question_ids"] = functional.pad(question_ids, (0, missing))
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if CACHE_ARGUMENT in inputs:  # PEFT knows the cache by its old name
            inputs["past_key_values"] = inputs.pop(CACHE_ARGUMENT)
        return inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        if model_kwargs.get("use_cache", True):
            for name in PROMPT_INPUTS:
                model_kwargs.pop(name, None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat rows for beams and several answers; images are encoded once and their features repeated by row."""
        if expand_size == 1:
            return input_ids, model_kwargs
        features = model_kwargs.pop("image_features", None)
        pixel_values = model_kwargs.pop("pixel_values", None)
        counts = model_kwargs.pop("image_token_counts", None)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, image_token_counts=counts, return_dict=True)
        token_id = self.config.image_token_id
        if features is not None and token_id is not None:
            positions_BK = model_kwargs.get("image_positions")
            if positions_BK is None:
                embeds_BTD = model_kwargs.get("inputs_embeds")
                ids_BT = input_ids if embeds_BTD is None else None
                at_BT = is_placeholder(token_id, ids_BT, embeds_BTD, self.get_input_embeddings())
                lengths = getattr(features, "token_counts", None)
                run_length = self.config.num_image_tokens if lengths is None else lengths
                positions_BK = placeholder_positions(at_BT, token_id, run_length)
                model_kwargs["image_positions"] = positions_BK
            if positions_BK is not None:
                counts = (positions_BK >= 0).sum(dim=1).tolist()
                order = torch.arange(sum(counts), device=positions_BK.device).split(counts)
                order = torch.cat([images.repeat(expand_size) for images in order])
                features = select_images(features, order)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features is not None:
            model_kwargs["image_features"] = features
        return input_ids, model_kwargs

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        """Candidates of assisted decoding: without placeholders, which no answer holds but a prompt that is copied
        does; and an assistant that knows no images does not get them."""
        if assistant_model is not None:
            taken = inspect.signature(assistant_model.forward).parameters
            dropped = [name for name in PROMPT_INPUTS if name not in taken]
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in dropped}
            if (features := model_kwargs.get("image_features")) is not None:  # copied, which a graph forbids
                model_kwargs["image_features"] = ImageFeatures(
                    last_hidden_state=features.last_hidden_state.detach(),
                    pooler_output=features.pooler_output.detach(),
                    token_counts=getattr(features, "token_counts", None),
                )
        generator = super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )
        placeholders = [id for id in (self.config.image_token_id, self.config.query_token_id) if id is not None]
        if placeholders:
            generator.get_candidates = _without_placeholders(generator.get_candidates, placeholders)
        return generator

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        is_cut = generation_config.prefill_chunk_size is not None
        if is_cut and any(model_kwargs.get(name) is not None for name in PROMPT_INPUTS):
            raise ValueError(
                "prefill_chunk_size does not go with images and query tokens: a query group reads its question and "
                "its images inside one forward pass, which the pieces would cut. Leave it out; compression keeps "
                "prompts short."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def generate_batch(self, inputs, *args, **kwargs):
        """Continuous batching of transformers, for prompts without images: it passes nothing but token ids.

        Raises:
            ValueError: a prompt with image placeholders.
        """
        for number, ids in enumerate(inputs):
            if self.config.image_token_id in ids:
                raise ValueError(
                    f"prompt {number} has image placeholders, but generate_batch passes no images; ask about images "
                    "with generate."
                )
        return super().generate_batch(inputs, *args, **kwargs)


def _row_length(input_ids_BT: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> int:
    """Tokens of the whole row: the ids may be only those that go on from a cache, and a mask of ones is left out."""
    for described in (position_ids, attention_mask):
        if described is not None:
            return described.shape[-1]
    return input_ids_BT.shape[1]


def _without_placeholders(get_candidates: Callable[..., tuple], placeholders: list[int]) -> Callable[..., tuple]:
    def get(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        candidates_1T, logits_1TV = get_candidates(input_ids, *args, **kwargs)
        length = input_ids.shape[1]
        is_bad_T = torch.isin(candidates_1T[0, length:], torch.tensor(placeholders, device=candidates_1T.device))
        kept = int((is_bad_T.cumsum(0) == 0).sum())
        return candidates_1T[:, : length + kept], None if logits_1TV is None else logits_1TV[:, :kept]

    return get

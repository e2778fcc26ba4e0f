"""FlashSloth: vision encoder, compressor, projector, language model, and an embedded query module inside it.

Shape suffixes: B rows, T tokens, D width of the language model, V views of an image (vocabulary for logits),
I images of the batch, K images of a row at most, C H W channels and pixels, P un-pooled patches of an image (all
views), E width of the encoder, N visual tokens of an image, G query groups of a row at most, Q queries of a group.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .backbones import (
    CACHE_ARGUMENT,
    build_vision_tower,
    decoder_layers,
    fuse_activations,
    run_tower,
    scale_logits,
)
from .compressors import COMPRESSORS, ImageFeatures, compress_by_count
from .configuration_flashsloth import FlashSlothConfig
from .embedded_query import (
    INPUTS_KEYWORD,
    EmbeddedQuery,
    LayerInsertion,
    QueryTokens,
    align_questions,
    checkpoint_with_features,
    embedded_query_inputs,
)
from .generation import FlashSlothGenerationMixin
from .positions import check_uncut, complete_positions, in_rows, in_same_sample, is_mask_of_row, place

logger = logging.get_logger(__name__)

# cross-entropy leaves these positions out, as everywhere in transformers
IGNORED_LABEL = -100


@dataclass
class FlashSlothModelOutput(BaseModelOutputWithPast):
    """Output of `FlashSlothModel`; `image_features` may be passed to a later call in place of the pixels."""

    image_features: ImageFeatures | None = None


@dataclass
class FlashSlothOutput(CausalLMOutputWithPast):
    """Output of `FlashSlothForConditionalGeneration`.

    Attributes:
        loss: mean cross-entropy over the labels that are not -100.
        logits: (B, T, vocabulary), or the kept positions; None under `loss_only`.
        the cache, hidden_states, attentions: as in every causal language model.
        image_features: encoder features and visual tokens of the images of this call.
    """

    image_features: ImageFeatures | None = None


class FlashSlothPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the FlashSloth classes."""

    config: FlashSlothConfig
    config_class = FlashSlothConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, QueryTokens):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        else:
            super()._init_weights(module)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Choose how attention is computed, for all parts or by the name of their configuration.

        Args:
            attn_implementation: such as "eager" or "sdpa"; or a dict of them by "vision_config" and "text_config".
        """
        # the tower's own configuration is shorter than the whole encoder's; transformers finds a part by identity
        config, tower = self.config, self.base_model.vision_tower
        whole, config.vision_config = config.vision_config, tower.config
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        finally:
            config.vision_config = whole
        whole._attn_implementation = tower.config._attn_implementation

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        if self.base_model.embedded_query is not None:
            layer = decoder_layers(self.base_model.language_model)[self.config.embedded_query_layer]
            if (checkpoint := getattr(layer, "_gradient_checkpointing_func", None)) is not None:
                layer._gradient_checkpointing_func = partial(checkpoint_with_features, checkpoint)


class FlashSlothModel(FlashSlothPreTrainedModel):
    """The model without a language modelling head."""

    def __init__(self, config: FlashSlothConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.vision_tower = build_vision_tower(
            config.vision_config, config.vision_feature_layer, config.vision_final_norm
        )
        self.compressor = COMPRESSORS[config.compressor](
            vision_size, config.compressor_window, config.compressor_dropout
        )
        self.projector = nn.Sequential(
            nn.Linear(self.compressor.out_features, text_size),
            ACT2FN[config.projector_hidden_act],
            nn.Linear(text_size, text_size),
        )
        self.query_tokens = QueryTokens(config.num_query_tokens, text_size) if config.num_query_tokens else None
        self.language_model = (
            AutoModel.from_config(config.text_config, trust_remote_code=False)
            if language_model is None
            else language_model
        )
        fuse_activations(self.language_model)
        self.embedded_query = None
        if config.num_query_tokens:
            self.embedded_query = EmbeddedQuery(
                text_size,
                vision_size,
                config.embedded_query_hidden_size,  # type: ignore[arg-type]  # the configuration has filled it in
                config.embedded_query_num_heads,
                config.embedded_query_uses_question,
            )
            for index, layer in enumerate(decoder_layers(self.language_model)):
                hook = LayerInsertion(self, active=index == config.embedded_query_layer)
                layer.register_forward_pre_hook(hook, with_kwargs=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def encode_views(self, pixel_values: Tensor) -> Tensor:
        """Run the vision encoder on every view.

        Args:
            pixel_values: (I, V, C, H, W), or (I, C, H, W) for models with one view.

        Returns:
            un-pooled features (I, P, E), the views of an image one after the other.
        """
        return self._encode(pixel_values).last_hidden_state

    def _encode(self, pixel_values: Tensor, **options: bool) -> BaseModelOutput:
        """What `encode_views` returns, and the encoder's hidden states and attentions where `options` ask for them."""
        config = self.config
        pixels_IVCHW = pixel_values.unsqueeze(1) if pixel_values.ndim == 4 else pixel_values
        expected = (config.num_views, config.image_height, config.image_width)
        if pixels_IVCHW.ndim != 5 or (pixels_IVCHW.shape[1], *pixels_IVCHW.shape[3:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; this model takes (images, {expected[0]} views, "
                f"channels, {expected[1]}, {expected[2]}). Prepare images with the processor saved beside the model."
            )
        views_ICHW = pixels_IVCHW.flatten(0, 1).to(self.vision_tower.dtype)
        output = run_tower(self.vision_tower, views_ICHW, (config.grid_height, config.grid_width), **options)
        images = pixels_IVCHW.shape[0]
        states = output.hidden_states and tuple(
            state.reshape(images, -1, state.shape[-1]) for state in output.hidden_states
        )
        features_IPE = output.last_hidden_state.reshape(images, -1, output.last_hidden_state.shape[-1])
        return BaseModelOutput(last_hidden_state=features_IPE, hidden_states=states, attentions=output.attentions)

    def compress(self, features: Tensor, visual_tokens: int | None = None) -> Tensor:
        """Compress and project encoder features, every view alone.

        Args:
            features: (I, P, E) from `encode_views`.
            visual_tokens: N; default the configuration's.

        Returns:
            visual tokens (I, N, D).

        Raises:
            ValueError: no window makes so many tokens.
        """
        config = self.config
        window = config.effective_window if visual_tokens is None else config.window_of(visual_tokens)
        if window not in config.trained_windows:
            logger.warning_once(
                f"{visual_tokens} visual tokens an image: the weights were not trained for them, but for "
                f"{', '.join(map(str, config.visual_token_choices))}; expect worse answers."
            )
        views_NHWE = features.reshape(-1, config.grid_height, config.grid_width, features.shape[-1])
        tokens_NMD = self.projector(self.compressor(views_NHWE, window))
        return tokens_NMD.reshape(features.shape[0], config.tokens_of_window(window), -1)

    def compress_images(self, features: Tensor, token_counts: Tensor | None = None) -> ImageFeatures:
        """Visual tokens of images that may have different numbers of them.

        Args:
            features: (I, P, E) from `encode_views`.
            token_counts: (I,) int64, visual tokens of each image; None for the configuration's number.
        """
        if token_counts is None:
            return ImageFeatures(last_hidden_state=features, pooler_output=self.compress(features))
        tokens_IND = compress_by_count(self.compress, features, token_counts)
        return ImageFeatures(last_hidden_state=features, pooler_output=tokens_IND, token_counts=token_counts)

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_token_counts: Tensor | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageFeatures | tuple:
        """Encode images once; the result may be passed to any number of calls as `image_features`.

        Args:
            pixel_values: (I, V, C, H, W) float.
            image_token_counts: (I,) int64, visual tokens of each image; default the configuration's number for all.
            return_dict: False for a tuple, which no call takes.
            output_hidden_states: add the states of the encoder's layers.
            output_attentions: add their attentions.

        Returns:
            `last_hidden_state`: un-pooled encoder features (I, P, E); `pooler_output`: visual tokens (I, N, D);
            `token_counts`: those of each image, where they were given;
            `hidden_states`: (I, P, E) for each layer; `attentions`: of every view, class and register tokens included.
        """
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        encoded = self._encode(pixel_values, **{name: value for name, value in asked.items() if value is not None})
        features = self.compress_images(encoded.last_hidden_state, image_token_counts)
        features.hidden_states, features.attentions = encoded.hidden_states, encoded.attentions
        return features if _returns_dict(self.config, return_dict) else features.to_tuple()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_features: ImageFeatures | None = None,
        image_token_counts: Tensor | None = None,
        image_positions: Tensor | None = None,
        query_positions: Tensor | None = None,
        question_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> FlashSlothModelOutput | tuple:
        """Hidden states of the last layer.

        Args:
            input_ids: (B, T) int64, placeholders expanded by the processor.
            pixel_values: (I, V, C, H, W) float, the images of the batch in reading order.
            attention_mask: (B, T) or longer with a cache; 1 = token.
            position_ids: (B, T) int64. Without mask and with use_cache=False, positions that start again begin another
                packed sample, which shares neither attention nor images with those before it.
            past_key_values: the key-value cache, by its name before transformers 5.24.
            cache: the same, by its name since then.
            image_features: result of `get_image_features`, instead of `pixel_values`.
            image_token_counts: (I,) int64, visual tokens of each image; default the configuration's number for all.
            image_positions: (B, K) int64, first placeholder of each image of the row, -1 where there is none.
            query_positions: (B, G) int64, first query token of each group, -1 where there is none.
            question_ids: (B, T) int64, g on the tokens of the question of the row's g-th group (from 1), else 0.
                With a cache the last three describe the whole row, past tokens included; what is past is skipped.
            mm_token_type_ids: not used; the positions say the same.

        Raises:
            ValueError: counts of images, placeholders and queries that do not agree; the message gives both.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None and image_features is not None:
            raise ValueError("give pixel_values or image_features, not both.")
        if pixel_values is not None:
            image_features = self.compress_images(self.encode_views(pixel_values), image_token_counts)
        cache = past_key_values if cache is None else cache
        # pages of transformers' continuous batching have no length of their own
        is_paged = cache is not None and not isinstance(cache, Cache)
        kwargs["cache" if is_paged else CACHE_ARGUMENT] = cache
        embeds_BTD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = embeds_BTD.shape[1]
        past_length = 0 if cache is None or is_paged else cache.get_seq_length()
        counts_I = getattr(image_features, "token_counts", None)
        if tokens > 1 and not torch.compiler.is_compiling():
            given = query_positions
            images = 0 if image_features is None else image_features.pooler_output.shape[0]
            image_positions, query_positions = complete_positions(
                self.config, self.get_input_embeddings(), images, counts_I, image_positions, query_positions,
                past_length, input_ids, inputs_embeds,
            )  # fmt: skip
            question_ids = align_questions(question_ids, tokens, given, query_positions)
            if is_paged and query_positions is not None:
                check_uncut(query_positions, self.config.num_query_tokens, position_ids)
        image_index_BK = None
        if image_features is not None and image_positions is not None:
            image_index_BK = (image_positions >= 0).flatten().cumsum(0).sub(1).clamp(min=0).view_as(image_positions)
            tokens_BKND = image_features.pooler_output[image_index_BK]
            counts_BK = None if counts_I is None else in_rows(counts_I, image_positions)
            embeds_BTD = place(embeds_BTD, tokens_BKND, image_positions, past_length, counts_BK)
        if query_positions is not None and self.query_tokens is not None:
            queries_BGQD = self.query_tokens().expand(*query_positions.shape, -1, -1)
            embeds_BTD = place(embeds_BTD, queries_BGQD, query_positions, past_length)
            if image_index_BK is not None:
                if question_ids is None and self.config.embedded_query_uses_question:
                    raise ValueError(
                        "the input has query tokens but no question_ids, so it is not known which tokens are the "
                        "question; prepare the prompt with FlashSlothProcessor."
                    )
                inputs = embedded_query_inputs(
                    image_features.last_hidden_state,
                    image_index_BK,
                    image_positions,
                    query_positions,
                    question_ids,
                    self.config.num_query_tokens,
                    tokens,
                    past_length,
                )
                if attention_mask is None and cache is None and position_ids is not None:
                    own_BGK = in_same_sample(position_ids, query_positions, image_positions)
                    inputs = replace(inputs, image_mask_BGK=inputs.image_mask_BGK & own_BGK)
                kwargs[INPUTS_KEYWORD] = inputs
        if position_ids is None and is_mask_of_row(attention_mask, past_length, tokens):
            # left padding must not shift positions
            position_ids = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -tokens:]

        outputs = self.language_model(
            inputs_embeds=embeds_BTD,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        output = FlashSlothModelOutput(**outputs, image_features=image_features)
        return output if _returns_dict(self.config, return_dict) else output.to_tuple()


class FlashSlothForConditionalGeneration(FlashSlothPreTrainedModel, FlashSlothGenerationMixin):
    """FlashSloth with the head of its language model: answers questions about images.

    Source: "FlashSloth: Lightning Multimodal Large Language Models via Embedded Visual Compression" (CVPR 2025).
    """

    # a fused head and loss for `loss_only`: (model, hidden_ND, labels_N, num_items_in_batch) -> loss
    head_loss: Callable[..., Tensor] | None = None

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__(config)
        # the causal model is built for its head, which differs between families (bias, size)
        causal_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        self.model = FlashSlothModel(config, language_model=causal_model.base_model)
        self.lm_head = causal_model.get_output_embeddings()
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.model.language_model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.post_init()
        # a head that is tied to the embeddings must be cut as they are
        head = next(name for name, module in causal_model.named_modules() if module is self.lm_head)
        if (style := (causal_model._tp_plan or {}).get(head)) is not None:
            self._tp_plan["lm_head"] = style
        placeholders = [id for id in (config.image_token_id, config.query_token_id) if id is not None]
        if placeholders:  # an answer must never contain them: the next turn would take them for an image
            self.generation_config.suppress_tokens = placeholders

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model.language_model

    def get_image_features(self, pixel_values: Tensor, **options) -> ImageFeatures | tuple:
        """See `FlashSlothModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: ImageFeatures | None = None,
        image_token_counts: Tensor | None = None,
        image_positions: Tensor | None = None,
        query_positions: Tensor | None = None,
        question_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_only: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> FlashSlothOutput | tuple:
        """Logits, and the loss where `labels` (B, T; -100 = ignored) are given; the rest as in `FlashSlothModel`.

        `shift_labels` (B, T) are labels that stand where they are predicted, which is one before the token; they come
        before `labels`. Further arguments go to the language model.

        Args:
            logits_to_keep: compute logits for this many last positions only (0 = all), or for these indices.
            loss_only: with `labels`, run the head on the positions that predict a label and return no logits; the
                loss is the same, and training spends neither time nor memory on the logits of prompts.
            num_items_in_batch: labelled tokens of the whole optimiser step, for exact gradient accumulation.
        """
        # no parameter of its own, or the Trainer takes it for one of the names of labels that every batch has
        if (shift_labels := kwargs.pop("shift_labels", None)) is not None:
            shift_labels = shift_labels.contiguous()
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            image_token_counts=image_token_counts,
            image_positions=image_positions,
            query_positions=query_positions,
            question_ids=question_ids,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            return_dict=True,
            **kwargs,
        )
        hidden_BTD = outputs.last_hidden_state
        if loss_only:
            if shift_labels is None and labels is None:
                raise ValueError("loss_only needs labels.")
            if shift_labels is None:
                shift_labels = functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
            shift_labels = shift_labels.to(hidden_BTD.device)
            predicts_BT = shift_labels != IGNORED_LABEL
            hidden_BTD, shift_labels = hidden_BTD[predicts_BT].unsqueeze(0), shift_labels[predicts_BT].unsqueeze(0)
            if self.head_loss is not None:
                return FlashSlothOutput(loss=self.head_loss(self, hidden_BTD[0], shift_labels[0], num_items_in_batch))
        elif isinstance(logits_to_keep, Tensor) or logits_to_keep:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            # contiguous, or torch copies the head's weight for each row
            hidden_BTD = hidden_BTD[:, keep, :].contiguous()
        logits_BTV = scale_logits(self.config.text_config, self.lm_head(hidden_BTD))
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits_BTV,
                labels=labels,
                vocab_size=logits_BTV.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        output = FlashSlothOutput(
            loss=loss,
            logits=None if loss_only else logits_BTV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_features=None if loss_only else outputs.image_features,
            **{CACHE_ARGUMENT: outputs.get(CACHE_ARGUMENT)},
        )
        return output if _returns_dict(self.config, return_dict) else output.to_tuple()


def _returns_dict(config: FlashSlothConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


__all__ = ["FlashSlothForConditionalGeneration", "FlashSlothModel", "FlashSlothPreTrainedModel"]

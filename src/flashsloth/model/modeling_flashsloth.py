"""FlashSloth: vision encoder, compressor, projector, language model, and an embedded query module inside it.

Shape suffixes: B rows, T tokens, D width of the language model, V views of an image (vocabulary for logits),
I images of the batch, K images of a row at most, C H W channels and pixels, P un-pooled patches of an image (all
views), E width of the encoder, N visual tokens of an image, G query groups of a row at most, Q queries of a group.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from .backbones import (
    CACHE_ARGUMENT,
    build_vision_tower,
    decoder_layers,
    encode_patches,
    fuse_activations,
    scale_logits,
)
from .compressors import COMPRESSORS
from .configuration_flashsloth import FlashSlothConfig
from .embedded_query import INPUTS_KEYWORD, EmbeddedQuery, EmbeddedQueryInputs, LayerInsertion, QueryTokens
from .positions import in_same_sample, placeholder_positions

# cross-entropy leaves these positions out, as everywhere in transformers
IGNORED_LABEL = -100
# inputs that belong to the prompt: a decoding step must not see them again
_PROMPT_INPUTS = ("pixel_values", "image_features", "image_positions", "query_positions", "question_ids")


@dataclass
class FlashSlothModelOutput(BaseModelOutputWithPast):
    """Output of `FlashSlothModel`; `image_features` may be passed to a later call in place of the pixels."""

    image_features: BaseModelOutputWithPooling | None = None


@dataclass
class FlashSlothOutput(CausalLMOutputWithPast):
    """Output of `FlashSlothForConditionalGeneration`.

    Attributes:
        loss: mean cross-entropy over the labels that are not -100.
        logits: (B, T, vocabulary), or the kept positions; None under `loss_only`.
        the cache, hidden_states, attentions: as in every causal language model.
        image_features: encoder features and visual tokens of the images of this call.
    """

    image_features: BaseModelOutputWithPooling | None = None


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
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
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
        config = self.config
        pixels_IVCHW = pixel_values.unsqueeze(1) if pixel_values.ndim == 4 else pixel_values
        expected = (config.num_views, config.image_height, config.image_width)
        if pixels_IVCHW.ndim != 5 or (pixels_IVCHW.shape[1], *pixels_IVCHW.shape[3:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; this model takes (images, {expected[0]} views, "
                f"channels, {expected[1]}, {expected[2]}). Prepare images with the processor saved beside the model."
            )
        views_ICHW = pixels_IVCHW.flatten(0, 1).to(self.vision_tower.dtype)
        features_IPE = encode_patches(self.vision_tower, views_ICHW, (config.grid_height, config.grid_width))
        return features_IPE.reshape(pixels_IVCHW.shape[0], -1, features_IPE.shape[-1])

    def compress(self, features: Tensor) -> Tensor:
        """Compress and project encoder features, every view alone.

        Args:
            features: (I, P, E) from `encode_views`.

        Returns:
            visual tokens (I, N, D).
        """
        config = self.config
        views_NHWE = features.reshape(-1, config.grid_height, config.grid_width, features.shape[-1])
        tokens_IND = self.projector(self.compressor(views_NHWE))
        return tokens_IND.reshape(features.shape[0], config.num_image_tokens, -1)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Encode images once; the result may be passed to any number of calls as `image_features`.

        Args:
            pixel_values: (I, V, C, H, W) float.

        Returns:
            `last_hidden_state`: un-pooled encoder features (I, P, E); `pooler_output`: visual tokens (I, N, D).
        """
        features_IPE = self.encode_views(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=features_IPE, pooler_output=self.compress(features_IPE))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_features: BaseModelOutputWithPooling | None = None,
        image_positions: Tensor | None = None,
        query_positions: Tensor | None = None,
        question_ids: Tensor | None = None,
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
            past_key_values, cache: the key-value cache, by its name before transformers 5.24 or the one since then.
            image_features: result of `get_image_features`, instead of `pixel_values`.
            image_positions: (B, K) int64, first placeholder of each image of the row, -1 where there is none.
            query_positions: (B, G) int64, first query token of each group, -1 where there is none.
            question_ids: (B, T) int64, g on the tokens of the question of the row's g-th group (from 1), else 0.
            With a cache the last three describe the whole row, past tokens included; what is past is skipped.

        Raises:
            ValueError: counts of images, placeholders and queries that do not agree; the message gives both.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None and image_features is not None:
            raise ValueError("give pixel_values or image_features, not both.")
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        cache = past_key_values if cache is None else cache
        embeds_BTD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = embeds_BTD.shape[1]
        past_length = 0 if cache is None else cache.get_seq_length()

        if input_ids is not None and tokens > 1 and not torch.compiler.is_compiling():
            image_positions, query_positions = self._complete_positions(
                input_ids, image_features, image_positions, query_positions, past_length
            )
        image_index_BK = None
        if image_features is not None and image_positions is not None:
            image_index_BK = (image_positions >= 0).flatten().cumsum(0).sub(1).clamp(min=0).view_as(image_positions)
            tokens_BKND = image_features.pooler_output[image_index_BK]
            embeds_BTD = _place(embeds_BTD, tokens_BKND, image_positions, past_length)
        if query_positions is not None and self.query_tokens is not None:
            queries_BGQD = self.query_tokens().expand(*query_positions.shape, -1, -1)
            embeds_BTD = _place(embeds_BTD, queries_BGQD, query_positions, past_length)
            if image_index_BK is not None:
                if question_ids is None and self.config.embedded_query_uses_question:
                    raise ValueError(
                        "the input has query tokens but no question_ids, so it is not known which tokens are the "
                        "question; prepare the prompt with FlashSlothProcessor."
                    )
                inputs = self._embedded_query_inputs(
                    image_features, image_index_BK, image_positions, query_positions, question_ids, tokens, past_length
                )
                if attention_mask is None and cache is None and position_ids is not None:
                    own_BGK = in_same_sample(position_ids, query_positions, image_positions)
                    inputs = inputs._replace(image_mask_BGK=inputs.image_mask_BGK & own_BGK)
                kwargs[INPUTS_KEYWORD] = inputs
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2 and cache is None:
            # left padding must not shift positions
            position_ids = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)

        outputs = self.language_model(
            inputs_embeds=embeds_BTD,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )
        output = FlashSlothModelOutput(**outputs, image_features=image_features)
        return output if _returns_dict(self.config, return_dict) else output.to_tuple()

    def _complete_positions(
        self,
        input_ids_BT: Tensor,
        image_features: BaseModelOutputWithPooling | None,
        image_positions_BK: Tensor | None,
        query_positions_BG: Tensor | None,
        past_length: int | Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Find the placeholders of a whole prompt in its ids, and check counts.

        Positions that were given are used for what the ids alone do not tell: a prompt whose beginning is in the
        cache. Otherwise the ids decide, since padding added after the processor moves placeholders.
        """
        config = self.config
        num_tokens = config.num_image_tokens
        images = 0 if image_features is None else image_features.pooler_output.shape[0]
        starts_here = isinstance(past_length, int) and past_length == 0
        if config.image_token_id is not None and (starts_here or image_positions_BK is None):
            image_positions_BK = placeholder_positions(input_ids_BT, config.image_token_id, num_tokens)
        query_token_id = None if self.query_tokens is None else config.query_token_id
        if query_token_id is not None and (starts_here or query_positions_BG is None):
            query_positions_BG = placeholder_positions(input_ids_BT, query_token_id, config.num_query_tokens)
        if config.image_token_id is None:
            if images:
                raise ValueError("images were given but the configuration has no image_token_id.")
        elif image_positions_BK is None:
            if images:
                raise ValueError(f"{images} images were given but the prompt has no image placeholder.")
        else:
            placed = (image_positions_BK >= 0).sum()
            found = (input_ids_BT == config.image_token_id).sum()
            expected = (image_positions_BK >= past_length).sum() * num_tokens
            if placed != images or found != expected:
                raise ValueError(
                    f"the prompt has {int(found)} image placeholder tokens ({num_tokens} make one image) and names "
                    f"{int(placed)} image positions, but {images} images were given; prepare text and images in one "
                    "call of the processor saved beside the model, and do not truncate its output."
                )
        return image_positions_BK, query_positions_BG

    def _embedded_query_inputs(
        self,
        image_features: BaseModelOutputWithPooling,
        image_index_BK: Tensor,
        image_positions_BK: Tensor,
        query_positions_BG: Tensor,
        question_ids_BT: Tensor | None,
        tokens: int,
        past_length: int | Tensor,
    ) -> EmbeddedQueryInputs:
        """Who sees what: a group sees its own question and the images before it in the row."""
        device = query_positions_BG.device
        present_BG = query_positions_BG >= past_length
        image_mask_BGK = (image_positions_BK >= 0)[:, None, :] & present_BG[:, :, None]
        image_mask_BGK = image_mask_BGK & (image_positions_BK[:, None, :] < query_positions_BG[:, :, None])
        group_G = torch.arange(1, query_positions_BG.shape[1] + 1, device=device)
        if question_ids_BT is None:
            question_ids_BT = torch.zeros(query_positions_BG.shape[0], tokens, dtype=torch.long, device=device)
        question_mask_BGT = question_ids_BT[:, None, -tokens:] == group_G[:, None]
        first_BG1 = (query_positions_BG - past_length).clamp(min=0).unsqueeze(-1)
        return EmbeddedQueryInputs(
            features_IME=image_features.last_hidden_state,
            image_index_BK=image_index_BK,
            image_mask_BGK=image_mask_BGK,
            question_mask_BGT=question_mask_BGT,
            query_index_BGQ=first_BG1 + torch.arange(self.config.num_query_tokens, device=device),
        )


class FlashSlothForConditionalGeneration(FlashSlothPreTrainedModel, GenerationMixin):
    """FlashSloth with the head of its language model: answers questions about images.

    Source: "FlashSloth: Lightning Multimodal Large Language Models via Embedded Visual Compression" (CVPR 2025).
    """

    # a fused head and loss for `loss_only`: (model, hidden_ND, labels_N, num_items_in_batch) -> loss
    head_loss: Callable[..., Tensor] | None = None

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__(config)
        # the causal model is built for its head, which differs between families (bias, size)
        causal_model = AutoModelForCausalLM.from_config(config.text_config)
        self.model = FlashSlothModel(config, language_model=causal_model.base_model)
        self.lm_head = causal_model.get_output_embeddings()
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.model.language_model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.post_init()
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

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """See `FlashSlothModel.get_image_features`."""
        return self.model.get_image_features(pixel_values)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: BaseModelOutputWithPooling | None = None,
        image_positions: Tensor | None = None,
        query_positions: Tensor | None = None,
        question_ids: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_only: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> FlashSlothOutput | tuple:
        """Logits, and the loss where `labels` (B, T; -100 = ignored) are given.

        Args:
            logits_to_keep: compute logits for this many last positions only (0 = all), or for these indices.
            loss_only: with `labels`, run the head on the positions that predict a label and return no logits; the
                loss is the same, and training spends neither time nor memory on the logits of prompts.
            num_items_in_batch: labelled tokens of the whole optimiser step, for exact gradient accumulation.
            The others: see `FlashSlothModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            image_positions=image_positions,
            query_positions=query_positions,
            question_ids=question_ids,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            return_dict=True,
            **kwargs,
        )
        hidden_BTD = outputs.last_hidden_state
        shift_labels = None
        if loss_only:
            if labels is None:
                raise ValueError("loss_only needs labels.")
            shift_BT = functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:].to(hidden_BTD.device)
            predicts_BT = shift_BT != IGNORED_LABEL
            hidden_BTD, shift_labels = hidden_BTD[predicts_BT].unsqueeze(0), shift_BT[predicts_BT].unsqueeze(0)
            if self.head_loss is not None:
                return FlashSlothOutput(loss=self.head_loss(self, hidden_BTD[0], shift_labels[0], num_items_in_batch))
        elif isinstance(logits_to_keep, Tensor) or logits_to_keep:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            # contiguous, or torch copies the head's weight for each row
            hidden_BTD = hidden_BTD[:, keep, :].contiguous()
        logits_BTV = scale_logits(self.config.text_config, self.lm_head(hidden_BTD))
        loss = None
        if labels is not None:
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

    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, **kwargs):
        """Images, queries and questions belong to the prompt and are dropped after it when a cache is used."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in _PROMPT_INPUTS:
                kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat rows for beams and several answers; images are encoded once and their features repeated by row."""
        if expand_size == 1:
            return input_ids, model_kwargs
        features = model_kwargs.pop("image_features", None)
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values)
        if features is not None:
            positions_BK = model_kwargs.get("image_positions")
            if positions_BK is None and self.config.image_token_id is not None:
                positions_BK = placeholder_positions(
                    input_ids, self.config.image_token_id, self.config.num_image_tokens
                )
                model_kwargs["image_positions"] = positions_BK
            if positions_BK is not None:
                counts = (positions_BK >= 0).sum(dim=1).tolist()
                order = torch.arange(sum(counts), device=positions_BK.device).split(counts)
                order = torch.cat([images.repeat(expand_size) for images in order])
                features = BaseModelOutputWithPooling(
                    last_hidden_state=features.last_hidden_state[order], pooler_output=features.pooler_output[order]
                )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features is not None:
            model_kwargs["image_features"] = features
        return input_ids, model_kwargs


def _returns_dict(config: FlashSlothConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _place(embeds_BTD: Tensor, values_BKLD: Tensor, positions_BK: Tensor, past_length: int | Tensor) -> Tensor:
    """Write runs of L embeddings at the positions that lie in this part of the sequence, as a new tensor."""
    rows, tokens, width = embeds_BTD.shape
    length = values_BKLD.shape[2]
    first_BK1 = torch.where(positions_BK >= past_length, positions_BK - past_length, tokens).unsqueeze(-1)
    index_BKL = first_BK1 + torch.arange(length, device=positions_BK.device)
    index_BL1 = index_BKL.clamp(max=tokens).reshape(rows, -1, 1).to(embeds_BTD.device)
    # one spare position at the end takes what is absent or past
    spare_BTD = torch.cat([embeds_BTD, embeds_BTD.new_zeros(rows, 1, width)], dim=1)
    values_BLD = values_BKLD.reshape(rows, -1, width).to(embeds_BTD.device, embeds_BTD.dtype)
    return spare_BTD.scatter(1, index_BL1.expand(-1, -1, width), values_BLD)[:, :tokens]


__all__ = ["FlashSlothForConditionalGeneration", "FlashSlothModel", "FlashSlothPreTrainedModel"]

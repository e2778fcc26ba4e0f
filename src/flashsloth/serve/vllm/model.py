"""FlashSloth's model in vLLM: vLLM's decoder, the project's own encoder, compressor, projector and EmbQ."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashsloth import FlashSlothConfig, FlashSlothModel

from ...model.backbones import build_vision_tower
from ...model.compressors import COMPRESSORS
from ...model.embedded_query import EmbeddedQuery, QueryTokens
from .embedded_query import Turn, insert_embedded_query
from .processor import FlashSlothDummyInputs, FlashSlothMultiModalProcessor, FlashSlothProcessingInfo

# un-pooled features that are kept for further questions about an image
FEATURE_CACHE_BYTES = 256 << 20


class TurnEmbeddings(Tensor):
    """Embeddings (Q, D) of a turn's queries that carry what EmbQ needs, also when vLLM takes them out of its cache."""

    turn: Turn

    @staticmethod
    def of(embeds_QD: Tensor, turn: Turn) -> "TurnEmbeddings":
        result = embeds_QD.detach().clone().as_subclass(TurnEmbeddings)
        result.turn = turn
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, TurnEmbeddings) and args and isinstance(args[0], TurnEmbeddings):
            result.turn = args[0].turn
        return result


@dataclass
class _Features:
    """Features of images by the digest of their pixels; the least recently used go first."""

    limit: int
    size: int = 0

    def __post_init__(self) -> None:
        self.kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def get(self, digest: tuple[int, ...]) -> Tensor | None:
        if digest in self.kept:
            self.kept.move_to_end(digest)
        return self.kept.get(digest)

    def put(self, digest: tuple[int, ...], features_ME: Tensor) -> None:
        if digest not in self.kept:
            self.kept[digest] = features_ME
            self.size += features_ME.nbytes
        while self.size > self.limit:
            self.size -= self.kept.popitem(last=False)[1].nbytes


@MULTIMODAL_REGISTRY.register_processor(
    FlashSlothMultiModalProcessor, info=FlashSlothProcessingInfo, dummy_inputs=FlashSlothDummyInputs
)
class FlashSlothForVllm(nn.Module, SupportsMultiModal):
    """Any decoder that vLLM has, and Phi."""

    # as `FlashSlothModel` encodes and compresses
    encode_views = FlashSlothModel.encode_views
    _encode = FlashSlothModel._encode
    compress = FlashSlothModel.compress
    compress_images = FlashSlothModel.compress_images

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>" if modality == "image" else None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: FlashSlothConfig = vllm_config.model_config.hf_config
        self.config = config
        text_size = config.text_config.hidden_size
        causal_model = AutoModelForCausalLM._model_mapping[type(config.text_config)]
        architecture = causal_model.__name__
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = build_vision_tower(
                config.vision_config, config.vision_feature_layer, config.vision_final_norm
            )
            self.compressor = COMPRESSORS[config.compressor](
                config.vision_config.hidden_size, config.compressor_window, config.compressor_dropout
            )
            self.projector = nn.Sequential(
                nn.Linear(self.compressor.out_features, text_size),
                ACT2FN[config.projector_hidden_act],
                nn.Linear(text_size, text_size),
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[architecture],
            )
        self.decoder_name = causal_model.base_model_prefix
        decoder = getattr(self.language_model, self.decoder_name)
        self.query_tokens = self.embedded_query = None
        self.embedded_query_turns = 0  # that EmbQ has run for
        self._turns: list[tuple[int, Turn]] = []
        self._features = _Features(FEATURE_CACHE_BYTES)
        if config.num_query_tokens:
            self.query_tokens = QueryTokens(config.num_query_tokens, text_size)
            self.embedded_query = EmbeddedQuery(
                text_size,
                config.vision_config.hidden_size,
                config.embedded_query_hidden_size,  # type: ignore[arg-type]  # the configuration has filled it in
                config.embedded_query_num_heads,
                config.embedded_query_uses_question,
            )
            insert_embedded_query(self, decoder, vllm_config, maybe_prefix(prefix, "embedded_query"))
        tokens = (config.image_token_id, config.query_token_id)
        self._never_answered = [token for token in tokens if token is not None]

    # The encoder and EmbQ

    def embed_multimodal(self, **items: Any) -> list[Tensor]:
        """Visual tokens (tokens, D) of images, or queries (Q, D) of turns."""
        if "is_question" in items:
            return self._embed_turns(items["image_pixels"], items["image_digests"], items["is_question"])
        features = self._image_features(list(items["pixel_values"]), items["image_digest"])
        compressed = self.compress_images(torch.stack(features), items["visual_tokens"])
        counts = items["visual_tokens"].tolist()
        return [tokens_ND[:count] for tokens_ND, count in zip(compressed.pooler_output, counts, strict=True)]

    def _embed_turns(self, pixels: Any, digests: Any, is_question: Any) -> list[Tensor]:
        assert self.query_tokens is not None
        turns = []
        for pixels_KVCHW, digests_K2, is_question_T in zip(pixels, digests, is_question, strict=True):
            features = self._image_features(list(pixels_KVCHW), digests_K2)
            turns.append(TurnEmbeddings.of(self.query_tokens(), Turn(is_question_T, features)))
        return turns

    def _image_features(self, pixels: list[Tensor], digests_I2: Tensor) -> list[Tensor]:
        """Un-pooled features (M, E) of each image; those not at hand are encoded together."""
        digests = [tuple(digest) for digest in digests_I2.tolist()]
        known = {digest: self._features.get(digest) for digest in digests}
        missing = {digest: image for digest, image in zip(digests, pixels, strict=True) if known[digest] is None}
        if missing:
            encoded_IME = self.encode_views(torch.stack(list(missing.values())))
            for digest, features_ME in zip(missing, encoded_IME, strict=True):
                known[digest] = features_ME.clone()
                self._features.put(digest, known[digest])
        return [known[digest] for digest in digests]

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embeddings (N, D) of a step; notes where it has queries."""
        self._turns = []
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            places = is_multimodal.nonzero().flatten().tolist()
            first = 0
            for embeds in multimodal_embeddings:
                if isinstance(embeds, TurnEmbeddings) and embeds.turn.features:
                    assert len(embeds) == self.config.num_query_tokens, "the scheduler has cut a turn's queries"
                    assert places[first] >= len(embeds.turn.is_question_T), "the scheduler has cut a question"
                    self._turns.append((places[first], embeds.turn))
                first += len(embeds)
            multimodal_embeddings = [embeds.as_subclass(Tensor) for embeds in multimodal_embeddings]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def take_turns(self) -> list[tuple[int, Turn]]:
        """Turns of this step, each with the place of its first query; once only."""
        turns, self._turns = self._turns, []
        self.embedded_query_turns += len(turns)
        return turns

    # The decoder

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        decoder = getattr(self.language_model, self.decoder_name)
        return decoder(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits_NV = self.language_model.compute_logits(hidden_states)
        if logits_NV is not None:
            # an answer must never contain placeholders: the next turn would take them for an image
            logits_NV[:, self._never_answered] = -torch.inf
        return logits_NV

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        mapper = WeightsMapper(
            orig_to_new_prefix={
                "model.language_model.": f"language_model.{self.decoder_name}.",
                "lm_head.": "language_model.lm_head.",
                "model.": "",
            }
        )
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)

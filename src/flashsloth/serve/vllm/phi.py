"""Phi from vLLM's layers: vLLM has none of its own any more."""

from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

STACKED = WeightsMapper(
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
    }
)


class PhiAttention(nn.Module):
    """Rotary embedding on a part of each head; every projection has a bias."""

    def __init__(self, config: Any, cache_config: CacheConfig | None, quant_config: Any, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.heads, self.key_heads = heads // ranks, max(1, key_heads // ranks)
        self.head_size = head_size
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, head_size, heads, key_heads, bias=True, quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.dense = RowParallelLinear(
            heads * head_size, config.hidden_size, bias=True, quant_config=quant_config, prefix=f"{prefix}.dense"
        )
        self.qk_layernorm = config.qk_layernorm
        if config.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(head_size, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(head_size, eps=config.layer_norm_eps)
        self.rotary_emb = get_rope(
            head_size, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attn = Attention(
            self.heads, head_size, head_size**-0.5, num_kv_heads=self.key_heads, cache_config=cache_config,
            quant_config=quant_config, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        sizes = [self.heads * self.head_size, self.key_heads * self.head_size, self.key_heads * self.head_size]
        query, key, value = qkv.split(sizes, dim=-1)
        if self.qk_layernorm:
            query = self.q_layernorm(query.unflatten(-1, (-1, self.head_size))).flatten(-2)
            key = self.k_layernorm(key.unflatten(-1, (-1, self.head_size))).flatten(-2)
        query, key = self.rotary_emb(positions, query, key)
        output, _ = self.dense(self.attn(query, key, value))
        return output


class PhiLayer(nn.Module):
    """Attention and feed-forward side by side behind one norm."""

    def __init__(self, config: Any, cache_config: CacheConfig | None, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = PhiAttention(config, cache_config, quant_config, f"{prefix}.self_attn")
        self.mlp = PhiFeedForward(config, quant_config, f"{prefix}.mlp")

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        return self.self_attn(positions, normed) + self.mlp(normed) + hidden_states


class PhiFeedForward(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(
            config.hidden_size, config.intermediate_size, quant_config=quant_config, prefix=f"{prefix}.fc1"
        )
        self.fc2 = RowParallelLinear(
            config.intermediate_size, config.hidden_size, quant_config=quant_config, prefix=f"{prefix}.fc2"
        )
        self.act = get_act_fn(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states, _ = self.fc1(hidden_states)
        hidden_states, _ = self.fc2(self.act(hidden_states))
        return hidden_states


@support_torch_compile
class PhiModel(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            PhiLayer(config, vllm_config.cache_config, quant_config, f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        return self.final_layernorm(hidden_states)


class PhiForCausalLM(nn.Module):
    """Phi with its head, which has a bias."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    hf_to_vllm_mapper = STACKED

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = PhiModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, bias=True, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)

    def load_weights(self, weights: Any) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=STACKED)

"""EmbQ inside vLLM's decoder: a custom operation in front of one layer, opaque to compilers."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from ...model.backbones import DECODER_LAYER_NAMES
from ...model.embedded_query import EmbeddedQueryInputs
from .settings import EMBEDDED_QUERY_OP


@dataclass
class Turn:
    """What EmbQ reads beside the hidden states.

    Attributes:
        is_question_T: which of the tokens right before the queries are the question.
        features: un-pooled features (M, E) of the images before it; none where it sees no image.
    """

    is_question_T: Tensor
    features: list[Tensor]


def run_embedded_query(hidden_states: Tensor, residual: Tensor | None, name: str) -> None:
    """Adds to the hidden states (N, D) of a step's queries what EmbQ has found for them."""
    owner = get_forward_context().no_compile_layers[name]
    turns = owner.take_turns()
    if turns:
        state_ND = hidden_states if residual is None else hidden_states + residual
        index_BQ, inputs, rows_BTD = _inputs(turns, state_ND, owner.config.num_query_tokens)
        updates_BQD = owner.embedded_query.updates(rows_BTD, inputs)
        hidden_states.index_add_(0, index_BQ.flatten(), updates_BQD.flatten(0, 1))


def _inputs(
    turns: list[tuple[int, Turn]], state_ND: Tensor, num_queries: int
) -> tuple[Tensor, EmbeddedQueryInputs, Tensor]:
    """Turns as rows: each from the first token of its question to its last query."""
    device = state_ND.device
    queries_Q = torch.arange(num_queries)
    lengths_B = torch.tensor([len(turn.is_question_T) for _, turn in turns])
    first_B = torch.tensor([place for place, _ in turns]) - lengths_B
    tokens = int(lengths_B.max()) + num_queries
    index_BT = (first_B[:, None] + torch.arange(tokens)).clamp(max=len(state_ND) - 1)
    question_mask_B1T = torch.zeros(len(turns), 1, tokens, dtype=torch.bool)
    images: dict[int, tuple[int, Tensor]] = {}
    most = max(len(turn.features) for _, turn in turns)
    image_index_BK = torch.zeros(len(turns), most, dtype=torch.long)
    image_mask_B1K = torch.zeros(len(turns), 1, most, dtype=torch.bool)
    for row, (_, turn) in enumerate(turns):
        question_mask_B1T[row, 0, : len(turn.is_question_T)] = turn.is_question_T
        for column, features_ME in enumerate(turn.features):
            image_index_BK[row, column] = images.setdefault(id(features_ME), (len(images), features_ME))[0]
        image_mask_B1K[row, 0, : len(turn.features)] = True
    index_BQ = first_B[:, None] + lengths_B[:, None] + queries_Q
    inputs = EmbeddedQueryInputs(
        features_IME=torch.stack([features_ME for _, features_ME in images.values()]),
        image_index_BK=image_index_BK.to(device),
        image_mask_BGK=image_mask_B1K.to(device),
        question_mask_BGT=question_mask_B1T.to(device),
        query_index_BGQ=(lengths_B[:, None, None] + queries_Q).to(device),
    )
    return index_BQ.to(device), inputs, state_ND[index_BT.to(device)]


def _run_nothing(hidden_states: Tensor, residual: Tensor | None, name: str) -> None:
    """For compilers, which trace shapes."""


direct_register_custom_op(
    EMBEDDED_QUERY_OP, run_embedded_query, mutates_args=["hidden_states"], fake_impl=_run_nothing
)


def insert_embedded_query(owner: nn.Module, decoder: nn.Module, vllm_config: VllmConfig, name: str) -> None:
    """Runs EmbQ in front of the layer that the configuration names.

    Args:
        owner: the model; the operation finds it by `name`.

    Raises:
        ValueError: a decoder whose layers are not to be found.
    """
    lists = [getattr(decoder, layers, None) for layers in DECODER_LAYER_NAMES]
    layers = next((layers for layers in lists if isinstance(layers, nn.ModuleList)), None)
    if layers is None:
        raise ValueError(
            f"vLLM's {type(decoder).__name__} keeps its layers under none of {DECODER_LAYER_NAMES}; serve this model "
            "with the built-in engine"
        )
    layer = layers[owner.config.embedded_query_layer]
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names:
        raise ValueError(
            f"vLLM's {type(layer).__name__} does not call its input hidden_states; serve this model with the built-in "
            "engine"
        )
    places = {key: names.index(key) for key in ("hidden_states", "residual") if key in names}
    vllm_config.compilation_config.static_forward_context[name] = owner

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {key: args[place] if place < len(args) else kwargs.get(key) for key, place in places.items()}
        getattr(torch.ops.vllm, EMBEDDED_QUERY_OP)(given["hidden_states"], given.get("residual"), name)

    layer.register_forward_pre_hook(before, with_kwargs=True)

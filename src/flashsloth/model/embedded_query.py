"""Embedded query module (EmbQ, paper section 3.3): learned queries fetch from the image what the question needs.

Shape suffixes: B rows, T tokens, D width of the language model, G query groups of a row (one per user turn),
Q queries of a group, I images of the batch, K images of a row, M un-pooled patches of an image, E width of the
encoder, S inner width, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

INPUTS_KEYWORD = "embedded_query_inputs"


@dataclass
class EmbeddedQueryInputs:
    """What the module needs beside the hidden states; made once per forward pass.

    Attributes:
        features_IME: un-pooled encoder features of all images of the batch.
        image_index_BK: which image of the batch is the row's k-th.
        image_mask_BGK: True where the group may see the image (it precedes the group).
        question_mask_BGT: True on the tokens of the group's question.
        query_index_BGQ: positions of the group's queries in the sequence.
    """

    features_IME: Tensor
    image_index_BK: Tensor
    image_mask_BGK: Tensor
    question_mask_BGT: Tensor
    query_index_BGQ: Tensor


# exporters take the arguments of a component apart, put them together again, and save their structure by name
torch.export.register_dataclass(
    EmbeddedQueryInputs, serialized_type_name=f"{EmbeddedQueryInputs.__module__}.{EmbeddedQueryInputs.__qualname__}"
)


def embedded_query_inputs(
    features_IPE: Tensor,
    image_index_BK: Tensor,
    image_positions_BK: Tensor,
    query_positions_BG: Tensor,
    question_ids_BT: Tensor | None,
    num_queries: int,
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
        features_IME=features_IPE,
        image_index_BK=image_index_BK,
        image_mask_BGK=image_mask_BGK,
        question_mask_BGT=question_mask_BGT,
        query_index_BGQ=first_BG1 + torch.arange(num_queries, device=device),
    )


def align_questions(
    question_ids_BT: Tensor | None, tokens: int, given_BG: Tensor | None, found_BG: Tensor | None
) -> Tensor | None:
    """Question ids as long as the input, where tokens were put before the row after the processor has run.

    Args:
        given_BG, found_BG: positions of the query groups, as they came with the ids and as they are.

    Raises:
        ValueError: the ids are too short for another reason.
    """
    if question_ids_BT is None or question_ids_BT.shape[1] >= tokens:
        return question_ids_BT
    missing = tokens - question_ids_BT.shape[1]
    if (
        given_BG is None
        or found_BG is None
        or not torch.equal(found_BG, torch.where(given_BG < 0, -1, given_BG + missing))
    ):
        raise ValueError(
            f"question_ids has {question_ids_BT.shape[1]} columns, but the input has {tokens} tokens; give one for "
            "each token, 0 where it belongs to no question."
        )
    return functional.pad(question_ids_BT, (missing, 0))


class QueryTokens(nn.Module):
    """The learned query tokens, the same for every turn."""

    def __init__(self, num_queries: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_queries, hidden_size))

    def forward(self) -> Tensor:
        return self.weight


class MaskedCrossAttention(nn.Module):
    """Multi-head attention without output projection, softmax in float32; keys and values may differ in width.

    `on_weights`, where it is set, is called with the weights of every call: (B, H, G * Q, L) float32, rows sum to 1.
    """

    on_weights: Callable[[Tensor], None] | None = None

    def __init__(self, key_size: int, value_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(key_size, key_size)
        self.key = nn.Linear(key_size, key_size)
        self.value = nn.Linear(value_size, value_size)

    def split_heads(self, states: Tensor) -> Tensor:
        """(..., L, width) -> (..., H, L, width / H)."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def attend(self, queries_BGQS: Tensor, keys_BHLs: Tensor, values_BHLe: Tensor, mask_BGL: Tensor) -> Tensor:
        """Let each group of queries read the L positions its mask allows; returns (B, G, Q, width of values)."""
        rows, groups, queries, _ = queries_BGQS.shape
        queries_BHLs = self.split_heads(self.query(queries_BGQS).flatten(1, 2))
        scores_BHLL = queries_BHLs @ keys_BHLs.transpose(-1, -2) * keys_BHLs.shape[-1] ** -0.5
        mask_B1LL = _repeat_each(mask_BGL, queries, dim=1).unsqueeze(1)
        # the lowest finite number, not -inf: a group that may see nothing stays finite and is dropped by the caller
        scores_BHLL = scores_BHLL.masked_fill(~mask_B1LL, torch.finfo(scores_BHLL.dtype).min)
        weights_BHLL = scores_BHLL.softmax(dim=-1, dtype=torch.float32)
        if self.on_weights is not None:
            self.on_weights(weights_BHLL)
        updates_BLHe = (weights_BHLL.to(values_BHLe.dtype) @ values_BHLe).transpose(1, 2)
        # sizes in full: none can be inferred where there are no groups
        return updates_BLHe.reshape(rows, groups, queries, self.num_heads * values_BHLe.shape[-1])


class EmbeddedQuery(nn.Module):
    """Text-to-query attention, then image-to-query attention, added to the hidden states of the queries.

    Args:
        text_hidden_size: D. vision_hidden_size: E. hidden_size: S, inner width. num_heads: heads of both attentions.
        uses_question: run the text-to-query attention.
    """

    def __init__(
        self, text_hidden_size: int, vision_hidden_size: int, hidden_size: int, num_heads: int, uses_question: bool
    ) -> None:
        super().__init__()
        self.down_projection_text = nn.Linear(text_hidden_size, hidden_size)  # shared by queries and question
        self.down_projection_image = nn.Linear(vision_hidden_size, hidden_size)
        self.norm_query = nn.LayerNorm(hidden_size)
        if uses_question:
            self.norm_text: nn.LayerNorm | None = nn.LayerNorm(hidden_size)
            self.text_attention: MaskedCrossAttention | None = MaskedCrossAttention(
                hidden_size, hidden_size, num_heads
            )
        else:
            self.norm_text = self.text_attention = None
        self.norm_image = nn.LayerNorm(hidden_size)
        self.image_attention = MaskedCrossAttention(hidden_size, vision_hidden_size, num_heads)
        self.up_projection = nn.Linear(vision_hidden_size, text_hidden_size)

    def forward(self, hidden_BTD: Tensor, inputs: EmbeddedQueryInputs) -> Tensor:
        """Hidden states with the queries updated, as a new tensor; every other position is returned unchanged."""
        index_BL = inputs.query_index_BGQ.flatten(1)
        index_BLD = index_BL.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
        return hidden_BTD.scatter_add(1, index_BLD, self.updates(hidden_BTD, inputs))

    def updates(self, hidden_BTD: Tensor, inputs: EmbeddedQueryInputs) -> Tensor:
        """What is added to the hidden states of the queries: (B, G * Q, D), zeros where a group sees no image."""
        _, groups, queries = inputs.query_index_BGQ.shape
        index_BL = inputs.query_index_BGQ.flatten(1)
        text_BTS = self.down_projection_text(hidden_BTD)
        queries_BLS = text_BTS.gather(1, index_BL.unsqueeze(-1).expand(-1, -1, text_BTS.shape[-1]))
        queries_BGQS = self.norm_query(queries_BLS).unflatten(1, (groups, queries))
        if self.text_attention is not None and self.norm_text is not None:
            attention = self.text_attention
            text_BTS = self.norm_text(text_BTS)
            keys_BHTs = attention.split_heads(attention.key(text_BTS))
            values_BHTs = attention.split_heads(attention.value(text_BTS))
            queries_BGQS = attention.attend(queries_BGQS, keys_BHTs, values_BHTs, inputs.question_mask_BGT)

        attention = self.image_attention
        features_IME = inputs.features_IME.to(hidden_BTD.device, hidden_BTD.dtype)
        image_IMS = self.norm_image(self.down_projection_image(features_IME))
        keys_BLS = self._per_row(attention.key(image_IMS), inputs.image_index_BK)
        values_BLE = self._per_row(attention.value(features_IME), inputs.image_index_BK)
        mask_BGL = _repeat_each(inputs.image_mask_BGK, features_IME.shape[1], dim=-1)
        update_BGQE = attention.attend(
            queries_BGQS, attention.split_heads(keys_BLS), attention.split_heads(values_BLE), mask_BGL
        )
        update_BGQD = self.up_projection(update_BGQE)
        # groups without an image keep their hidden states; so do the paddings of rows with fewer groups
        sees_image_BG11 = _any_last(inputs.image_mask_BGK)[..., None, None]
        return torch.where(sees_image_BG11, update_BGQD, 0.0).flatten(1, 2).to(hidden_BTD.dtype)

    @staticmethod
    def _per_row(states_IMX: Tensor, image_index_BK: Tensor) -> Tensor:
        """Lay the images of each row side by side: (B, K * M, X)."""
        rows, per_row = image_index_BK.shape
        if states_IMX.shape[0] != rows * per_row:  # otherwise every row has exactly K images, already in order
            states_IMX = states_IMX[image_index_BK.flatten()]
        return states_IMX.reshape(rows, per_row * states_IMX.shape[1], states_IMX.shape[2])


def _repeat_each(values: Tensor, times: int, dim: int) -> Tensor:
    """`repeat_interleave` by operations that every exporter and engine has, for empty tensors too."""
    dim = dim % values.ndim
    sizes = [-1] * (values.ndim + 1)
    sizes[dim + 1] = times
    return values.unsqueeze(dim + 1).expand(sizes).flatten(dim, dim + 1)


def _any_last(values: Tensor) -> Tensor:
    """`any(dim=-1)` as a sum, False where there is nothing: engines do not agree on the maximum of no values."""
    return functional.pad(values.long(), (1, 0)).cumsum(-1)[..., -1] > 0


class LayerInsertion:
    """Forward pre-hook of a decoder layer: runs the owner's embedded query module on the layer's input.

    The inputs travel as a keyword argument through the language model, so that recomputation under gradient
    checkpointing sees them again; every layer drops them, one layer uses them. Hooks leave parameter names alone.
    """

    def __init__(self, owner: nn.Module, active: bool) -> None:
        self.owner = owner  # looked up at call time, so that adapters may replace the module
        self.active = active

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs = kwargs.pop(INPUTS_KEYWORD, None)
        if inputs is not None and self.active:
            if args:
                args = (self.owner.embedded_query(args[0], inputs), *args[1:])
            else:
                kwargs["hidden_states"] = self.owner.embedded_query(kwargs["hidden_states"], inputs)
        return args, kwargs


def checkpoint_with_features(checkpoint: Callable[..., Any], function: partial, *args: Any) -> Any:
    """Run a layer under gradient checkpointing with the image features among its arguments.

    Reentrant checkpointing hands gradients back through arguments alone, and the features come from trained parts.

    Args:
        checkpoint: the checkpointing function. function: the layer with its keyword arguments. args: the others.
    """
    inputs = function.keywords.get(INPUTS_KEYWORD)
    if inputs is None:
        return checkpoint(function, *args)

    def run(features_IME: Tensor, *args: Any) -> Any:
        return function(*args, **{INPUTS_KEYWORD: replace(inputs, features_IME=features_IME)})

    return checkpoint(run, inputs.features_IME, *args)

"""What a model attended to while it read a prompt and gave an answer, recorded from the forward pass itself.

Shape suffixes: I images, V views, R rows and C columns of the encoder's grid, H heads, Q queries of a group, G query
groups, K images of the row, P un-pooled patches of an image, T tokens, L layers, A answer tokens, N visual tokens,
M visual tokens of a view, W patches of a window.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model.compressors import ImageFeatures
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from .maps import join_windows, spread_windows

READABLE_ATTENTION = "eager"  # the implementation of transformers that hands out its weights


@dataclass(frozen=True)
class AttentionMaps:
    """Weights of one turn; all arrays float32, None where the model has no such part.

    Attributes:
        pooling_IVRC: SAP's weight of each patch; those of a window sum to 1.
        image_HQIVRC: EmbQ's attention from the turn's queries to the patches of all images; sums to 1 over I, V, R, C.
        question_HQT: EmbQ's attention from the queries to the tokens of the question; sums to 1 over T.
        decoder_LHAN: the language model's attention, from the positions that predict the answer's tokens to the visual
            tokens of all images, in reading order; what is missing to 1 went to other tokens.
        decoder_AIVRC: its mean over layers and heads, laid on the grid.
        question_ids: tokens of the question.
        answer_ids: tokens of the answer.
        log_probabilities_A: of the answer's tokens.
    """

    pooling_IVRC: np.ndarray | None
    image_HQIVRC: np.ndarray | None
    question_HQT: np.ndarray | None
    decoder_LHAN: np.ndarray
    decoder_AIVRC: np.ndarray
    question_ids: list[int]
    answer_ids: list[int]
    log_probabilities_A: np.ndarray


def with_readable_attention(model: FlashSlothForConditionalGeneration) -> FlashSlothForConditionalGeneration:
    """A second model over the same weights whose decoder can tell its attention; the first is left as it is.

    No weight is copied. The encoder, which tells nothing here, is shared.
    """
    shared: dict[int, Any] = {id(tower := model.model.vision_tower): tower}
    for tensor in (*model.parameters(), *model.buffers()):
        shared[id(tensor)] = tensor
    for module in model.modules():
        # weights that are no parameters, such as those packed for a processor
        shared |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
        # methods of what watches the model, which is no part of it
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        shared |= {id(hook): hook for hook in hooks if inspect.ismethod(hook)}
    twin = copy.deepcopy(model, shared)
    twin.model.language_model.set_attn_implementation(READABLE_ATTENTION)
    return twin


@contextmanager
def _recording(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Weights that a module hands to `on_weights`; nothing of a module that does not."""
    kept: list[Tensor] = []
    if not hasattr(module, "on_weights"):
        yield kept
        return
    module.on_weights = kept.append
    try:
        yield kept
    finally:
        module.on_weights = None


@torch.inference_mode()
def attention_maps(
    model: FlashSlothForConditionalGeneration,
    features_IPE: Tensor,
    token_counts: Sequence[int] | None,
    inputs: dict[str, Any],
    prompt_tokens: int,
) -> AttentionMaps:
    """Read a prompt and its answer once more, and note what attends to what.

    Args:
        model: as `with_readable_attention` makes it, used by one thread at a time.
        features_IPE: un-pooled features of the row's images, of which there is at least one.
        token_counts: visual tokens of each image; None for the model's number.
        inputs: of one row, prompt and answer together, on the model's device; the prompt ends with the last turn's
            question and its queries.
        prompt_tokens: of the row.
    """
    base, config = model.model, model.config
    counts = [config.num_image_tokens] * len(features_IPE) if token_counts is None else list(token_counts)
    grid = (config.grid_height, config.grid_width)
    with _recording(base.compressor) as pooling:
        compressed = _compress_one_by_one(model, features_IPE, token_counts)
    windows = [config.effective_window if token_counts is None else config.window_of(count) for count in counts]
    pooling_IVRC = None
    if pooling:
        maps = [join_windows(_array(own), window, grid) for own, window in zip(pooling, windows, strict=True)]
        pooling_IVRC = np.stack(maps)

    ids_1T = inputs["input_ids"]
    embedded_query = base.embedded_query
    with (
        _recording(getattr(embedded_query, "image_attention", None)) as image,
        _recording(getattr(embedded_query, "text_attention", None)) as question,
    ):
        # the last position predicts what nobody asks for
        read = model(
            **inputs,
            image_features=compressed,
            use_cache=False,
            output_attentions=True,
            logits_to_keep=ids_1T.shape[1] - prompt_tokens + 1,
        )
    answer_ids_A = ids_1T[0, prompt_tokens:]
    log_probabilities_AV = read.logits[0, :-1].float().log_softmax(dim=-1)
    log_probabilities_A = log_probabilities_AV.gather(1, answer_ids_A[:, None])[:, 0]

    index_N = (ids_1T[0] == config.image_token_id).nonzero().flatten()
    predicting = slice(prompt_tokens - 1, -1)
    decoder_LHAN = np.stack([_array(own[0][:, predicting, index_N.to(own.device)]) for own in read.attentions])
    tokens_AN = decoder_LHAN.mean(axis=(0, 1))
    parts_AIVRC, start = [], 0
    for count, window in zip(counts, windows, strict=True):
        own_AVM = tokens_AN[:, start : start + count].reshape(len(tokens_AN), config.num_views, -1)
        parts_AIVRC.append(np.stack([spread_windows(own_VM, window, grid) for own_VM in own_AVM]))
        start += count
    queries = slice(-config.num_query_tokens, None) if config.num_query_tokens else slice(0)
    asked_T = torch.zeros(0, dtype=torch.long)
    question_ids_1T = inputs.get("question_ids")
    if question_ids_1T is not None and int(question_ids_1T.max()) > 0:
        asked_T = (question_ids_1T[0] == question_ids_1T.max()).nonzero().flatten()
    return AttentionMaps(
        pooling_IVRC=pooling_IVRC,
        image_HQIVRC=(
            _array(image[0][0][:, queries]).reshape(-1, config.num_query_tokens, len(counts), config.num_views, *grid)
            if image
            else None
        ),
        question_HQT=_array(question[0][0][:, queries][:, :, asked_T]) if question else None,
        decoder_LHAN=decoder_LHAN,
        decoder_AIVRC=np.stack(parts_AIVRC, axis=1).astype(np.float32),
        question_ids=ids_1T[0, asked_T].tolist(),
        answer_ids=answer_ids_A.tolist(),
        log_probabilities_A=_array(log_probabilities_A),
    )


def _compress_one_by_one(
    model: FlashSlothForConditionalGeneration, features_IPE: Tensor, token_counts: Sequence[int] | None
) -> ImageFeatures:
    """As `compress_images`, in as many calls of the compressor as there are images."""
    counts = [None] * len(features_IPE) if token_counts is None else list(token_counts)
    tokens = [model.model.compress(own_PE[None], count)[0] for own_PE, count in zip(features_IPE, counts, strict=True)]
    tokens_IND = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    counts_I = None if token_counts is None else torch.tensor(counts)
    return ImageFeatures(last_hidden_state=features_IPE, pooler_output=tokens_IND, token_counts=counts_I)


def _array(weights: Tensor) -> np.ndarray:
    return weights.float().cpu().numpy()

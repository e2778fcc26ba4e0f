"""Answers of one call of `generate`: kept to their form, cut from its output, and their probability.

Shape suffixes: B rows, T tokens, V vocabulary, N choices, L tokens of the longest choice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode

from ..model.backbones import CACHE_ARGUMENT
from ..model.compressors import ImageFeatures
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from .runtime import Runtime
from .structured import AnswerForm, FormProcessor, Grammar, compile_form

ROWS_AT_ONCE = 64  # choices of all rows that are scored in one forward pass


class Guide:
    """Makes the answers of one call of `generate` have a form, and notes how probable they are.

    Args:
        session: the model and its processor.
        form: what is asked for.
        generation_config: of the call.
        generation: further arguments of the call.

    Raises:
        ValueError: as `compile_form`; a form or confidence together with beams or an assistant.
        ImportError: as `compile_form`.
    """

    def __init__(
        self, session: Runtime, form: AnswerForm, generation_config: GenerationConfig, generation: dict[str, Any]
    ) -> None:
        self.session, self.form, self.config = session, form, generation_config
        self.grammar: Grammar | None = None
        self._processor: FormProcessor | None = None
        self._probabilities: _TokenProbabilities | None = None
        mode = generation_config.get_generation_mode(generation.get("assistant_model"))
        plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if not plain and (form.confidence or not form.is_free):
            raise ValueError(
                f"schema, choices, regex and confidence go with greedy search and sampling, not with {mode.value}; "
                "leave out num_beams, assistants and prompt lookup"
            )
        if not form.is_free:
            self.grammar = compile_form(form, session.processor, generation_config)
            self._processor = FormProcessor(self.grammar)
        if form.confidence and form.choices is None:
            self._probabilities = _TokenProbabilities()

    def logits_processors(self, others: Iterable[LogitsProcessor] = ()) -> LogitsProcessorList:
        """Those of the call; the form comes last."""
        own = [each for each in (self._processor, self._probabilities) if each is not None]
        return LogitsProcessorList([*others, *own])

    def stopping_criteria(self, others: Iterable[StoppingCriteria] = ()) -> StoppingCriteriaList:
        """Those of the call; a row also ends as soon as its form is complete and cannot go on."""
        own = [] if self._processor is None else [_FormIsDone(self._processor)]
        return StoppingCriteriaList([*others, *own])

    def lengths(self, ids_BT: Tensor) -> list[int]:
        """Tokens of each answer, the end of the sequence included; shorter rows are padded behind it."""
        if self._processor is not None:
            return [state.tokens for state in self._processor.states]
        return [answer_length(ids_T, self.config.eos_token_id) for ids_T in ids_BT]

    def texts(self, ids_BT: Tensor) -> list[str]:
        """The answers as text, without special tokens."""
        tokenizer = self.session.processor.tokenizer
        if self.grammar is None:
            return [text.strip() for text in tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]
        rows = [ids_T[:length] for ids_T, length in zip(ids_BT, self.lengths(ids_BT), strict=True)]
        # blanks inside the form are its own
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.removeprefix(self.grammar.lead) for text in texts]

    def problems(self, rows: int) -> list[str | None]:
        """For each answer what is wrong with it: that it was cut before its form was complete."""
        if self._processor is None:
            return [None] * rows
        return [
            None
            if state.complete
            else f"the answer was cut after {state.tokens} tokens, before the {state.grammar.kind} was complete; "
            "raise max_new_tokens, or bound what is asked for (maxLength, maxItems, additionalProperties: false)"
            for state in self._processor.states
        ]

    def confidences(
        self, ids_BT: Tensor, texts: Sequence[str], inputs: dict[str, Any], features: ImageFeatures | None
    ) -> list[float | None]:
        """The probability of each answer, None where it was not asked for.

        Of choices: the probability that the model gives to the tokens of the chosen one and to the end after them,
        divided by the sum of the same over all choices. Answers choose token by token, so that in rare cases another
        choice has more. It takes one more pass over the prompt and the choices.

        Of other answers: the product of the probabilities of their tokens and of their end, at temperature 1. What the
        form or the settings of generation rule out has none, so that what a form leaves no choice about counts as 1.

        Args:
            ids_BT: what was generated.
            texts: the answers, as `texts` gives them.
            inputs: of the model, without images; a row an answer.
            features: of the images.
        """
        if not self.form.confidence:
            return [None] * len(texts)
        if self.grammar is not None and self.grammar.choices is not None:
            assert self.form.choices is not None
            ends = self.grammar.end_ids
            scores_BN = score_choices(self.session.model, inputs, features, self.grammar.choices, ends)
            probabilities_BN = scores_BN.softmax(dim=1)
            probabilities_BN = probabilities_BN.repeat_interleave(len(texts) // len(probabilities_BN), dim=0)
            by_text = [dict(zip(self.form.choices, row.tolist(), strict=True)) for row in probabilities_BN]
            return [row.get(text) for row, text in zip(by_text, texts, strict=True)]  # none of an answer that was cut
        assert self._probabilities is not None
        return self._probabilities.products(ids_BT, self.lengths(ids_BT))


def answer_length(ids_T: Tensor, end_of_sequence: int | Sequence[int] | None) -> int:
    """Tokens up to the end of the sequence, which is one of them; all where there is none."""
    ends = torch.isin(ids_T, torch.as_tensor([] if end_of_sequence is None else end_of_sequence).to(ids_T))
    return int(ends.nonzero()[0]) + 1 if ends.any() else len(ids_T)


class _FormIsDone(StoppingCriteria):
    def __init__(self, processor: FormProcessor) -> None:
        self.processor = processor

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.processor.follow(input_ids)
        return torch.tensor([state.done for state in self.processor.states], device=input_ids.device)


class _TokenProbabilities(LogitsProcessor):
    """Notes the probability of every token that is generated; changes nothing."""

    def __init__(self) -> None:
        self._last_BV: Tensor | None = None
        self._chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note(input_ids[:, -1])
        self._last_BV = scores.float().log_softmax(dim=-1)
        return scores

    def _note(self, token_B: Tensor) -> None:
        if self._last_BV is not None:
            self._chosen.append(self._last_BV.gather(1, token_B[:, None])[:, 0])

    def products(self, ids_BT: Tensor, lengths: Sequence[int]) -> list[float | None]:
        """Over the first tokens of each row."""
        self._note(ids_BT[:, -1])
        self._last_BV = None
        chosen_BT = torch.stack(self._chosen, dim=1).double()
        return [float(row_T[:length].sum().exp()) for row_T, length in zip(chosen_BT, lengths, strict=True)]


@torch.inference_mode()
def score_choices(
    model: FlashSlothForConditionalGeneration,
    inputs: dict[str, Any],
    features: ImageFeatures | None,
    choices: Sequence[Sequence[int]],
    end_ids: frozenset[int],
) -> Tensor:
    """The logarithm of the probability of each choice and the end after it, given the prompt: (B, N) float32.

    Args:
        model: in evaluation mode.
        inputs: prompts as the processor makes them, padded on the left, on the model's device.
        features: of their images.
        choices: tokens of each.
        end_ids: tokens that end a sequence; the probabilities of several are added.
    """
    ids_BT = inputs["input_ids"]
    mask_BT = inputs.get("attention_mask")
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    prompt = {**inputs, "attention_mask": mask_BT, "position_ids": positions_BT, "image_features": features}
    read = model(**prompt, use_cache=True, logits_to_keep=1)
    first_BV = read.logits[:, -1].float().log_softmax(dim=-1)
    return score_continuations(model, read[CACHE_ARGUMENT], first_BV, mask_BT, positions_BT[:, -1:], choices, end_ids)


@torch.inference_mode()
def score_continuations(
    model: FlashSlothForConditionalGeneration,
    read: Cache,
    first_BV: Tensor,
    mask_BT: Tensor,
    positions_B1: Tensor,
    choices: Sequence[Sequence[int]],
    end_ids: frozenset[int],
) -> Tensor:
    """As `score_choices`, after prompts that were read.

    Args:
        model: in evaluation mode.
        read: keys and values of the prompts, which this changes.
        first_BV: logarithms of the probabilities of what follows them.
        mask_BT: attention mask of the prompts.
        positions_B1: of their last tokens.
        choices: tokens of each.
        end_ids: tokens that end a sequence.
    """
    ends = torch.tensor(sorted(end_ids), device=first_BV.device)
    rows = len(first_BV)
    step = max(1, ROWS_AT_ONCE // rows)
    scores = []
    for start in range(0, len(choices), step):
        some = choices[start : start + step]
        longest = max(map(len, some))
        padded_NL = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in some], device=first_BV.device)
        lengths_N = torch.tensor([len(ids) for ids in some], device=first_BV.device)
        cache = copy.deepcopy(read) if start + step < len(choices) else read
        cache.batch_repeat_interleave(len(some))
        mask_RT = functional.pad(mask_BT.repeat_interleave(len(some), dim=0), (0, longest), value=1)
        offsets_L = torch.arange(1, longest + 1, device=first_BV.device)
        output = model(
            input_ids=padded_NL.repeat(rows, 1),
            attention_mask=mask_RT,
            position_ids=positions_B1.repeat_interleave(len(some), dim=0) + offsets_L,
            use_cache=True,
            **{CACHE_ARGUMENT: cache},
        )
        log_BNLV = output.logits.float().log_softmax(dim=-1).unflatten(0, (rows, len(some)))
        inner_BNL = log_BNLV[:, :, :-1].gather(3, padded_NL[None, :, 1:, None].expand(rows, -1, -1, -1))[..., 0]
        is_token_NL = torch.arange(1, longest, device=first_BV.device) < lengths_N[:, None]
        end_BNL = log_BNLV[..., ends].logsumexp(dim=-1)
        end_BN = end_BNL.gather(2, (lengths_N - 1)[None, :, None].expand(rows, -1, -1))[..., 0]
        scores.append(first_BV[:, padded_NL[:, 0]] + inner_BNL.masked_fill(~is_token_NL, 0).sum(dim=2) + end_BN)
    return torch.cat(scores, dim=1)

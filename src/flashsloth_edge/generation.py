"""From logits to tokens: greedy and sampled choice, and the loop over the steps of an answer.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .engines import Engine
from .manifest import Generation


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        do_sample: draw; otherwise the most probable token is taken, and the next four say nothing.
        temperature: divides the logits. top_k: draw among so many, 0 for all. top_p: draw among the fewest tokens that
            have this probability together. seed: of the draws; None for another at every call.
        repetition_penalty: divides positive logits of tokens that the row has, and multiplies negative ones.
        min_new_tokens: the end is not chosen before.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError(
                f"temperature ({self.temperature}) and repetition_penalty ({self.repetition_penalty}) must be above "
                f"0, top_k ({self.top_k}) at least 0 and top_p ({self.top_p}) above 0 and at most 1"
            )

    @staticmethod
    def of(settings: Generation, options: Mapping[str, Any]) -> Sampling:
        """The model's own settings with those of a question.

        Raises:
            ValueError: an option that does not exist.
        """
        own = Sampling(
            do_sample=settings.do_sample,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
        )
        known = [field.name for field in fields(Sampling)]
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"the exported model does not know {', '.join(unknown)}; known are {', '.join(known)}")
        return replace(own, **options)


class Chooser:
    """Chooses the next token of every row of one answer."""

    def __init__(self, settings: Generation, sampling: Sampling, rows_of_ids: Sequence[Sequence[int]]) -> None:
        self.settings, self.sampling = settings, sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = [set(ids) for ids in rows_of_ids]
        self._steps = 0

    def __call__(self, logits_BV: np.ndarray) -> list[int]:
        """Ids of the next tokens; the logits are not kept."""
        sampling = self.sampling
        logits_BV = np.array(logits_BV, dtype=np.float32)
        if sampling.repetition_penalty != 1.0:
            for logits_V, seen in zip(logits_BV, self._seen, strict=True):
                ids = np.fromiter(seen, dtype=np.int64, count=len(seen))
                values = logits_V[ids]
                penalty = sampling.repetition_penalty
                logits_V[ids] = np.where(values < 0, values * penalty, values / penalty)
        if self._steps < sampling.min_new_tokens:
            logits_BV[:, self.settings.eos_token_ids] = -np.inf
        logits_BV[:, self.settings.suppress_tokens] = -np.inf
        chosen = self._draw(logits_BV) if sampling.do_sample else logits_BV.argmax(axis=-1).tolist()
        for seen, token in zip(self._seen, chosen, strict=True):
            seen.add(token)
        self._steps += 1
        return chosen

    def _draw(self, logits_BV: np.ndarray) -> list[int]:
        sampling = self.sampling
        logits_BV = logits_BV.astype(np.float64) / sampling.temperature
        order_BV = np.argsort(-logits_BV, axis=-1, kind="stable")
        sorted_BV = np.take_along_axis(logits_BV, order_BV, axis=-1)
        if sampling.top_k:
            # as many as are equal to the last of them stay
            last_B1 = sorted_BV[:, [min(sampling.top_k, sorted_BV.shape[1]) - 1]]
            sorted_BV = np.where(sorted_BV < last_B1, -np.inf, sorted_BV)
        weights_BV = np.exp(sorted_BV - sorted_BV[:, :1])
        weights_BV /= weights_BV.sum(axis=-1, keepdims=True)
        before_BV = weights_BV.cumsum(axis=-1) - weights_BV
        # the first token is always kept
        weights_BV = np.where((before_BV < sampling.top_p) | (before_BV == 0), weights_BV, 0.0)
        ends_BV = weights_BV.cumsum(axis=-1)
        draws_B1 = self._random.random((len(ends_BV), 1)) * ends_BV[:, -1:]
        places_B = np.minimum((ends_BV <= draws_B1).sum(axis=-1), (weights_BV > 0).sum(axis=-1) - 1)
        return np.take_along_axis(order_BV, places_B[:, None], axis=-1)[:, 0].tolist()


@dataclass
class Generated:
    """New tokens of every row, the end of the sequence included, and the cache of all tokens but the last.

    Attributes:
        prefill, decode: seconds to the first new token, and after it.
    """

    ids: list[list[int]]
    cache: Any
    prefill: float
    decode: float


def generate(
    engine: Engine,
    settings: Generation,
    prompt: Mapping[str, np.ndarray],
    images: Mapping[str, np.ndarray],
    cache: Any,
    limit: int,
    sampling: Sampling,
    on_tokens: Callable[[list[int]], bool] | None = None,
) -> Generated:
    """Run a prompt and the steps of its answers.

    Args:
        prompt: arrays of `Prompts.encode`, of the whole rows.
        images: `engines.select_tokens`, or the engine's `no_images`.
        cache: of the beginning of the rows, which is not run again.
        limit: most new tokens.
        on_tokens: called with the new token of every row; the answer ends where it returns False.
    """
    started = time.perf_counter()
    rows = len(prompt["input_ids"])
    past = cache.length
    inputs = {**prompt, **images, "input_ids": prompt["input_ids"][:, past:]}
    choose = Chooser(settings, sampling, prompt["input_ids"].tolist())
    logits_BV, cache = engine.decode(inputs, cache)
    ids: list[list[int]] = [[] for _ in range(rows)]
    done = [False] * rows
    nothing_B0 = np.zeros((rows, 0), dtype=np.int64)
    mask_BT = prompt["attention_mask"]
    step = {**engine.no_images, "image_positions": nothing_B0, "query_positions": nothing_B0}
    first: float | None = None
    while True:
        tokens = choose(logits_BV)
        for row, token in enumerate(tokens):
            if not done[row]:
                ids[row].append(token)
                done[row] = token in settings.eos_token_ids
        if first is None:
            first = time.perf_counter()
        goes_on = on_tokens is None or on_tokens(tokens)
        if all(done) or not goes_on or max(map(len, ids)) >= limit:
            break
        mask_BT = np.concatenate([mask_BT, np.ones((rows, 1), dtype=np.int64)], axis=1)
        tokens = [settings.pad_token_id if ended else token for token, ended in zip(tokens, done, strict=True)]
        ids_B1 = np.array(tokens, dtype=np.int64)[:, None]
        inputs = {**step, "input_ids": ids_B1, "attention_mask": mask_BT, "question_ids": np.zeros_like(ids_B1)}
        logits_BV, cache = engine.decode(inputs, cache)
    return Generated(ids, cache, first - started, time.perf_counter() - first)

"""vLLM's scheduler, with questions left whole.

The embedded query module reads a turn's question when it runs the turn's queries. So no step ends, and no prefix that
is taken from the cache ends, between a question's first token and its last query token. Anywhere else a prompt may be
cut: chunked prefill and prefix caching stay exact.
"""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from . import TURN


def whole_spans(request: Request) -> list[tuple[int, int]]:
    """(first, end) of each question with its queries, where the turn sees an image; in order."""
    spans = []
    for feature in request.mm_features:
        if feature.modality == TURN and feature.data is not None and len(feature.data["image_digests"].data):
            position = feature.mm_position
            spans.append((position.offset - len(feature.data["is_question"].data), position.offset + position.length))
    return spans


def cut_before(request: Request, end: int) -> int:
    """The last place up to `end` where the prompt may be cut."""
    for first, last in reversed(whole_spans(request)):
        if first < end < last:
            end = first
    return end


class _Beginning:
    """A request as the cache sees it when it must not look beyond a length."""

    def __init__(self, request: Request, length: int) -> None:
        self._request = request
        self.num_tokens = length + 1  # the cache leaves one token to be computed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class _WholeQuestions(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._find_computed_blocks = self.kv_cache_manager.get_computed_blocks
        self.kv_cache_manager.get_computed_blocks = self._whole_computed_blocks

    def _whole_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        found = self._find_computed_blocks(request)
        while (length := cut_before(request, found[1])) < found[1]:
            found = self._find_computed_blocks(_Beginning(request, length))
        return found

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        while True:
            end = cut_before(request, num_computed_tokens + num_new_tokens)
            found = super()._try_schedule_encoder_inputs(
                request,
                num_computed_tokens,
                max(0, end - num_computed_tokens),
                encoder_compute_budget,
                shift_computed_tokens,
            )
            num_new_tokens = found[1]
            # room for encoded images may have shortened it again
            if cut_before(request, num_computed_tokens + num_new_tokens) == num_computed_tokens + num_new_tokens:
                return found


class WholeQuestionsScheduler(_WholeQuestions):
    """Of synchronous steps."""


class WholeQuestionsAsyncScheduler(_WholeQuestions, AsyncScheduler):
    """Of steps that are scheduled while the one before them runs."""


def make_scheduler(*args: Any, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """vLLM decides late which of the two it needs."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler = WholeQuestionsAsyncScheduler if is_async else WholeQuestionsScheduler
    return scheduler(*args, vllm_config=vllm_config, **kwargs)

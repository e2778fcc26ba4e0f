"""The built-in engine: one thread owns the model and answers many requests at once.

Requests join the batch and leave it between two steps. Every row has its own tokens, generator and end, so that an
answer does not depend on what else is in the batch, up to the rounding of products of another size.

Shape suffixes: B rows, V vocabulary; 1 a single row.
"""

import collections
import logging
import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..inference.guide import score_continuations
from ..inference.runtime import refuse_after_fork
from ..inference.session import FlashSloth
from ..inference.structured import Grammar
from ..model.backbones import CACHE_ARGUMENT
from .answers import AnswerText, Choice, Choosing, TokenTexts
from .batch import RunningCache, check_layers, prompt_cache
from .prefill import Prefill, PrefilledPrompts
from .prompts import Preparation, Prompt, answer_key
from .requests import Finished, FinishReason, Overloaded, Request, Usage
from .tickets import Ticket

logger = logging.getLogger(__name__)

STAGES = ("queue", "preprocess", "encode", "compress", "prefill", "decode")
RECENT_ANSWERS = 32  # whose time says how soon there will be room


@dataclass(frozen=True)
class EngineSettings:
    """How much an engine takes on.

    Attributes:
        max_batch_size: rows that are answered together.
        max_batch_tokens: rows times the longest of them, prompt and answer at their longest.
        max_prefill_tokens: prompts that are run between two steps, times the longest of them; one is always run.
        max_queue: requests that wait, those in preparation included.
        feature_cache_bytes: of encoded images.
        prefix_cache_bytes: of keys and values of earlier turns.
    """

    max_batch_size: int = 64
    max_batch_tokens: int = 32_768
    max_prefill_tokens: int = 2_048
    max_queue: int = 256
    feature_cache_bytes: int = 256 * 2**20
    prefix_cache_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name, least in (
            ("max_batch_size", 1),
            ("max_batch_tokens", 2),
            ("max_prefill_tokens", 1),
            ("max_queue", 1),
            ("feature_cache_bytes", 0),
            ("prefix_cache_bytes", 0),
        ):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class EngineStatistics:
    """What an engine has done so far and holds now.

    Attributes:
        waiting, running: requests, those in preparation among the waiting.
        prompts, prompt_tokens, reused_tokens, answer_tokens, steps: so far.
        embedded_query_prompts: prompts for which the embedded query module ran, once each.
        feature_hits, feature_misses: images found encoded, and not.
        feature_bytes, prefix_bytes, batch_bytes: memory held now.
    """

    waiting: int
    running: int
    prompts: int
    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int
    steps: int
    embedded_query_prompts: int
    feature_hits: int
    feature_misses: int
    feature_bytes: int
    prefix_bytes: int
    batch_bytes: int


@dataclass(eq=False)
class _Row:
    """A request on its way."""

    prompt: Prompt
    ticket: Ticket
    choice: Choice
    text: AnswerText
    top_logprobs: int | None
    form: Grammar | None
    submitted: float
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    first_token: float | None = None
    choices: dict[tuple[int, ...], float] | None = None  # their probabilities, where confidence is asked for

    @property
    def longest(self) -> int:
        """Tokens that it may come to."""
        return self.prompt.tokens + self.prompt.limit


class Engine:
    """Answers requests of many threads with one model, which must not be asked otherwise while the engine runs.

    Args:
        session: the loaded model.
        settings: how much at once.

    Raises:
        ValueError: a language model that keeps something else than keys and values.
    """

    def __init__(self, session: FlashSloth, settings: EngineSettings | None = None) -> None:
        check_layers(session.config.text_config)
        if session.compile_config is not None:
            warnings.warn(
                "the server compiles the encoder only: steps of changing batches run as they are", stacklevel=2
            )
        self.session, self.settings = session, settings or EngineSettings()
        self._prepare = Preparation(session, self.settings.max_batch_tokens)
        self._choosing = Choosing(session)
        self._texts = TokenTexts(session.processor.tokenizer)
        self._prefill = Prefill(session, self.settings.feature_cache_bytes, self.settings.prefix_cache_bytes)
        self._changed = threading.Condition()
        # guarded by it
        self._waiting: collections.deque[_Row] = collections.deque()
        self._preparing = 0
        self._active = 0  # taken from the queue and not finished
        self._accepts = False
        self._ends = False
        self._thread: threading.Thread | None = None
        # of the engine's thread alone
        self._joining: list[_Row] = []  # taken from the queue, but not in the batch
        self._rows: list[_Row] = []
        self._cache = RunningCache(self.settings.max_batch_size)
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT_ANSWERS)
        self._prompts = self._prompt_tokens = self._answer_tokens = self._steps = 0

    def start(self) -> None:
        """Begin to answer; an engine is started once."""
        refuse_after_fork()
        assert self._thread is None, "an engine is started once"
        self._accepts = True
        self._thread = threading.Thread(target=self._run, name="flashsloth-engine", daemon=True)
        self._thread.start()

    @property
    def is_accepting(self) -> bool:
        """Whether requests are taken: from `start` to `drain` or `stop`."""
        return self._accepts and self._thread is not None and self._thread.is_alive()

    def submit(self, request: Request, on_event: Callable[[], None] | None = None) -> Ticket:
        """Prepare a request in the calling thread, and queue it.

        Args:
            request: what to answer. A `max_tokens` beyond the context ends there, as "length".
            on_event: see `Ticket`.

        Raises:
            Overloaded: the queue is full, or the engine does not run.
            ValueError, OSError: a request that cannot be answered as it asks.
        """
        submitted = time.perf_counter()
        with self._changed:
            if not self.is_accepting:
                raise Overloaded(self._retry_after(), is_stopping=True)
            if len(self._waiting) + self._preparing >= self.settings.max_queue:
                raise Overloaded(self._retry_after())
            self._preparing += 1
        try:
            row = self._make_row(request, Ticket(on_event), submitted)
        except BaseException:
            with self._changed:
                self._preparing -= 1
                self._changed.notify_all()
            raise
        with self._changed:
            self._preparing -= 1
            has_ended = self._ends
            if not has_ended:
                self._waiting.append(row)
            self._changed.notify_all()
        if has_ended:
            raise Overloaded(self._retry_after(), is_stopping=True)
        return row.ticket

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and answer those there are; whether that was done within `timeout` seconds."""
        with self._changed:
            self._accepts = False
            return self._changed.wait_for(lambda: not (self._waiting or self._preparing or self._active), timeout)

    def stop(self) -> None:
        """Cancel what is left and end the thread."""
        with self._changed:
            self._accepts = False
            self._ends = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._prefill.stop_counting()

    def statistics(self) -> EngineStatistics:
        """Numbers for whoever watches."""
        prefill = self._prefill
        return EngineStatistics(
            waiting=len(self._waiting) + self._preparing,
            running=self._active,
            prompts=self._prompts,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=prefill.reused_tokens,
            answer_tokens=self._answer_tokens,
            steps=self._steps,
            embedded_query_prompts=prefill.embedded_query_prompts,
            feature_hits=prefill.features.hits,
            feature_misses=prefill.features.misses,
            feature_bytes=prefill.features.nbytes,
            prefix_bytes=prefill.prefixes.nbytes,
            batch_bytes=self._cache.nbytes,
        )

    def _make_row(self, request: Request, ticket: Ticket, submitted: float) -> _Row:
        prompt, sampling = self._prepare(request), request.sampling
        return _Row(
            prompt=prompt,
            ticket=ticket,
            choice=self._choosing.choice(sampling, prompt.tokens),
            text=AnswerText(self._texts, sampling.stop),
            top_logprobs=sampling.top_logprobs,
            form=sampling.grammar,
            submitted=submitted,
            seconds=dict.fromkeys(STAGES, 0.0) | {"preprocess": prompt.seconds},
        )

    def _retry_after(self) -> float:
        recent = list(self._recent)
        mean = sum(recent) / len(recent) if recent else 0.0
        return max(1.0, mean * len(self._waiting) / self.settings.max_batch_size)

    @torch.inference_mode()
    def _run(self) -> None:
        self._prefill.start_counting()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._rows or self._ends)
                if self._ends:
                    break
            try:
                self._step()
            except Exception as error:  # handed to those it concerns; the engine goes on
                logger.exception("a step of the engine failed, and with it the requests in its batch")
                self._cache.clear()
                rows, self._rows, self._joining = [*self._rows, *self._joining], [], []
                for row in rows:
                    self._end(row, error)
        with self._changed:
            waiting, self._active = list(self._waiting), self._active + len(self._waiting)
            self._waiting.clear()
        for row in [*self._rows, *waiting]:
            self._finish(row, "cancelled")
        self._rows = []

    def _step(self) -> None:
        """Let requests leave and join, then one more token for every row."""
        self._leave([(index, "cancelled") for index, row in enumerate(self._rows) if row.ticket.is_cancelled])
        self._joining = joining = self._take()
        for group in self._prefill.groups([row.prompt for row in joining]) if joining else []:
            self._join([joining[index] for index in group])
        if self._rows:
            mask_BT, positions_B1 = self._cache.next_inputs(self.session.device)
            ids_B1 = torch.tensor([row.tokens[-1:] for row in self._rows], device=self.session.device)
            output = self.session.model(
                input_ids=ids_B1,
                attention_mask=mask_BT,
                position_ids=positions_B1,
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_ARGUMENT: self._cache},
            )
            self._cache.advance()
            self._steps += 1
            self._accept(0, output.logits[:, -1])

    def _take(self) -> list[_Row]:
        """Requests from the head of the queue, as many as the budgets let in."""
        settings, taken, cancelled = self.settings, [], []
        rows, longest, longest_prompt = len(self._rows), max((row.longest for row in self._rows), default=0), 0
        with self._changed:
            for row in [row for row in self._waiting if row.ticket.is_cancelled]:
                self._waiting.remove(row)
                cancelled.append(row)
            while self._waiting and rows < settings.max_batch_size:
                row = self._waiting[0]
                longest, longest_prompt = max(longest, row.longest), max(longest_prompt, row.prompt.tokens)
                if rows and (rows + 1) * longest > settings.max_batch_tokens:
                    break
                if taken and (len(taken) + 1) * longest_prompt > settings.max_prefill_tokens:
                    break
                taken.append(self._waiting.popleft())
                rows += 1
            self._active += len(taken) + len(cancelled)
        for row in cancelled:
            self._finish(row, "cancelled")
        now = time.perf_counter()
        for row in taken:
            row.seconds["queue"] = now - row.submitted - row.prompt.seconds
        return taken

    def _join(self, rows: list[_Row]) -> None:
        """Run prompts and take them into the batch. One that fails is left out, and the others run one by one."""
        try:
            prefilled = self._prefill.run([row.prompt for row in rows])
        except Exception as error:  # handed to the one it concerns
            if len(rows) == 1:
                self._joining.remove(rows[0])
                self._end(rows[0], error)
                return
            for row in rows:
                self._join([row])
            return
        self._admit(rows, prefilled)

    def _admit(self, rows: list[_Row], prefilled: PrefilledPrompts) -> None:
        first = len(self._rows)
        self._rows += rows
        self._joining = [row for row in self._joining if row not in rows]
        for row in rows:
            row.seconds |= prefilled.seconds
            row.cached_tokens = prefilled.cached_tokens
            row.prompt.pixels.clear()
            self._prompts += 1
            self._prompt_tokens += row.prompt.tokens
        self._cache.join(prefilled.cache, [row.prompt.tokens for row in rows])
        for index, row in enumerate(rows):
            if row.choice.notes_probability and row.form is not None and row.form.choices is not None:
                self._weigh(first + index, row.form, prefilled.logits_BV[index : index + 1])
        self._accept(first, prefilled.logits_BV)

    def _weigh(self, index: int, form: Grammar, logits_1V: Tensor) -> None:
        """Note the probabilities of the choices of a row whose prompt was just read."""
        row, choices = self._rows[index], form.choices or ()
        tokens = row.prompt.tokens
        mask_1T = torch.ones(1, tokens, dtype=torch.long, device=logits_1V.device)
        scores_1N = score_continuations(
            self.session.model,
            prompt_cache(self._cache.row(index), tokens),
            logits_1V.float().log_softmax(dim=-1),
            mask_1T,
            mask_1T[:, -1:] * (tokens - 1),
            choices,
            form.end_ids,
        )
        row.choices = dict(zip(choices, scores_1N.softmax(dim=1)[0].tolist(), strict=True))

    def _confidence(self, row: _Row) -> float | None:
        if not row.choice.notes_probability:
            return None
        if row.choices is None:
            return math.exp(row.choice.log_probability)
        ends = self._choosing.end_tokens
        return row.choices.get(tuple(token for token in row.tokens if token not in ends))

    def _accept(self, first: int, logits_BV: Tensor) -> None:
        """One token for every row from `first` on; those that end with it leave."""
        logits_BV = logits_BV.float()
        likeliest = self._choosing.likeliest(logits_BV)
        now = time.perf_counter()
        leaving: list[tuple[int, FinishReason | Exception]] = []
        for index, (row, token) in enumerate(zip(self._rows[first:], likeliest, strict=True)):
            row.first_token = row.first_token or now
            try:
                reason = self._accept_token(row, token, logits_BV[index : index + 1])
            except Exception as error:  # of one request's own grammar or sampling
                leaving.append((first + index, error))
                continue
            if reason is not None:
                leaving.append((first + index, reason))
        self._leave(leaving)

    def _accept_token(self, row: _Row, likeliest: int, logits_1V: Tensor) -> FinishReason | None:
        """Why the answer ends, if it does."""
        choice = row.choice
        token = likeliest if choice.is_plain else choice.choose(logits_1V, [*row.prompt.ids, *row.tokens])
        row.tokens.append(token)
        self._answer_tokens += 1
        if token in self._choosing.end_tokens:
            return "stop"
        if choice.grammar is not None:
            choice.grammar.accept(token)
        logprob = None if row.top_logprobs is None else self._texts.logprobs(logits_1V[0], token, row.top_logprobs)
        if (piece := row.text.add(token, logprob)) is not None:
            row.ticket.put(piece)
        if row.text.stopped:
            return "stop"
        return "length" if len(row.tokens) >= row.prompt.limit else None

    def _leave(self, leaving: list[tuple[int, FinishReason | Exception]]) -> None:
        """Take rows out of the batch, given by their places from the first to the last."""
        for index, reason in reversed(leaving):
            row = self._rows[index]
            if not isinstance(reason, Exception) and self.settings.prefix_cache_bytes:
                self._prefill.prefixes.put(answer_key(row.prompt, row.tokens[:-1]), self._cache.row(index))
            self._cache.leave(index)
            # the last row has taken its place there, too
            last = self._rows.pop()
            if last is not row:
                self._rows[index] = last
            if isinstance(reason, Exception):
                self._end(row, reason)
            else:
                self._finish(row, reason)

    def _finish(self, row: _Row, reason: FinishReason) -> None:
        now = time.perf_counter()
        row.seconds["decode"] = now - row.first_token if row.first_token else 0.0
        if (piece := row.text.finish()) is not None:
            row.ticket.put(piece)
        usage = Usage(
            prompt_tokens=row.prompt.tokens,
            cached_tokens=row.cached_tokens,
            visual_tokens=row.prompt.visual_tokens,
            completion_tokens=len(row.tokens),
            seconds=row.seconds,
        )
        self._recent.append(now - row.submitted)
        self._end(row, Finished(reason, usage, self._confidence(row)))

    def _end(self, row: _Row, event: Finished | Exception) -> None:
        row.ticket.put(event)
        with self._changed:
            self._active -= 1
            self._changed.notify_all()

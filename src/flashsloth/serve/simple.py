"""An engine that answers one request at a time: what the batching one is compared with.

Shape suffixes: B rows, T tokens, V vocabulary; I images, V views, C channels, H W pixels; P un-pooled patches,
E width of the encoder.
"""

import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..inference.conversation import DEFAULT_MAX_NEW_TOKENS
from ..inference.session import FlashSloth
from ..inference.structured import FormProcessor
from .requests import Event, Finished, FinishReason, Overloaded, Piece, Request, TokenLogprob, Usage

UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character
QUEUE = 64
RETRY_SECONDS = 1.0


class SimpleTicket:
    """See `pending.Ticket`."""

    def __init__(self, request: Request, on_event: Callable[[], None] | None) -> None:
        self.request, self.on_event = request, on_event
        self.submitted = time.perf_counter()
        self.cancelled = threading.Event()
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()

    def get(self, timeout: float | None = None) -> Event:
        event = self._events.get(timeout=timeout)
        if isinstance(event, BaseException):
            raise event
        return event

    def put(self, event: Event | BaseException) -> None:
        self._events.put(event)
        if self.on_event is not None:
            self.on_event()

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass(frozen=True)
class SimpleStatistics:
    waiting: int
    answered: int


class OneAtATime:
    """Answers requests in the order in which they come, each by `generate`; see `pending.Engine`."""

    def __init__(self, session: FlashSloth, most_waiting: int = QUEUE) -> None:
        self.session, self.most_waiting = session, most_waiting
        self._waiting: queue.SimpleQueue[SimpleTicket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="flashsloth-engine", daemon=True)
        self._answered = 0

    def start(self) -> None:
        self._thread.start()

    @property
    def is_accepting(self) -> bool:
        return self._thread.is_alive()

    def statistics(self) -> SimpleStatistics:
        return SimpleStatistics(self._waiting.qsize(), self._answered)

    def submit(self, request: Request, on_event: Callable[[], None] | None = None) -> SimpleTicket:
        if request.sampling.confidence:
            raise ValueError("confidence is given where answers are batched; leave it out, or use --engine batching")
        if self._waiting.qsize() >= self.most_waiting:
            raise Overloaded(RETRY_SECONDS)
        ticket = SimpleTicket(request, on_event)
        self._waiting.put(ticket)
        return ticket

    def stop(self) -> None:
        """Answer what waits, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (ticket := self._waiting.get()) is not None:
            if ticket.cancelled.is_set():
                ticket.put(Finished("cancelled", Usage(0, 0, 0, 0, {})))
                continue
            try:
                ticket.put(self._answer(ticket))
                self._answered += 1
            except Exception as error:  # handed to who waits for the answer
                ticket.put(error)

    @torch.inference_mode()
    def _answer(self, ticket: SimpleTicket) -> Finished:
        request, session = ticket.request, self.session
        clock = _Clock(session)
        clock.seconds["queue"] = time.perf_counter() - ticket.submitted
        counts = session.image_tokens(len(request.images), request.visual_tokens)
        inputs = self._inputs(request, counts)
        features = None
        if request.images:
            pixels_IVCHW = session.processor.image_processor(list(request.images), return_tensors="pt")["pixel_values"]
            clock.lap("preprocess")
            features_IPE = session.encode_views(pixels_IVCHW)
            clock.lap("encode")
            counts_I = None if counts is None else torch.tensor(counts)
            features = session.model.model.compress_images(features_IPE, counts_I)
            clock.lap("compress")
        else:
            clock.lap("preprocess")
        prompt_tokens = inputs["input_ids"].shape[1]
        answer = _Answer(ticket, session, prompt_tokens, clock)
        grammar = request.sampling.grammar
        forms = LogitsProcessorList([] if grammar is None else [FormProcessor(grammar)])
        output = session.generate(
            **inputs,
            image_features=features,
            generation_config=self._generation_config(request, prompt_tokens),
            logits_processor=forms,
            stopping_criteria=StoppingCriteriaList([answer]),
            return_dict_in_generate=True,
            output_logits=request.sampling.top_logprobs is not None,
        )
        clock.lap("decode")
        ids_T = output.sequences[0, prompt_tokens:]
        reason = answer.finish(ids_T.tolist(), output.get("logits"))
        visual_tokens = sum(counts or [session.config.num_image_tokens] * len(request.images))
        return Finished(reason, Usage(prompt_tokens, 0, visual_tokens, len(ids_T), clock.seconds))

    def _inputs(self, request: Request, counts: list[int] | None) -> Any:
        inputs = self.session.processor.apply_chat_template(
            request.messages,
            images=list(request.images),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt", "return_pixel_values": False, "visual_tokens": counts},
        )
        return inputs.to(self.session.device)

    def _generation_config(self, request: Request, prompt_tokens: int) -> Any:
        sampling, session = request.sampling, self.session
        context = session.config.text_config.max_position_embeddings
        if prompt_tokens >= context:
            raise ValueError(f"the prompt has {prompt_tokens} tokens, but {session.name} has a context of {context}")
        config = copy.deepcopy(session.model.generation_config)
        limit = sampling.max_tokens or config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        config.update(max_new_tokens=min(limit, context - prompt_tokens), do_sample=sampling.temperature > 0)
        if sampling.temperature > 0:
            config.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            else:
                torch.seed()
        return config


class _Clock:
    """Seconds by stage."""

    def __init__(self, session: FlashSloth) -> None:
        self._session = session
        self._last = time.perf_counter()
        self.seconds = dict.fromkeys(("queue", "preprocess", "encode", "compress", "prefill", "decode"), 0.0)

    def lap(self, stage: str) -> None:
        self._session.synchronize()
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


class _Answer(StoppingCriteria):
    """Hands over text that can no longer change, and stops where it shall."""

    def __init__(self, ticket: SimpleTicket, session: FlashSloth, prompt_tokens: int, clock: _Clock) -> None:
        self.ticket, self.session, self.prompt_tokens, self.clock = ticket, session, prompt_tokens, clock
        self.stop: Sequence[str] = ticket.request.sampling.stop
        # log-probabilities are there at the end; the text waits for them
        self.streams = ticket.request.sampling.top_logprobs is None
        ends = session.model.generation_config.eos_token_id
        self.ends: Sequence[int] = ends if isinstance(ends, list) else [ends]
        self.sent = ""
        self.stopped = False
        self.begun = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.begun:
            self.begun = True
            self.clock.lap("prefill")
        text = self._text(input_ids[0, self.prompt_tokens :].tolist())
        if self.streams:
            self._send(self._certain(text))
        over = self.stopped or self.ticket.cancelled.is_set()
        return torch.full((input_ids.shape[0],), over, dtype=torch.bool, device=input_ids.device)

    def finish(self, ids: list[int], logits: Sequence[Tensor] | None) -> FinishReason:
        """The rest of the text, and why it ended."""
        text = self._text(ids)
        if logits is None:
            self._send(text)
        else:
            self._send_logprobs(text, ids, logits)
        ended = bool(ids) and ids[-1] in self.ends
        if self.ticket.cancelled.is_set() and not (self.stopped or ended):
            return "cancelled"
        return "stop" if self.stopped or ended else "length"

    def _decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.session.processor.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def _text(self, ids: list[int]) -> str:
        """All text up to the first stop."""
        text = self._decode(ids).strip()
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)].rstrip() if places else text

    def _certain(self, text: str) -> str:
        """Without an unfinished character at its end, and without what may begin a stop."""
        text = text.rstrip(UNFINISHED)
        if self.stopped:
            return text
        for length in range(min(max(map(len, self.stop), default=0), len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                return text[:-length].rstrip()
        return text

    def _send(self, text: str) -> None:
        if len(text) > len(self.sent) and text.startswith(self.sent):
            self.ticket.put(Piece(text[len(self.sent) :]))
            self.sent = text

    def _send_logprobs(self, text: str, ids: list[int], logits: Sequence[Tensor]) -> None:
        """All of the text, with the tokens that it was made of, without the end of the sequence."""
        top = self.ticket.request.sampling.top_logprobs or 0
        found = []
        for place, (token, logits_1V) in enumerate(zip(ids, logits, strict=True)):
            if token in self.ends or (self.stopped and len(self._decode(ids[:place]).strip()) >= len(text)):
                break
            logprobs_V = logits_1V[0].float().log_softmax(dim=-1)
            values, tokens = logprobs_V.topk(min(top, len(logprobs_V)))
            others = [self._logprob(*pair) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
            found.append((self._logprob(token, float(logprobs_V[token])), others))
        self.ticket.put(Piece(text, found))

    def _logprob(self, token: int, value: float) -> TokenLogprob:
        text = self._decode([token], skip_special_tokens=False)
        return TokenLogprob(text, value, tuple(text.encode()))

"""The built-in engine: rows that come and go get the answers that `generate` gives them alone."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from flashsloth import FlashSlothProcessor
from flashsloth.inference import load
from flashsloth.inference.session import FlashSloth
from flashsloth.inference.structured import AnswerForm, compile_form
from flashsloth.serve.engine import Engine, EngineSettings
from flashsloth.serve.prefill import TOKENS_OF_A_CALL
from flashsloth.serve.requests import Finished, Overloaded, Piece, Request, Sampling
from flashsloth.serve.tickets import Ticket
from tiny_models import DECODERS, EOS, IMAGE, PAD, QUERY, VOCABULARY, tiny_model
from tiny_session import TEMPLATE, character_tokenizer, noise_image

A, B, C = (noise_image(seed) for seed in range(3))
MODELS = {
    **{decoder: {"decoder": decoder} for decoder in DECODERS},
    "HD": {"decoder": "phi", "view_grid": [2, 2]},
    "elastic": {"decoder": "gemma3", "compressor_window": 2, "compressor_windows": [1, 2, 3]},
}
FETCHED, EMBEDDED = 20.0, 0.2
LONG = "a question that is longer than the window of a layer which sees but a part of it"


def user(text: str, images: int = 0) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def asked(
    messages: list[dict] | str,
    images: Sequence[Image.Image] = (),
    visual_tokens: int | None = None,
    **sampling,
) -> Request:
    if isinstance(messages, str):
        messages = [user(messages, len(images))]
    return Request(messages, images, Sampling(**{"max_tokens": 20, "top_logprobs": 0, **sampling}), visual_tokens)


CASES = {
    "one image": asked("what is it", [A]),
    "the same image, another question": asked("where is it now", [A], max_tokens=27),
    "another image, the same question": asked("what is it", [B], max_tokens=16),
    "two images": asked("which of them", [B, C], max_tokens=25),
    "an image twice": asked("the same twice", [C, C], max_tokens=24),
    "two turns": asked([user("what is it", 1), assistant("A dog"), user("and why")], [A], max_tokens=18),
    "an image a turn": asked([user("what", 1), assistant("A cat"), user("and that", 1)], [B, A]),
    "longer than a window": asked(LONG, [C], max_tokens=26),
}
TEXT_ONLY = {"text only": asked("who are you", max_tokens=19), "one token": asked("again", max_tokens=1)}


def make_session(decoder: str, **overrides) -> FlashSloth:
    model = tiny_model(decoder, **overrides)
    with torch.no_grad():  # every answer about an image depends on what the module fetches
        model.model.embedded_query.up_projection.weight.mul_(FETCHED)
        model.get_input_embeddings().weight.mul_(EMBEDDED)
    # Characters only, none of them twice: one character over and over says little.
    tokenizer = character_tokenizer()
    model.generation_config.suppress_tokens = [PAD, EOS, IMAGE, QUERY, *range(len(tokenizer), VOCABULARY)]
    model.generation_config.no_repeat_ngram_size = 1
    processor = FlashSlothProcessor.from_config(model.config, tokenizer, chat_template=TEMPLATE)
    return FlashSloth(model, processor)


@pytest.fixture(scope="module")
def session() -> FlashSloth:
    return make_session("phi")


@pytest.fixture
def started() -> Iterator[Callable[..., Engine]]:
    engines = []

    def start(session: FlashSloth, **settings) -> Engine:
        engines.append(Engine(session, EngineSettings(**settings)))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def generated(session: FlashSloth, request: Request) -> list[str]:
    """The tokens of the model's own `generate`, which reads the whole prompt and has no other rows."""
    inputs = session.processor.apply_chat_template(
        request.messages,
        images=list(request.images),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        visual_tokens=request.visual_tokens,
    )
    tokens = session.model.generate(**inputs, max_new_tokens=request.sampling.max_tokens, do_sample=False)
    return [session.processor.tokenizer.decode([token]) for token in tokens[0, inputs["input_ids"].shape[1] :]]


def read(ticket: Ticket) -> tuple[list[str], Finished]:
    """The tokens of an answer, and its end."""
    *pieces, last = ticket
    assert isinstance(last, Finished)
    return [chosen.token for piece in pieces for chosen, _ in piece.logprobs], last


def text_of(ticket: Ticket) -> str:
    return "".join(event.text for event in ticket if isinstance(event, Piece))


def answered(engine: Engine, requests: Sequence[Request], seed: int = 0) -> list[list[str]]:
    """The tokens of requests that join after others have got some of theirs."""
    chance = random.Random(seed)
    tickets: list[Ticket] = []
    pieces: list[list[Piece]] = []
    for request in requests:
        tickets.append(engine.submit(request))
        pieces.append([])
        index = chance.randrange(len(tickets))
        for _ in range(chance.randrange(5)):
            if not any(isinstance(event, Finished) for event in pieces[index]):
                pieces[index].append(tickets[index].get(timeout=60))
    for ticket, events in zip(tickets, pieces, strict=True):
        if not any(isinstance(event, Finished) for event in events):
            events.extend(ticket)
    return [[chosen.token for piece in events[:-1] for chosen, _ in piece.logprobs] for events in pieces]


def cases_of(name: str) -> dict[str, Request]:
    if name != "elastic":
        return {**CASES, **TEXT_ONLY}
    counts = [36, 9, 4]
    return {
        f"{case}, {count} tokens": Request(request.messages, request.images, request.sampling, count)
        for index, (case, request) in enumerate(CASES.items())
        for count in (counts[index % 3], counts[(index + 1) % 3])
    } | {"default": CASES["one image"]}


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_join_at_any_step_are_answered_as_by_generate(name, started):
    session, cases = make_session(**MODELS[name]), cases_of(name)
    expected = {case: generated(session, request) for case, request in cases.items()}
    order = list(cases) * 2
    random.Random(1).shuffle(order)
    engine = started(session, max_batch_size=5)
    answers = answered(engine, [cases[case] for case in order])
    assert {case: tokens for case, tokens in zip(order, answers, strict=True) if tokens != expected[case]} == {}
    # once for every prompt that has an image
    assert engine.statistics().embedded_query_prompts == 2 * sum(bool(request.images) for request in cases.values())
    assert engine.statistics().prompts == len(order)


@pytest.mark.parametrize("name", MODELS)
def test_every_answer_about_an_image_needs_the_embedded_query_module(name, started):
    session = make_session(**MODELS[name])
    cases = {case: request for case, request in cases_of(name).items() if request.images}
    expected = {case: generated(session, request) for case, request in cases.items()}
    with torch.no_grad():
        for parameter in session.model.model.embedded_query.up_projection.parameters():
            parameter.zero_()
    answers = answered(started(session), list(cases.values()))
    assert [case for case, tokens in zip(cases, answers, strict=True) if tokens == expected[case]] == []


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_taken_out_in_mid_answer_leave_the_others_as_they_are(name, started):
    """Little room, and every other request cancelled at some step: rows change their places, columns are moved."""
    session, cases = make_session(**MODELS[name]), cases_of(name)
    expected = {case: generated(session, request) for case, request in cases.items()}
    engine, chance = started(session, max_batch_size=3, max_prefill_tokens=60), random.Random(2)
    kept, cancelled = [], []
    for request in cases.values():
        cancelled.append(engine.submit(asked("away", [A], max_tokens=100)))
        kept.append(engine.submit(request))
        for _ in range(chance.randrange(4)):
            cancelled[-1].get(timeout=60)
        chance.choice(cancelled).cancel()
    for ticket in cancelled:
        ticket.cancel()
    answers = [read(ticket)[0] for ticket in kept]
    assert {case: tokens for case, tokens in zip(cases, answers, strict=True) if tokens != expected[case]} == {}
    assert engine.drain(timeout=60)


def test_prompts_are_run_alone_where_what_is_known_pays_for_it(session, started):
    engine = started(session)
    long = [user("a question with many letters " * 4, 1), assistant("A dog"), user("and")]
    short = [user("what is it", 1), assistant("A dog"), user("and")]
    for messages in (long, short):
        read(engine.submit(asked(messages[:1], [A], max_tokens=1)))
        read(engine.submit(asked(messages, [A], max_tokens=1)))
    assert engine.drain(timeout=60)
    prompts = [engine._prepare(asked(messages, [A])) for messages in (long, short, [user("who", 1)])]
    known = [engine._prefill._known(prompt)[0] for prompt in prompts]
    assert known[0] > TOKENS_OF_A_CALL > known[1] > prompts[1].tokens / 2
    assert engine._prefill.groups(prompts) == [[0], [1, 2]]
    assert engine._prefill.groups(prompts[1:2]) == [[0]]


@pytest.mark.parametrize("name", ["phi", "gemma2", "HD"])
def test_a_conversation_goes_on_from_the_keys_and_values_of_its_turns(name, started):
    session = make_session(**MODELS[name])
    engine = started(session)
    messages, cached = [user("what is it", 1)], 0
    for question in ("and why", "since when", LONG):
        tokens, end = read(engine.submit(asked(messages, [A])))
        assert tokens == generated(session, asked(messages, [A]))
        assert end.usage.cached_tokens >= cached
        cached = end.usage.prompt_tokens
        messages = [*messages, assistant("".join(tokens)), user(question)]
    request = asked(messages, [A])
    tokens, end = read(engine.submit(request))
    assert tokens == generated(session, request)
    # all but the last turn, the end of the answer before it and, as it was never run, that answer's last token
    last_turn = len("Q:") + len(LONG) + session.config.num_query_tokens + len("A:")
    assert end.usage.cached_tokens == end.usage.prompt_tokens - last_turn - 2
    assert engine.statistics().embedded_query_prompts == 4


@pytest.mark.parametrize(
    ("second", "shared"),
    [
        (asked("what is that", [A]), "image and header"),  # never a part of a question
        (asked("what is it", [A]), "image and header"),  # nor all of it: the module runs for every answer
        (asked([user("what is that", 1), assistant("A dog"), user("and")], [A]), "image and header"),
        (asked("what is it", [B]), "nothing"),
        (asked("what is it", [A], visual_tokens=9), "nothing"),
        (asked("what is it"), "nothing"),
    ],
)
def test_what_is_known_of_a_prompt_ends_with_a_whole_turn_or_image(second, shared, started):
    session = make_session("phi", compressor_windows=[2, 3])
    engine = started(session)
    read(engine.submit(asked("what is it", [A])))
    tokens, end = read(engine.submit(second))
    assert tokens == generated(session, second)
    expected = session.config.num_image_tokens + len("Q:") if shared == "image and header" else 0
    assert end.usage.cached_tokens == expected


def test_an_image_is_encoded_once_whatever_is_asked_about_it(session, started):
    engine = started(session)
    for question in ("what", "where", "why"):
        read(engine.submit(asked(question, [A, B])))
    statistics = engine.statistics()
    assert (statistics.feature_misses, statistics.feature_hits) == (2, 4)


def test_caches_stay_within_their_bytes(session, started):
    image_bytes = 36 * 24 * 4
    engine = started(session, feature_cache_bytes=2 * image_bytes, prefix_cache_bytes=60_000)
    for seed in range(6):
        request = asked(f"what is {seed}", [noise_image(seed)])
        assert read(engine.submit(request))[0] == generated(session, request)
        statistics = engine.statistics()
        assert statistics.feature_bytes == min(seed + 1, 2) * image_bytes
        assert 0 < statistics.prefix_bytes <= 60_000
    nothing = started(session, feature_cache_bytes=0, prefix_cache_bytes=0)
    for _ in range(2):
        tokens, end = read(nothing.submit(CASES["one image"]))
        assert end.usage.cached_tokens == 0
        assert tokens == generated(session, CASES["one image"])
    assert (nothing.statistics().feature_bytes, nothing.statistics().prefix_bytes) == (0, 0)


def test_the_batch_takes_no_more_than_its_budget(session, started):
    """Rows times the longest of them; what does not fit waits, and is answered all the same."""
    engine = started(session, max_batch_tokens=200, max_prefill_tokens=40)
    requests = [CASES["one image"], CASES["longer than a window"], TEXT_ONLY["text only"]] * 3
    tickets = [engine.submit(request) for request in requests]
    most = 0
    while engine.statistics().waiting or engine.statistics().running:
        most = max(most, engine.statistics().batch_bytes)
        time.sleep(0.001)
    for ticket, request in zip(tickets, requests, strict=True):
        assert read(ticket)[0] == generated(session, request)
    token_bytes = 3 * 2 * 32 * 4
    assert 0 < most <= 2 * (200 + 4 * 2 * 64) * token_bytes
    with pytest.raises(ValueError, match="tokens, but .* has room for 200"):
        engine.submit(asked("x" * 200))


def test_sampling_depends_on_the_seed_and_on_nothing_else(session, started):
    def sampled(seed: int, **options) -> Request:
        return asked(
            "what is it", [A], **{"temperature": 1.5, "top_p": 0.95, "seed": seed, "max_tokens": 12} | options
        )

    engine = started(session)
    alone = [read(engine.submit(sampled(seed)))[0] for seed in range(4)]
    crowd = [*map(sampled, range(4)), *CASES.values(), sampled(0, temperature=0.1)]
    answers = answered(engine, crowd, seed=2)
    assert answers[:4] == alone
    assert len(set(map(tuple, alone))) == 4
    assert answers[-1] != alone[0]
    # a share of nothing leaves the likeliest token
    assert read(engine.submit(sampled(9, top_p=1e-6)))[0] == generated(session, sampled(9))


def test_log_probabilities_are_those_of_the_model(session, started):
    request = asked("what is it", [A], max_tokens=3, top_logprobs=4, temperature=2.0, seed=1)
    inputs = session.processor.apply_chat_template(
        request.messages,
        images=[A],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        logprobs_V = session.model(**inputs).logits[0, -1].log_softmax(dim=-1)
    entries = [entry for piece in list(started(session).submit(request))[:-1] for entry in piece.logprobs]
    assert len(entries) == 3
    chosen, others = entries[0]
    token = session.processor.tokenizer.convert_tokens_to_ids(chosen.token)
    assert chosen.logprob == pytest.approx(float(logprobs_V[token]), abs=1e-4)
    assert chosen.bytes == tuple(chosen.token.encode())
    assert [other.logprob for other in others] == pytest.approx(logprobs_V.topk(4).values.tolist(), abs=1e-4)
    *pieces, _ = started(session).submit(asked("what", top_logprobs=None))
    assert not any(piece.logprobs for piece in pieces)


@pytest.mark.parametrize("around", ["characters", "words"])
def test_an_answer_ends_before_a_stop_text(around, session, started):
    engine = started(session)
    whole = text_of(engine.submit(asked("what is it", [A])))
    stop = whole[5:8] if around == "characters" else whole[5]
    ticket = engine.submit(asked("what is it", [A], stop=["never there", stop, whole[7:9]]))
    events = list(ticket)
    assert "".join(event.text for event in events if isinstance(event, Piece)) == whole[: whole.index(stop)].rstrip()
    assert "".join(chosen.token for event in events[:-1] for chosen, _ in event.logprobs).strip() == whole[:5].strip()
    assert events[-1].reason == "stop"


def test_an_answer_ends_with_the_end_of_the_sequence(started):
    session = make_session("phi")
    session.model.generation_config.suppress_tokens = [PAD, IMAGE, QUERY]
    whole = generated(session, asked("what is it", [A]))
    session.model.generation_config.eos_token_id = session.processor.tokenizer.convert_tokens_to_ids(whole[4])
    tokens, end = read(started(session).submit(asked("what is it", [A])))
    assert tokens == whole[:4]
    assert (end.reason, end.usage.completion_tokens) == ("stop", 5)


def test_usage_says_what_an_answer_took(session, started):
    _, end = read(started(session).submit(asked("which", [A, B], max_tokens=3)))
    usage = end.usage
    assert end.reason == "length"
    assert (usage.completion_tokens, usage.visual_tokens, usage.cached_tokens) == (
        3,
        2 * session.config.num_image_tokens,
        0,
    )
    assert usage.prompt_tokens == usage.visual_tokens + len("Q:which") + session.config.num_query_tokens + len("A:")
    assert list(usage.seconds) == ["queue", "preprocess", "encode", "compress", "prefill", "decode"]
    assert all(seconds > 0 for seconds in usage.seconds.values())


class Digits:
    """A grammar of digits only, which fails after so many of them."""

    def __init__(self, session: FlashSloth, most: int) -> None:
        self.digits = session.processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
        self.most = most

    def start(self) -> Digits:
        return copy.copy(self)

    def mask_logits(self, logits_1V: torch.Tensor) -> None:
        if not self.most:
            raise RuntimeError("no more digits")
        others = [token for token in range(logits_1V.shape[-1]) if token not in self.digits]
        logits_1V[:, others] = -torch.inf

    def accept(self, token_id: int) -> None:
        assert token_id in self.digits
        self.most -= 1


def test_a_grammar_binds_its_own_answer_only(session, started):
    engine = started(session)
    bound = engine.submit(asked("what is it", [A], grammar=Digits(session, 99), max_tokens=6))
    free = engine.submit(asked("what is it", [A]))
    assert text_of(bound).isdigit()
    assert read(free)[0] == generated(session, asked("what is it", [A]))


def test_what_goes_wrong_with_a_request_is_its_own(session, started, monkeypatch):
    engine = started(session)
    good = [engine.submit(CASES["one image"])]
    bad = engine.submit(asked("what is it", [A], grammar=Digits(session, 2)))
    good.append(engine.submit(CASES["two images"]))
    with pytest.raises(RuntimeError, match="no more digits"):
        list(bad)
    assert [read(ticket)[0] for ticket in good] == [
        generated(session, CASES["one image"]),
        generated(session, CASES["two images"]),
    ]
    # a prompt that fails does not take those with it that were to be run beside it
    encode = session.encode_views

    def fail_for_one(pixel_values: torch.Tensor) -> torch.Tensor:
        if (pixel_values - pixel_values.flatten(1).mean()).abs().max() < 1e-3 or len(pixel_values) > 1:
            raise MemoryError("too much")
        return encode(pixel_values)

    monkeypatch.setattr(session, "encode_views", fail_for_one)
    grey = Image.new("RGB", (40, 30), (90, 90, 90))
    requests = [asked("what", [grey]), asked("what", [noise_image(7)]), asked("what", [noise_image(8)])]
    tickets = [engine.submit(request) for request in requests]
    with pytest.raises(MemoryError, match="too much"):
        list(tickets[0])
    assert [read(ticket)[0] for ticket in tickets[1:]] == [generated(session, request) for request in requests[1:]]
    # nor does a step that fails end the engine
    monkeypatch.setattr(engine._cache, "advance", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.submit(CASES["one image"]))
    monkeypatch.undo()
    assert read(engine.submit(CASES["one image"]))[0] == generated(session, CASES["one image"])


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (asked("x" * 300), "300|tokens, but model has room for 256"),
        (asked("what", [A], visual_tokens=5), "visual_tokens is 5"),
        (Request([user("what", 2)], [A]), "2 .* placeholders but 1 image|2 .*placeholders"),
        (Request([user("", 1)], [A]), "question"),
        (Request([{"role": "user"}, 3], []), "message"),
        (asked("what", max_tokens=0), "max_tokens is 0"),
        (asked("what", temperature=-1.0), "temperature is -1"),
        (asked("what", temperature=float("nan")), "temperature is nan"),
        (asked("what", top_p=0.0), "top_p is 0"),
        (asked("what", top_logprobs=-1), "top_logprobs is -1"),
        (asked("what", stop=["a", ""]), "stop has an empty text"),
    ],
)
def test_a_bad_request_is_refused_before_it_waits(request_, error, session, started):
    engine = started(session)
    with pytest.raises(ValueError, match=error):
        engine.submit(request_)
    assert engine.statistics().waiting == 0
    assert engine.drain(timeout=5)


def test_an_answer_ends_where_the_context_does(session, started):
    request = asked("x" * 240, max_tokens=50)
    tokens, end = read(started(session).submit(request))
    assert (end.reason, len(tokens)) == ("length", 256 - end.usage.prompt_tokens)


def test_a_cancelled_request_leaves_at_the_next_step(session, started):
    engine = started(session, max_batch_size=1)
    running, waiting, last = (engine.submit(asked("what", [A], max_tokens=200)) for _ in range(3))
    assert isinstance(running.get(timeout=30), Piece)
    with pytest.raises(TimeoutError):
        waiting.get(timeout=0)
    waiting.cancel()
    running.cancel()
    assert read(waiting)[1].reason == "cancelled"
    tokens, end = read(running)
    assert end.reason == "cancelled"
    assert end.usage.completion_tokens == len(tokens) + 1 < 200
    last.cancel()
    assert read(last)[1].reason == "cancelled"
    with pytest.raises(ValueError, match="finished"):
        last.get()
    assert read(engine.submit(CASES["one image"]))[0] == generated(session, CASES["one image"])


def test_a_full_queue_is_refused_with_a_time_to_come_back(session, started):
    engine = started(session, max_batch_size=1, max_queue=2)
    running = engine.submit(asked("what", [A], max_tokens=200))
    running.get(timeout=30)
    waiting = [engine.submit(asked("what", [A], max_tokens=1)) for _ in range(2)]
    with pytest.raises(Overloaded, match="as many requests as it takes; try again in 1 s") as error:
        engine.submit(asked("what"))
    assert error.value.retry_after >= 1
    assert not error.value.is_stopping
    running.cancel()
    assert [read(ticket)[1].reason for ticket in waiting] == ["length", "length"]
    assert read(engine.submit(asked("what")))[1].reason == "length"


def test_draining_answers_what_is_there_and_stopping_cancels_it(session, started):
    engine = started(session)
    tickets = [engine.submit(request) for request in CASES.values()]
    assert engine.is_accepting
    assert engine.drain(timeout=60)
    assert not engine.is_accepting
    assert {read(ticket)[1].reason for ticket in tickets} == {"length"}
    with pytest.raises(Overloaded, match="shutting down") as error:
        engine.submit(CASES["one image"])
    assert error.value.is_stopping

    engine = started(session, max_batch_size=1)
    tickets = [engine.submit(asked("what", [A], max_tokens=200)) for _ in range(2)]
    assert not engine.drain(timeout=0.01)
    engine.stop()
    assert {read(ticket)[1].reason for ticket in tickets} == {"cancelled"}


def test_a_reader_is_told_when_there_is_something_to_get(session, started):
    told: list[float] = []
    ticket = started(session).submit(asked("what", [A]), on_event=lambda: told.append(time.monotonic()))
    events = list(ticket)
    assert len(told) == len(events)


def test_requests_of_many_threads_are_answered_as_by_generate(session, started):
    engine, requests = started(session, max_batch_size=4), [*CASES.values(), *TEXT_ONLY.values()] * 3
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: read(engine.submit(request))[0], requests))
    expected = [generated(session, request) for request in requests[: len(requests) // 3]]
    assert answers == expected * 3


def test_the_packaged_model_is_answered_as_in_a_conversation(started):
    """With its packed layers, which take rows of any number."""
    session = load("nano")
    images = [noise_image(seed, (90, 60)) for seed in range(2)]
    questions = ["What is in the picture?", "Which colour is it?", "How many are there?"]
    requests = [asked(question, [image], max_tokens=12) for question in questions for image in images]
    expected = [session.ask(image, question, max_new_tokens=12).text for question in questions for image in images]
    engine = started(session)
    tickets = [engine.submit(request) for request in requests]
    assert [text_of(ticket) for ticket in tickets] == expected
    assert engine.statistics().embedded_query_prompts == len(requests)


def test_the_confidence_of_an_answer_is_that_of_a_conversation(started):
    """Several in one batch, each with a form of its own; the embedded query module runs once for each."""
    session = load("nano")
    image = noise_image(3, (90, 60))
    forms = [{"choices": ["yes", "no", "maybe not"]}, {"choices": ["red", "blue"]}, {"regex": "[0-9]{1,3}"}, {}]
    expected = [session.ask(image, "is it red?", max_new_tokens=12, confidence=True, **form) for form in forms]
    config = session.model.generation_config
    grammars = [compile_form(AnswerForm(**form), session.processor, config) if form else None for form in forms]
    engine = started(session)
    tickets = [
        engine.submit(asked("is it red?", [image], max_tokens=12, grammar=grammar, confidence=True))
        for grammar in grammars
    ]
    plain = engine.submit(asked("is it red?", [image], max_tokens=12))
    hot = [
        engine.submit(asked("is it red?", [image], grammar=grammars[0], confidence=True, temperature=2.0, seed=seed))
        for seed in range(30)
    ]
    for ticket, answer in zip(tickets, expected, strict=True):
        events = list(ticket)
        assert "".join(event.text for event in events[:-1]) == answer.text
        assert events[-1].confidence == pytest.approx(answer.confidence, abs=1e-5)
    assert read(plain)[1].confidence is None
    by_text = {}
    for ticket in hot:
        *pieces, end = ticket
        by_text["".join(piece.text for piece in pieces)] = end.confidence
    assert len(by_text) > 1 and sum(by_text.values()) <= 1 + 1e-5
    assert by_text[expected[0].text] == pytest.approx(expected[0].confidence, abs=1e-5)
    assert engine.statistics().embedded_query_prompts == len(forms) + 1 + len(hot)
    cut = engine.submit(asked("is it red?", [image], max_tokens=1, grammar=grammars[0], confidence=True))
    assert read(cut)[1].confidence is None or expected[0].new_tokens <= 2

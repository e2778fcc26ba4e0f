"""The built-in engine: rows that come and go get the answers that `generate` gives them alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from PIL import Image

from flashsloth import FlashSlothProcessor
from flashsloth.inference.session import FlashSloth
from flashsloth.serve.engine import Engine, EngineSettings
from flashsloth.serve.requests import Finished, Overloaded, Piece, Request, Sampling
from flashsloth.serve.tickets import Ticket
from tiny_models import DECODERS, EOS, IMAGE, PAD, QUERY, tiny_model
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
    model.generation_config.suppress_tokens = [PAD, EOS, IMAGE, QUERY]
    model.generation_config.no_repeat_ngram_size = 1
    processor = FlashSlothProcessor.from_config(model.config, character_tokenizer(), chat_template=TEMPLATE)
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

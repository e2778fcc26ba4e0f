"""Turns with several rows, from several threads, in forked processes; streams read again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import StoppingCriteria

from flashsloth.inference import Answer, Conversation, FlashSloth, load, runtime
from tiny_session import noise_image, tiny_folder

QUESTIONS = ("what is it?", "which colour has it?", "how many?", "and now?")
SEVERAL_ROWS: dict[str, dict] = {
    "beams": {"num_beams": 3},
    "beams of which several are returned": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> FlashSloth:
    return load(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"), device="cpu")


def asked_with_an_empty_cache(conversation: Conversation, question: str, **options: object) -> Answer:
    fresh = conversation.session.conversation(conversation.images)
    fresh.messages = list(conversation.messages)
    return fresh.ask(question, **options)


@pytest.mark.parametrize("decoder", ["phi", "gemma2"])
@pytest.mark.parametrize("options", SEVERAL_ROWS.values(), ids=SEVERAL_ROWS)
def test_every_turn_answers_as_with_an_empty_cache(tmp_path: Path, decoder: str, options: dict) -> None:
    session = load(tiny_folder(tmp_path / decoder, decoder), device="cpu")
    conversation = session.conversation(noise_image())
    for turn, question in enumerate(QUESTIONS):
        options = options if turn != 2 else {}  # a greedy turn between those of several rows
        torch.manual_seed(turn)
        expected = asked_with_an_empty_cache(conversation, question, max_new_tokens=5, **options)
        torch.manual_seed(turn)
        answer = conversation.ask(question, max_new_tokens=5, **options)
        assert (answer.text, answer.others) == (expected.text, expected.others)


def test_turns_of_several_rows_go_on_from_the_cache(session: FlashSloth) -> None:
    conversation = session.conversation(noise_image())
    first = conversation.ask("what is it?", max_new_tokens=5, num_beams=3, num_return_sequences=2)
    assert len(first.others) == 1
    assert conversation.ask("and now?", max_new_tokens=5).reused_tokens == first.prompt_tokens


def test_the_length_of_an_answer_leaves_out_what_pads_it(session: FlashSloth) -> None:
    sequences = [torch.tensor([5, 6, 1, 0, 0]), torch.tensor([5, 6, 7, 8, 9])]
    from flashsloth.inference.guide import answer_length

    assert [answer_length(ids, end) for ids in sequences for end in (1, [1, 8], None)] == [3, 3, 5, 5, 4, 5]


class AfterTwoTokens(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.start = getattr(self, "start", input_ids.shape[1] - 1)
        return torch.full((input_ids.shape[0],), input_ids.shape[1] - self.start >= 2)


def test_arguments_of_generate_that_a_turn_gives_itself(session: FlashSloth) -> None:
    image = noise_image()
    assert session.ask(image, "what?", max_new_tokens=6, stopping_criteria=[AfterTwoTokens()]).new_tokens == 2
    config = session.model.generation_config
    assert session.ask(image, "what?", max_new_tokens=6, generation_config=config).new_tokens == 6
    with pytest.raises(ValueError, match="input_ids, streamer cannot be given"):
        session.ask(image, "what?", streamer=None, input_ids=None)


def test_a_conversation_asked_from_several_threads_loses_no_turn(session: FlashSloth) -> None:
    conversation = session.conversation(noise_image())
    questions = [f"question {index}?" for index in range(8)]
    barrier = threading.Barrier(len(questions))
    answers: dict[str, str] = {}

    def ask(question: str) -> None:
        barrier.wait()
        answers[question] = conversation.ask(question, max_new_tokens=5).text

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [message["content"][-1]["text"] for message in conversation.messages]
    assert sorted(texts[::2]) == questions
    assert [answers[question] for question in texts[::2]] == texts[1::2]
    asked_again = session.conversation(conversation.images)
    assert [asked_again.ask(question, max_new_tokens=5).text for question in texts[::2]] == texts[1::2]


def test_streams_of_one_conversation_answer_in_the_order_of_asking(session: FlashSloth) -> None:
    conversation = session.conversation(noise_image())
    streams = [conversation.stream(question, max_new_tokens=5) for question in QUESTIONS]
    last = conversation.ask("last?", max_new_tokens=5)
    asked = [message["content"][-1]["text"] for message in conversation.messages[::2]]
    assert asked == [*QUESTIONS, "last?"]
    assert ["".join(stream).strip() for stream in streams] == [stream.answer.text for stream in streams]
    assert last.text == conversation.messages[-1]["content"][0]["text"]


def test_a_question_from_within_an_answer_is_refused(session: FlashSloth) -> None:
    conversation = session.conversation(noise_image())
    with pytest.raises(ValueError, match="from within one of its own answers"):
        conversation.ask("what?", max_new_tokens=5, on_text=lambda text: conversation.ask("why?"))
    assert conversation.ask("what?", max_new_tokens=5).text


def test_a_turn_that_was_given_up_while_it_waited_blocks_nobody(
    session: FlashSloth, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = session.conversation(noise_image())

    def interrupted(condition: Callable[[], bool]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversation._queue._condition, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("what?")
    assert conversation.ask("what?", max_new_tokens=5).text


def test_a_stream_read_twice_gives_its_text_twice(session: FlashSloth) -> None:
    stream = session.stream(noise_image(), "what is it?", max_new_tokens=20)
    assert list(stream) == list(stream) and stream.answer.text


def test_a_stream_left_early_gives_what_was_read(session: FlashSloth) -> None:
    stream = session.stream(noise_image(), "what is it?", max_new_tokens=100)
    first = next(iter(stream))
    assert list(stream)[0] == first


def test_a_failed_stream_raises_each_time_it_is_read(session: FlashSloth) -> None:
    stream = session.stream(noise_image(), " ")
    for _ in range(2):
        with pytest.raises(ValueError, match="question is empty"):
            list(stream)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_says_why_it_cannot_answer(session: FlashSloth, monkeypatch: pytest.MonkeyPatch) -> None:
    session.ask(noise_image(), "what?", max_new_tokens=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    child = os.fork()
    if child == 0:  # no torch operation of several threads, which may hang here
        try:
            session.encode_views(torch.zeros(1))
        except RuntimeError as error:
            os._exit(0 if "spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    monkeypatch.setattr(runtime.os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="forked"):
        load("nano")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    runtime.refuse_after_fork()

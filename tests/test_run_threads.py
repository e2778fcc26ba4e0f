"""Threads of a run: shared among streams and workers, and stopped with it."""

import signal
import threading
import time

import pytest
import torch

from flashsloth.offline import Record, RunSettings, run_records, runner
from tiny_session import noise_image


@pytest.fixture
def records(tmp_path):
    for index in range(4):
        noise_image(index).save(tmp_path / f"{index}.png")
    return [Record(str(index), (str(tmp_path / f"{index}.png"),), "what is it?") for index in range(4)]


@pytest.mark.parametrize(
    ("threads", "streams", "workers", "expected"),
    [(2, 1, 0, 2), (2, 1, 2, 1), (8, 1, 2, 6), (8, 2, 1, 4), (8, 2, 4, 2), (5, 2, 0, 2), (2, 1, 9, 1), (3, 2, 1, 1)],
)
def test_streams_leave_the_cores_of_workers_to_them(threads, streams, workers, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with runner._threads_of_a_stream(streams, workers):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_run_with_workers_asks_with_the_threads_that_are_left(records, tmp_path, monkeypatch):
    seen, ask = [], runner.answer
    monkeypatch.setattr(runner, "answer", lambda *args: (seen.append(torch.get_num_threads()), ask(*args))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        settings = RunSettings(device="cpu", batch_size=2, workers=2, streams=1, max_new_tokens=2)
        assert run_records(records, tmp_path / "out.jsonl", settings).answered == 4
        assert seen == [1, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signal can be sent to a thread here")
def test_an_interrupt_does_not_wait_for_long_answers_of_streams(records, tmp_path, monkeypatch):
    """Answers of half a minute are broken off at their next token."""
    load, asked = runner.load, threading.Event()

    def slow(*args, **options):
        session = load(*args, **options)
        session.model.generation_config.eos_token_id = None
        session.model.register_forward_pre_hook(lambda *_: (asked.set(), time.sleep(0.1))[0])
        return session

    def interrupt(main: int) -> None:
        asked.wait()
        interrupted.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)
        if not ended.wait(10):  # Python drops an interrupt that falls into a finalizer
            interrupted.append(time.monotonic())
            signal.pthread_kill(main, signal.SIGINT)

    monkeypatch.setattr(runner, "load", slow)
    settings = RunSettings(device="cpu", batch_size=1, workers=0, streams=2, max_new_tokens=300)
    interrupted: list[float] = []
    ended = threading.Event()
    thread = threading.Thread(target=interrupt, args=[threading.get_ident()])
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_records(records, tmp_path / "out.jsonl", settings)
    assert time.monotonic() - interrupted[-1] < 15
    ended.set()
    thread.join()
    streams = [other for other in threading.enumerate() if other.name.startswith("ThreadPoolExecutor")]
    for stream in streams:
        stream.join(10)
        assert not stream.is_alive()

"""Compiled sessions: answers of uncompiled ones, turns on a cache of fixed size, a sentence where no compiler is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._inductor import cudagraph_trees
from transformers import CompileConfig, PreTrainedConfig, StaticCache

from flashsloth.inference import FlashSloth, load, runtime, session
from flashsloth.kernels import compilation
from flashsloth.kernels.compilation import CACHE_STEP, RecordingThread, check_compiler
from flashsloth.kernels.int8_linear import Int8Linear, onednn_available
from flashsloth.kernels.packed_layers import PackedLinear, supported
from flashsloth.kernels.widened_layers import WidenedLinear
from flashsloth.offline import Record, RunSettings, run_records
from flashsloth.serve.engine import Engine
from flashsloth.serve.requests import Piece
from flashsloth_cli.main import main
from test_serve_engine import CASES, MODELS, make_session
from tiny_session import noise_image, tiny_folder

NEW_TOKENS = 6
QUESTIONS = ("what is it?", "and which colour has it, now that you have looked?", "what?")


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and guarded as always, but their kernels are torch's own: seconds instead of a minute."""
    torch._dynamo.reset()

    def compile_part(part: torch.nn.Module, device: torch.device, dynamic: bool | None) -> None:
        part.compile(backend="aot_eager", dynamic=dynamic)

    def decoding_config(device: torch.device) -> CompileConfig:
        config = CompileConfig(backend="aot_eager", mode=None, dynamic=True)
        config._compile_all_devices = True
        return config

    monkeypatch.setattr(runtime, "compile_part", compile_part)
    monkeypatch.setattr(runtime, "decoding_config", decoding_config)


def everything_asked(session: FlashSloth) -> list[tuple[str, int, int]]:
    """Text, prompt tokens and re-used tokens of turns, after a reset, of two images and of none."""
    conversation = session.conversation(noise_image())
    answers = [conversation.ask(question, max_new_tokens=NEW_TOKENS) for question in QUESTIONS]
    conversation.reset()
    answers.append(conversation.ask("what is it made of?", max_new_tokens=NEW_TOKENS))
    answers.append(session.ask([noise_image(1), noise_image(2)], "hm?", max_new_tokens=NEW_TOKENS))
    answers.append(session.ask([], "w" * 150, max_new_tokens=NEW_TOKENS))
    return [(answer.text, answer.prompt_tokens, answer.reused_tokens) for answer in answers]


# gemma3's layers with a sliding window cannot be cut
@pytest.mark.parametrize("decoder", ["phi", "gemma3"])
def test_a_compiled_session_gives_the_same_answers(quick_compiler: None, tmp_path: Path, decoder: str) -> None:
    folder = tiny_folder(tmp_path / "tiny", decoder=decoder)
    expected = everything_asked(load(folder, device="cpu"))
    assert expected[1][2] > 0  # turns re-use
    session = load(folder, device="cpu", compile=True)
    assert session.warm_up(noise_image(), NEW_TOKENS) > 0
    assert everything_asked(session) == expected
    stream = session.stream(noise_image(), QUESTIONS[0], max_new_tokens=NEW_TOKENS)  # from another thread
    assert "".join(stream).strip() == expected[0][0]


@pytest.mark.parametrize("name", ["phi", pytest.param("HD", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:the server compiles the encoder only")
def test_a_server_of_a_compiled_session_gives_the_same_answers(quick_compiler: None, name: str) -> None:
    """With another number of images in every call, and not without the embedded query module."""

    def served(compile: bool, without_embedded_query: bool = False) -> list[str]:
        plain = make_session(**MODELS[name])
        if without_embedded_query:
            plain.model.model.embedded_query.up_projection.weight.data.zero_()
        engine = Engine(FlashSloth(plain.model, plain.processor, compile=compile))
        tickets = []
        engine.start()
        for index, request in enumerate(CASES.values()):
            tickets.append(engine.submit(request))
            if index % 4 == 0:
                tickets[-1].get(timeout=600)  # the first compiles
        texts = ["".join(event.text for event in ticket if isinstance(event, Piece)) for ticket in tickets]
        assert engine.statistics().embedded_query_prompts == len(CASES)
        engine.stop()
        return texts

    uncompiled = served(False)
    assert served(True) == uncompiled
    # the pieces that were read while the others joined are lost in both
    assert all(own != other for own, other in zip(served(True, True), uncompiled, strict=True))


def test_decoding_runs_one_graph_however_long_the_prompt(quick_compiler: None, tmp_path: Path) -> None:
    session = load(tiny_folder(tmp_path / "tiny"), device="cpu", compile=True)
    session.warm_up([], NEW_TOKENS)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (1, 40, 200):
            assert session.ask([], "w" * length, max_new_tokens=NEW_TOKENS).new_tokens == NEW_TOKENS


def test_a_cache_that_is_full_grows_and_keeps_its_turns(
    quick_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    expected = everything_asked(load(folder, device="cpu"))
    monkeypatch.setattr(compilation, "CACHE_STEP", 32)
    sizes = []

    def static_cache(config: PreTrainedConfig, max_cache_len: int) -> StaticCache:
        sizes.append(max_cache_len)
        return StaticCache(config=config, max_cache_len=max_cache_len)

    monkeypatch.setattr(compilation, "StaticCache", static_cache)
    assert everything_asked(load(folder, device="cpu", compile=True)) == expected
    assert len(set(sizes)) > 1 and all(size % 32 == 0 for size in sizes)


def test_the_cache_of_a_compiled_session_has_a_fixed_size(quick_compiler: None, tmp_path: Path) -> None:
    session = load(tiny_folder(tmp_path / "tiny"), device="cpu", compile=True)
    conversation = session.conversation([])
    conversation.ask("what is it?", max_new_tokens=NEW_TOKENS)
    assert isinstance(conversation._cache, StaticCache)
    assert conversation._cache.layers[0].keys.shape[2] == CACHE_STEP


def test_a_compiled_run_gives_the_same_answers(quick_compiler: None, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    for seed in range(3):
        noise_image(seed).save(tmp_path / f"{seed}.png")
    questions = ("what?", "what is it?", "how many are there?", "and now?", "is it red?")
    records = [Record(str(index), (str(tmp_path / f"{index % 3}.png"),), text) for index, text in enumerate(questions)]
    written = []
    for compiled in (False, True):
        out = tmp_path / f"{compiled}.jsonl"
        settings = RunSettings(
            str(folder), device="cpu", batch_size=2, workers=0, max_new_tokens=NEW_TOKENS, compile=compiled
        )
        run_records(records, out, settings)
        written.append(out.read_text())
    assert written[0] == written[1]


def test_a_missing_compiler_is_one_sentence_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(session, "load_model", None)
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(ValueError, match="needs a C\\+\\+ compiler: install g\\+\\+"):
            load("nano", device="cpu", compile=True)
        assert main(["ask", "absent.png", "what?", "--device", "cpu", "--compile"]) == 2
    assert "install g++" in capsys.readouterr().err


def test_recorded_calls_come_from_one_thread(quick_compiler: None, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    expected = everything_asked(load(folder, device="cpu"))
    session = load(folder, device="cpu", compile=True)
    session._thread = RecordingThread()  # as on a GPU
    seen = set()
    for owner, name in ((session.model, "generate"), (session.model.model, "encode_views")):
        function = getattr(owner, name)

        def noted(*args, function=function, **kwargs):
            seen.add(threading.get_ident())
            return function(*args, **kwargs)

        setattr(owner, name, noted)
    assert everything_asked(session) == expected
    stream = session.stream(noise_image(), QUESTIONS[0], max_new_tokens=NEW_TOKENS)
    assert "".join(stream).strip() == expected[0][0]
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(session.ask, noise_image(), "?", max_new_tokens=NEW_TOKENS) for _ in range(3)]
        assert len({future.result().text for future in futures}) == 1
    assert len(seen) == 1 and threading.get_ident() not in seen


def test_a_recording_thread_hands_over_results_and_errors() -> None:
    thread = RecordingThread()

    def fail() -> None:
        raise KeyError("a reason")

    assert thread.call(torch.is_inference_mode_enabled) and not torch.is_inference_mode_enabled()
    assert thread.call(thread.call, max, 1, 2) == 2  # from within
    with pytest.raises(KeyError, match="a reason"):
        thread.call(fail)
    containers = thread.call(lambda: cudagraph_trees.get_obj(cudagraph_trees.local, "tree_manager_containers"))
    assert containers is not cudagraph_trees.get_obj(cudagraph_trees.local, "tree_manager_containers")


def test_the_output_of_a_recorded_call_is_copied() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    states = torch.randn(2, 3)
    output = BaseModelOutput(last_hidden_state=states, hidden_states=(states, states + 1))
    copied = compilation._copied(output)
    states.zero_()
    assert type(copied) is BaseModelOutput and copied.last_hidden_state.abs().sum() > 0
    assert torch.equal(copied.hidden_states[0] + 1, copied.hidden_states[1])
    assert copied.attentions is None


@pytest.mark.gpu
def test_a_session_compiled_for_a_gpu_answers_alike_from_every_thread() -> None:
    expected = everything_asked(load("nano", device="cuda", dtype="float32"))
    session = load("nano", device="cuda", dtype="float32", compile=True)
    session.warm_up(noise_image(), NEW_TOKENS)
    for _ in range(2):
        assert everything_asked(session) == expected
        stream = session.stream(noise_image(), QUESTIONS[0], max_new_tokens=NEW_TOKENS)
        assert "".join(stream).strip() == expected[0][0]
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(session.ask, noise_image(), QUESTIONS[0], max_new_tokens=NEW_TOKENS) for _ in range(6)]
        assert {future.result().text for future in futures} == {expected[0][0]}


def test_devices_that_are_not_compiled_for_are_refused() -> None:
    with pytest.raises(ValueError, match="compiling is for cpu and cuda, not for mps"):
        check_compiler(torch.device("mps"))


def test_a_bad_image_is_refused_before_anything_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "absent.png", "what?", "--device", "cpu", "--compile"]) == 2
    err = capsys.readouterr().err
    assert "absent.png" in err and "compiled" not in err


@pytest.mark.parametrize(
    "quick_form",
    [
        pytest.param(Int8Linear.from_float, marks=pytest.mark.skipif(not onednn_available(), reason="no VNNI here")),
        pytest.param(PackedLinear, marks=pytest.mark.skipif(not supported(torch.float32), reason="no oneDNN here")),
        WidenedLinear,
    ],
    ids=["int8", "packed", "widened"],
)
@torch.inference_mode()
def test_a_quick_layer_compiles_to_the_same_numbers(quick_form: Callable[[torch.nn.Linear], torch.nn.Module]) -> None:
    torch._dynamo.reset()
    layer = quick_form(torch.nn.Linear(64, 32).requires_grad_(False))
    for rows in (9, 1):
        values = torch.randn(2, rows, 64)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(values), layer(values))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "int8-dynamic-cpu"])
def test_the_command_compiles_once_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str | None
) -> None:
    torch._dynamo.reset()
    folder = tiny_folder(tmp_path / "tiny")
    noise_image().save(tmp_path / "noise.png")
    words = ["ask", str(tmp_path / "noise.png"), "what is it?", "-m", str(folder), "--device", "cpu"]
    words += ["--max-new-tokens", "8", *(["--quantize", scheme] if scheme else [])]
    assert main(words) == 0
    expected = capsys.readouterr().out.splitlines()[-1]  # libraries may log before it, at their first import
    assert main([*words, "--compile"]) == 0
    found = capsys.readouterr()
    assert found.out.splitlines()[-1] == expected
    assert "compiled, once, in" in found.err

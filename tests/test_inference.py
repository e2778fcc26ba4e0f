"""Asking a model: equal to plain `generate`, encodes once, re-uses its cache, refuses broken folders."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flashsloth import hub
from flashsloth.inference import FlashSloth, load, select_device
from tiny_session import noise_image, tiny_folder

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def session(folder: Path) -> FlashSloth:
    return load(folder, device="cpu")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def plain_answer(session: FlashSloth, messages: list[dict]) -> str:
    """The same question through processor and `generate` alone."""
    inputs = session.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = session.model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    return session.processor.tokenizer.decode(new_ids, skip_special_tokens=True).strip()


def user(text: str, *images: object) -> dict:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


class CallCounter:
    """Counts the forward calls of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        self.handle = module.register_forward_hook(self)

    def __call__(self, *_: object) -> None:
        self.calls += 1


@pytest.mark.parametrize("images", [0, 1, 2])
def test_ask_is_generate(session: FlashSloth, images: int) -> None:
    pictures = [noise_image(seed) for seed in range(images)]
    answer = session.ask(pictures, "what is it?", max_new_tokens=NEW_TOKENS)
    assert answer.text == plain_answer(session, [user("what is it?", *pictures)])
    assert answer.visual_tokens == images * session.config.num_image_tokens
    assert answer.uncompressed_tokens == images * session.config.num_patches_per_view
    assert answer.new_tokens == NEW_TOKENS


def test_every_stage_is_timed(session: FlashSloth) -> None:
    started = time.perf_counter()
    timings = session.ask(noise_image(), "what is it?", max_new_tokens=NEW_TOKENS).timings
    wall = time.perf_counter() - started
    stages = (timings.preprocess, timings.encode, timings.compress, timings.prefill, timings.decode)
    assert min(stages) > 0
    assert timings.total == pytest.approx(sum(stages))
    assert timings.total <= wall


def test_a_conversation_encodes_once_and_continues_its_cache(session: FlashSloth) -> None:
    image = noise_image()
    encoder = CallCounter(session.model.model.vision_tower)
    conversation = session.conversation(image)
    first = conversation.ask("what is it?", max_new_tokens=NEW_TOKENS)
    second = conversation.ask("which colour has it?", max_new_tokens=NEW_TOKENS)
    encoder.handle.remove()
    assert encoder.calls == 1
    # All of the first prompt and all of its answer but the last token, which never ran.
    assert second.reused_tokens == first.prompt_tokens + NEW_TOKENS - 1
    assert (second.timings.encode, second.timings.compress) == (0, 0)
    history = [user("what is it?", image), assistant(first.text), user("which colour has it?")]
    assert second.text == plain_answer(session, history)


def test_the_image_matters(session: FlashSloth) -> None:
    answers = {session.ask(noise_image(seed), "what is it?", max_new_tokens=20).text for seed in range(4)}
    assert len(answers) > 1


def test_reset_forgets_the_turns_but_not_the_image(session: FlashSloth) -> None:
    image = noise_image()
    conversation = session.conversation(image)
    first = conversation.ask("what is it?", max_new_tokens=NEW_TOKENS)
    conversation.ask("and now?", max_new_tokens=NEW_TOKENS)
    for question in ("what is it?", "what is it made of?", "how many are there?"):
        conversation.reset()
        again = conversation.ask(question, max_new_tokens=NEW_TOKENS)
        # of the cache only what stands before the question, even where two questions begin alike
        assert first.visual_tokens <= again.reused_tokens < first.prompt_tokens
        assert again.text == plain_answer(session, [user(question, image)])
        assert again.timings.encode == 0


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(session: FlashSloth) -> None:
    class InterruptionError(Exception):
        pass

    def interrupt(text: str) -> None:
        raise InterruptionError

    image = noise_image()
    conversation = session.conversation(image)
    first = conversation.ask("what is it?", max_new_tokens=NEW_TOKENS)
    with pytest.raises(InterruptionError):
        conversation.ask("never answered", max_new_tokens=NEW_TOKENS, on_text=interrupt)
    second = conversation.ask("and now?", max_new_tokens=NEW_TOKENS)
    assert second.text == plain_answer(session, [user("what is it?", image), assistant(first.text), user("and now?")])


def test_an_answer_that_reads_differently_is_cut_from_the_cache(session: FlashSloth) -> None:
    image = noise_image()
    conversation = session.conversation(image)
    conversation.ask("what is it?", max_new_tokens=NEW_TOKENS)
    conversation.messages[-1] = assistant("no")
    second = conversation.ask("and now?", max_new_tokens=NEW_TOKENS)
    assert second.text == plain_answer(session, [user("what is it?", image), assistant("no"), user("and now?")])


def test_stream_gives_the_text_of_ask(session: FlashSloth) -> None:
    stream = session.stream(noise_image(), "what is it?", max_new_tokens=30)
    assert "".join(stream).strip() == session.ask(noise_image(), "what is it?", max_new_tokens=30).text
    assert stream.answer is not None
    assert stream.answer.new_tokens == 30


def test_stream_raises_where_it_is_read(session: FlashSloth) -> None:
    with pytest.raises(ValueError, match="question is empty"):
        list(session.stream(noise_image(), " "))


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        (" \n", {}, "question is empty"),
        ("long " * 100, {}, "context of 256"),
        ("what?", {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_questions_that_cannot_be_answered(session: FlashSloth, question: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.ask(noise_image(), question, **options)


def test_equal_views_are_encoded_once_where_asked_for(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "views", view_grid=(2, 2))
    wide = noise_image(size=(64, 16))  # padded to a square: tiles above and below are blank
    answers, encoded = [], []
    for share in (False, True):
        session = load(folder, device="cpu", share_equal_views=share)
        views = []
        session.model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs, views=views: views.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
        )
        answers.append(session.ask([wide, wide], "what is it?", max_new_tokens=NEW_TOKENS).text)
        encoded.append(sum(views))
    assert encoded[0] == 10 and encoded[1] <= 5
    assert answers[0] == answers[1]


def test_an_answer_ends_with_the_context(session: FlashSloth) -> None:
    with pytest.warns(UserWarning, match="lowered"):
        answer = session.ask([], "w" * 240, max_new_tokens=100)
    assert answer.prompt_tokens + answer.new_tokens == 256


def test_automatic_dtype_is_float32_on_a_cpu(session: FlashSloth, folder: Path) -> None:
    assert session.model.dtype == torch.float32
    assert load(folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("arguments", [{"device": "tpu7"}, {"device": "meta"}, {"dtype": "int3"}])
def test_unknown_device_or_dtype(folder: Path, arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="device|dtype"):
        load(folder, **arguments)


def test_a_missing_accelerator_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="not available"):
        select_device("cuda")


def change_tensors(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.projector.0.weight"
    if change == "missing":
        del tensors[name]
    elif change == "misshapen":
        tensors[name] = tensors[name][:, 1:].contiguous()
    else:
        tensors["model.projector.7.weight"] = torch.zeros(1)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["missing", "misshapen", "unexpected"])
def test_every_tensor_is_accounted_for(broken: Path, change: str) -> None:
    change_tensors(broken, change)
    with pytest.raises(ValueError, match=r"model\.projector\.(0|7)\.weight"):
        load(broken, device="cpu")


def test_a_truncated_weight_file(broken: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load(broken, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compresor": "average"}, "compresor"),
        ({"compressor_window": "three"}, "compressor_window"),
        ({"compressor": "magic"}, "magic"),
        ({"model_type": "llama"}, "llama"),
    ],
)
def test_a_broken_configuration(broken: Path, change: dict, message: str) -> None:
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load(broken, device="cpu")


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object(broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json"):
        hub.resolve(broken)


def test_a_folder_without_a_processor(broken: Path) -> None:
    (broken / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="no processor"):
        load(broken, device="cpu")


def test_a_pickle_checkpoint_is_refused(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        hub.resolve(broken)


@pytest.mark.parametrize("name", ["no-such-model", "no/such/model", "./nowhere", "owner/never-downloaded", "a b/c"])
def test_an_unknown_model(name: str) -> None:
    with pytest.raises(ValueError, match="no model"):
        hub.resolve(name)


def test_a_packaged_model_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.PACKAGED_MODELS, "lost", tmp_path)
    with pytest.raises(ValueError, match="install flashsloth again"):
        hub.resolve("lost")


def test_only_safe_files_are_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.resolve("owner/model") == folder
    assert any(Path("model-00001-of-00002.safetensors").match(pattern) for pattern in patterns)
    for file in ("pytorch_model.bin", "model.pt", "modeling.py"):
        assert not any(Path(file).match(pattern) for pattern in patterns)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    source = tmp_path / "official"
    source.mkdir()
    config = {"model_type": "phi", "architectures": ["FlashSlothForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": torch.zeros(1)}, source / "model.safetensors")
    return source


def test_an_authors_checkpoint_is_converted_once(
    official: Path, folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def convert(source: Path, destination: Path) -> None:
        calls.append(source)
        shutil.copytree(folder, destination)

    monkeypatch.setattr("flashsloth.checkpoints.convert_official.convert_checkpoint", convert)
    first = hub.resolve(official)
    assert first == hub.resolve(official)
    assert first.is_relative_to(cache_folder)
    assert calls == [official]
    save_file({"lm_head.weight": torch.ones(2)}, official / "model.safetensors")
    assert hub.resolve(official) != first


def test_a_failed_conversion_leaves_nothing(
    official: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, destination: Path) -> None:
        destination.mkdir()
        (destination / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr("flashsloth.checkpoints.convert_official.convert_checkpoint", convert)
    with pytest.raises(OSError, match="No space"):
        hub.resolve(official)
    assert [path for path in cache_folder.rglob("*") if path.is_file()] == []

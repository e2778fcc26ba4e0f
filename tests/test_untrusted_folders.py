"""Model folders made by others: no code of theirs runs, no file elsewhere is read, what is broken is one line."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flashsloth import inference
from flashsloth.checkpoints import hub
from flashsloth.checkpoints.adapters import load_merged
from flashsloth.checkpoints.convert_official import convert_checkpoint
from flashsloth.checkpoints.pretrained import load_any_config, load_config, load_processor, load_tokenizer
from flashsloth.checkpoints.remote_code import save_with_code
from flashsloth_cli.main import main
from tiny_session import noise_image, tiny_folder

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(file: Path, **values: object) -> None:
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | values))


def message_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that ends with one line and code 2."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert (code, captured.out, len(lines)) == (2, "", 1), captured.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 2200
    return lines[0]


# Code


class Marker:
    """Python code that leaves a file where it runs."""

    def __init__(self, place: Path) -> None:
        self.file = place / "the-code-ran"
        self.source = f"open({str(self.file)!r}, 'w').close()\n"

    def put_into(self, folder: Path) -> None:
        names = ("Config", "Model", "Tokenizer", "Processor", "ImageProcessor")
        classes = "".join(f"class Own{name}:\n    pass\n" for name in names)
        (folder / "own_code.py").write_text(self.source + classes)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(self.source + "def generate(model, **_): ...\n")

    @property
    def ran(self) -> bool:
        return self.file.exists()


AUTO_MAP = {
    "AutoConfig": "own_code.OwnConfig",
    "AutoModel": "own_code.OwnModel",
    "AutoModelForCausalLM": "own_code.OwnModel",
    "AutoModelForImageTextToText": "own_code.OwnModel",
    "AutoTokenizer": ["own_code.OwnTokenizer", "own_code.OwnTokenizer"],
    "AutoProcessor": "own_code.OwnProcessor",
    "AutoImageProcessor": "own_code.OwnImageProcessor",
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Marker:
    """With somebody, or a pipe, that says yes to every question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return Marker(tmp_path)


def plant_code(folder: Path, place: str) -> None:
    """Ask for the code in one file, and make it the only way where the file can."""
    if place == "config.json":
        change(folder / place, auto_map=AUTO_MAP, model_type="own")
    elif place in ("text_config", "vision_config"):
        settings = json.loads((folder / "config.json").read_text())
        # a configuration that no AutoModel of transformers knows, and code that is found from anywhere
        model_type = "siglip_text_model"
        auto_map = {"AutoModel": f"{folder}--own_code.OwnModel"}
        change(folder / "config.json", **{place: settings[place] | {"auto_map": auto_map, "model_type": model_type}})
    elif place == "tokenizer_config.json":
        change(folder / place, auto_map=AUTO_MAP, tokenizer_class="OwnTokenizer")
    elif place == "processor_config.json":
        change(folder / place, auto_map=AUTO_MAP, processor_class="OwnProcessor")
    else:
        settings = {"auto_map": AUTO_MAP, "image_processor_type": "OwnImageProcessor"}
        change(folder / "preprocessor_config.json", **settings)
        change(folder / "processor_config.json", image_processor=settings)


@pytest.mark.parametrize(
    "place",
    [
        "config.json",
        "text_config",
        "vision_config",
        "tokenizer_config.json",
        "processor_config.json",
        "preprocessor_config.json",
    ],
)
def test_the_code_of_a_folder_never_runs(folder: Path, marker: Marker, place: str, tmp_path: Path) -> None:
    marker.put_into(folder)
    plant_code(folder, place)
    (tmp_path / "image.png").write_bytes(b"")
    noise_image().save(tmp_path / "image.png")
    ways: list[Callable[[], object]] = [
        lambda: inference.load(folder, device="cpu"),
        lambda: load_config(folder),
        lambda: load_any_config(folder),
        lambda: load_tokenizer(folder),
        lambda: load_processor(folder),
        lambda: main(["info", str(folder)]),
        lambda: main(["quantize", str(folder), str(tmp_path / "q"), "--scheme", "int8-weight-only"]),
        lambda: main(["ask", str(tmp_path / "image.png"), "what?", "-m", str(folder), "--max-new-tokens", "1"]),
    ]
    errors = []
    for way in ways:
        try:
            way()
        except ValueError as error:
            errors.append(str(error))
        assert not marker.ran
    if place in ("config.json", "tokenizer_config.json"):
        assert any("never run here" in error for error in errors)


def test_a_folder_with_our_own_code_loads_by_the_installed_classes(folder: Path, marker: Marker) -> None:
    session = inference.load(folder, device="cpu", kernels="torch")
    save_with_code(session.model, session.processor, folder)
    with (folder / "modeling_flashsloth.py").open("a") as file:
        file.write(marker.source)
    assert inference.load(folder, device="cpu").ask([], "what?", max_new_tokens=1)
    assert not marker.ran


def test_attention_that_would_be_fetched_is_refused(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="somebody/attention")
    with pytest.raises(ValueError, match="code to be fetched"):
        inference.load(folder)


# Files


def shard(folder: Path, name: str) -> None:
    """Weights in one shard of that name, which the index spells as it is."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    shutil.copy(folder.parent / "elsewhere.safetensors", folder / "model-1.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))


def ways_to_read(folder: Path, tmp_path: Path) -> list[list[object]]:
    return [
        ["info", folder],
        ["ask", tmp_path / "none.png", "what?", "-m", folder],
        ["convert", folder, tmp_path / "new" / "deep"],
        ["convert", folder, tmp_path / "new" / "deep", "--to-official"],
        ["quantize", folder, tmp_path / "new" / "deep", "--scheme", "int8-weight-only"],
        ["evaluate-synthetic", folder],
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pickle"),
        ("../elsewhere.safetensors", "plain name"),
        ("..\\elsewhere.safetensors", "plain name"),
        ("{parent}/elsewhere.safetensors", "plain name"),
        ("C:elsewhere.safetensors", "plain name"),
        ("absent.safetensors", "lacks absent.safetensors"),
        (["model-1.safetensors"], "no name of a file"),
    ],
)
def test_an_index_names_safetensors_in_its_folder(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, name: object, message: str
) -> None:
    shard(folder, name.format(parent=tmp_path) if isinstance(name, str) else name)  # type: ignore[arg-type]
    for arguments in ways_to_read(folder, tmp_path):
        error = message_of(capsys, *arguments)
        assert message in error
        assert str(folder) in error
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=message):
        inference.load_model(folder)


def test_shards_and_links_into_a_cache_are_read(folder: Path, tmp_path: Path) -> None:
    shard(folder, "model-1.safetensors")
    (tmp_path / "blobs").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(os.path.join("..", "blobs", path.name))
    assert inference.load(folder, device="cpu").ask([], "what?", max_new_tokens=1)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("config.json", {"transformers_weights": "../elsewhere.safetensors"}, "names its weights itself"),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "plain name"),
        ("tokenizer_config.json", {"tokenizer_file": "../tokenizer.json"}, "plain name"),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "/"}}, "audio tokenizer"),
    ],
)
def test_settings_name_no_files_elsewhere(folder: Path, file: str, settings: dict, message: str) -> None:
    change(folder / file, **settings)
    with pytest.raises(ValueError, match=message):
        inference.load(folder)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


def test_an_official_record_writes_no_files_elsewhere(folder: Path, tmp_path: Path) -> None:
    change(folder / "official_checkpoint.json", tokenizer_settings={"../../written.json": {}})
    assert main(["convert", str(folder), str(tmp_path / "new"), "--to-official"]) == 2
    assert not (tmp_path / "written.json").exists()


# Shapes


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


CONTENTS = {
    "empty": b"",
    "list": b"[1, 2]",
    "number": b"7",
    "deep": nested(100_000).encode(),
    "not UTF-8": b'{"a": "\xff"}',
    "byte-order mark": b"\xef\xbb\xbf{}",
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "NaN": b'{"a": NaN}',
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX])
def test_a_file_of_another_shape_is_named(folder: Path, file: str, content: str) -> None:
    (folder / file).write_bytes(CONTENTS[content])
    with pytest.raises(ValueError, match=file):
        inference.load(folder)


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("generation_config.json", {"suppress_tokens": "all"}, "no token"),
        ("generation_config.json", {"eos_token_id": [1, 10**9]}, "no token"),
        ("generation_config.json", {"pad_token_id": True}, "no token"),
        ("generation_config.json", {"guidance_scale": "high"}, "no number"),
        ("processor_config.json", {"user_header": 7}, "user_header"),
        ("processor_config.json", {"num_image_tokens": 4.5}, "num_image_tokens"),
        ("processor_config.json", {"num_image_tokens": 10**12}, "num_image_tokens"),
        ("processor_config.json", {"image_processor": {"image_mean": ["x"] * 3}}, "cannot be loaded"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "model_max_length"),
    ],
)
def test_what_would_fail_in_an_answer_is_refused_before(folder: Path, file: str, changed: dict, message: str) -> None:
    change(folder / file, **changed)
    with pytest.raises(ValueError, match=message):
        inference.load(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_pipe_is_refused_and_not_waited_for(folder: Path, file: str) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(ValueError, match="regular file|no config.json|no .* weights"):
        inference.load(folder)


def header(length: int, content: bytes) -> bytes:
    return struct.pack("<Q", length) + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header(2**63, b"{}"),
        header(2, b"{}"),
        header(2, b"[]"),
        header(64, b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}    '),
    ],
)
def test_a_damaged_weight_file_is_named(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, content: bytes
) -> None:
    (folder / "model.safetensors").write_bytes(content)
    for arguments in ways_to_read(folder, tmp_path):
        message = message_of(capsys, *arguments)
        assert str(folder / "model.safetensors") in message
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("part", "sizes"),
    [
        ("text_config", {"num_hidden_layers": 10**12}),
        ("vision_config", {"num_hidden_layers": 10**12}),
        ("text_config", {"vocab_size": 10**12}),
        ("text_config", {"hidden_size": 10**9, "num_attention_heads": 1}),
        ("text_config", {"intermediate_size": 10**15}),
        ("vision_config", {"intermediate_size": 10**300}),
        (None, {"num_query_tokens": 10**12}),
    ],
)
def test_sizes_that_no_computer_holds_are_refused(folder: Path, part: str | None, sizes: dict) -> None:
    change_sizes(folder, part, sizes)
    with pytest.raises(ValueError, match="config.json"):
        inference.load_model(folder)
    assert main(["info", str(folder)]) == 2


def change_sizes(folder: Path, part: str | None, sizes: dict) -> None:
    settings = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", **(sizes if part is None else {part: settings[part] | sizes}))


@pytest.mark.parametrize(
    ("part", "sizes"),
    [
        ("text_config", {"num_hidden_layers": 10**4}),
        ("vision_config", {"num_hidden_layers": 10**4}),
        ("text_config", {"vocab_size": 10**8}),
        ("vision_config", {"intermediate_size": 10**8}),
        (None, {"embedded_query_hidden_size": 10**8}),
    ],
)
def test_sizes_are_compared_with_the_files_before_memory_is_taken(folder: Path, part: str | None, sizes: dict) -> None:
    change_sizes(folder, part, sizes)
    with pytest.raises(ValueError, match="far larger than its files|but the files hold"):
        inference.load_model(folder)


# Adapters


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """An adapter that changes nothing."""
    peft = pytest.importorskip("peft")
    target = ["language_model.layers.0.self_attn.q_proj"]
    wrapped = peft.get_peft_model(inference.load_model(folder), peft.LoraConfig(r=2, target_modules=target))
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(tmp_path / "adapter")
    load_merged(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model_name_or_path": ["a"]}, "names no base model"),
        ({"base_model_name_or_path": "{adapter}"}, "stands on itself"),
        ({"megatron_config": {"a": 1}, "megatron_core": "own_code"}, "module to import"),
        ({"corda_config": {"cache_file": "/etc/passwd"}, "init_lora_weights": "corda"}, "file elsewhere"),
        ({"r": 10**12}, "no dimension above"),
        ({"rank_pattern": {"q_proj": 10**12}}, "no dimension above"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "cannot be merged"),
        ({"peft_type": "oops"}, "adapter"),
        ({"target_modules": {"a": 1}}, "adapter"),
    ],
)
def test_adapters_import_open_and_fill_nothing(
    capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path, settings: dict, message: str
) -> None:
    if settings.get("base_model_name_or_path") == "{adapter}":
        settings = {"base_model_name_or_path": str(adapter)}
    change(adapter / "adapter_config.json", **settings)
    error = message_of(capsys, "merge", adapter, tmp_path / "new" / "deep")
    assert message in error
    assert str(adapter) in error
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=message):
        inference.load_model(adapter)


def test_an_adapter_of_pickles_is_refused(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.safetensors" in message_of(capsys, "merge", adapter, tmp_path / "new")
    with pytest.raises(ValueError, match="pickle"):
        hub.resolve(adapter)


def test_sizes_of_stacked_adapters_are_those_of_the_whole_model(
    capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path, folder: Path
) -> None:
    upper = Path(shutil.copytree(adapter, tmp_path / "upper"))
    change(upper / "adapter_config.json", base_model_name_or_path=str(adapter))
    texts = []
    for name in (folder, upper):
        assert main(["info", str(name), "--json"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


# Whatever else


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["", "\ud800", "\0", "../x", "auto", "float32"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Paths to all values of nested objects, and to the first ones of lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@st.composite
def broken_files(draw: st.DrawFn, whole: Path) -> tuple[str, bytes]:
    """One file of the folder with one value of another type or size, or other bytes."""
    file = draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    content = (whole / file).read_bytes()
    if file.endswith(".json") and draw(st.booleans()):
        settings = json.loads(content)
        *path, last = draw(st.sampled_from(places(settings)[1:]))
        holder = settings
        for key in path:
            holder = holder[key]
        holder[last] = draw(VALUES)
        return file, json.dumps(settings).encode("utf-8", "surrogatepass")
    start = draw(st.integers(0, min(len(content) - 1, 20_000)))
    return file, content[:start] + draw(st.binary(max_size=8)) + content[start + draw(st.integers(0, 50)) :]


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_broken_folder_is_one_error_or_a_model(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    file, content = data.draw(broken_files(whole))
    folder = tmp_path / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / file).write_bytes(content)
    with contextlib.suppress(ValueError):
        inference.load(folder, device="cpu", kernels="torch")
    assert main(["info", str(folder)]) in (0, 2)
    with contextlib.suppress(ValueError):
        convert_checkpoint(folder, tmp_path / "new", to_official=True)

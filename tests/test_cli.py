"""The command line: answers on standard output, one line per error, exit code 2, nothing half-written."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flashsloth
import flashsloth_cli.main as cli
from flashsloth.kernels import packed_layers
from flashsloth_cli.main import COMMANDS, main
from tiny_session import noise_image, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    noise_image().save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one call."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a call that must fail with one line."""
    code, out, err = run(capsys, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert out == ""
    assert len(errors) == 1
    assert err.endswith(errors[0] + "\n")
    return errors[0]


def test_help_lists_every_command_without_torch() -> None:
    program = (
        "import sys; from flashsloth_cli.main import main; code = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'flashsloth'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f" {name} " in result.stdout for name in COMMANDS)


def test_no_command_imports_torch_before_it_runs() -> None:
    """Their help is quick, and what libraries warn of while they are imported stays away."""
    program = (
        "import importlib, sys; from flashsloth_cli.main import COMMANDS\n"
        "for target, _ in COMMANDS.values():\n"
        "    importlib.import_module(target.split(':')[0])\n"
        "sys.exit(str({'torch', 'transformers', 'flashsloth'} & set(sys.modules) or ''))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr.strip() == "", result.stderr


@pytest.mark.parametrize("name", ["ask", "chat", "convert", "info"])
def test_help_of_a_command_teaches(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"flashsloth {name} " in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        installed = metadata.version("flashsloth")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is on the path, not installed")
    assert run(capsys, "--version") == (0, f"flashsloth {installed}\n", "")
    assert installed == flashsloth.__version__


def test_unknown_command_and_missing_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "sing")[0] == 2
    assert run(capsys, "ask")[0] == 2


def test_ask_prints_the_answer_alone(capsys: pytest.CaptureFixture[str], folder: Path, image: Path) -> None:
    code, out, err = run(capsys, "ask", image, "what is it?", "-m", folder, "--max-new-tokens", 5)
    assert code == 0
    assert len(out.splitlines()) == 1
    assert "4 visual tokens instead of 36" in err
    assert all(stage in err for stage in ("preprocess", "encode", "compress", "prefill", "decode"))


def test_ask_json_and_stream_agree(capsys: pytest.CaptureFixture[str], folder: Path, image: Path) -> None:
    arguments = ["ask", image, "what is it?", "--model", folder, "--max-new-tokens", 5, "--device", "cpu"]
    _, plain, _ = run(capsys, *arguments)
    _, streamed, _ = run(capsys, *arguments, "--stream")
    code, out, _ = run(capsys, *arguments, "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["text"] == plain.strip() == streamed.strip()
    assert set(answer["timings"]) == {"preprocess", "encode", "compress", "prefill", "decode"}
    assert answer["new_tokens"] == 5


def test_ask_about_two_images(capsys: pytest.CaptureFixture[str], folder: Path, image: Path) -> None:
    code, out, _ = run(
        capsys, "ask", image, image, "which?", "-m", folder, "--json", "--dtype", "bfloat16", "--max-new-tokens", 2
    )
    assert code == 0
    assert json.loads(out)["visual_tokens"] == 8


def save_unusual(kind: str, path: Path) -> Path:
    picture = noise_image()
    if kind == "animated":
        picture.save(path.with_suffix(".gif"), save_all=True, append_images=[noise_image(1)])
        return path.with_suffix(".gif")
    if kind == "cmyk":
        picture.convert("CMYK").save(path.with_suffix(".jpg"))
        return path.with_suffix(".jpg")
    if kind == "palette":
        picture.convert("P").save(path)
    elif kind == "16 bit":
        Image.new("I;16", (30, 20), 40000).save(path)
    else:
        picture.convert("RGBA").save(path)
    return path


@pytest.mark.parametrize("kind", ["animated", "cmyk", "palette", "16 bit", "transparent"])
@pytest.mark.filterwarnings("ignore:.*frame")
def test_unusual_images_work(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, kind: str) -> None:
    picture = save_unusual(kind, tmp_path / "unusual.png")
    assert run(capsys, "ask", picture, "what?", "-m", folder, "--max-new-tokens", 1)[0] == 0


def broken_image(kind: str, path: Path) -> Path:
    if kind == "corrupt":
        path.write_bytes(b"this is no image" * 10)
    elif kind == "truncated":
        buffer = io.BytesIO()
        noise_image(size=(64, 64)).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue()[:3000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
        body = b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("kind", ["absent", "corrupt", "truncated", "empty", "folder", "huge"])
def test_bad_images(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, kind: str) -> None:
    picture = broken_image(kind, tmp_path / "broken.png")
    message = error_of(capsys, "ask", picture, "what is it?", "-m", folder)
    assert "broken.png" in message
    if kind == "huge":
        assert "larger than the limit" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{image}", " "], "question is empty"),
        (["{image}", "{image}"], "is a file"),
        (["{image}", "why? " * 200], "context|longer"),
        (["{image}", "what?", "--json", "--stream"], "exclude each other"),
        (["{image}", "what?", "--dtype", "int3"], "int3"),
        (["{image}", "what?", "--device", "tpu7"], "tpu7"),
    ],
)
def test_bad_questions_and_options(
    capsys: pytest.CaptureFixture[str], folder: Path, image: Path, arguments: list[str], message: str
) -> None:
    filled = [argument.format(image=image) for argument in arguments]
    assert re.search(message, error_of(capsys, "ask", *filled, "-m", folder))


def break_model(kind: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    if kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "tensor":
        tensors = load_file(weights)
        del tensors["model.query_tokens.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "key":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"compressor_windw": 3}))
    elif kind == "no config":
        (folder / "config.json").unlink()
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize("command", ["ask", "info"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "pickle"),
        ("tensor", "missing model.query_tokens.weight"),
        ("key", "'compressor_windw'"),
        ("no config", "config.json"),
        ("absent", "no model"),
    ],
)
def test_bad_models(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    image: Path,
    tmp_path: Path,
    command: str,
    kind: str,
    message: str,
) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "model"))
    break_model(kind, broken)
    if command == "ask":
        assert message in error_of(capsys, "ask", image, "what?", "-m", broken)
    elif kind == "tensor":  # nothing of the weights is read
        assert run(capsys, "info", broken)[0] == 0
    else:
        assert message in error_of(capsys, "info", broken)


def test_an_error_shows_its_traceback_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("FLASHSLOTH_DEBUG", "")
    code, _, err = run(capsys, "--debug", "ask", "absent.png", "what?", "-m", folder)
    assert code == 2
    assert "Traceback" in err


def test_a_bug_is_no_user_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("flashsloth_cli.options.load_session", fail)
    code, _, err = run(capsys, "ask", "image.png", "what?")
    assert code == 1
    assert "Traceback" in err


def test_out_of_memory_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr("flashsloth_cli.options.load_session", fail)
    assert "--dtype bfloat16" in error_of(capsys, "ask", "image.png", "what?")


def test_chat_continues_resets_and_quits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, image: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\nand now?\n/reset\nwhat?\n/quit\nnever read\n"))
    code, out, err = run(capsys, "chat", image, "-m", folder, "--max-new-tokens", 5)
    assert code == 0
    assert "a new conversation" in out
    costs = [line for line in err.splitlines() if "visual tokens" in line]
    # a new conversation forgets the turns, and keeps what the cache knows of the image
    assert ["re-used" in line for line in costs] == [False, True, True]


def test_chat_survives_a_question_that_is_too_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, image: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n" + "long " * 100 + "\nand now?\n"))
    code, _, err = run(capsys, "chat", image, "-m", folder, "--max-new-tokens", 5)
    assert code == 0
    assert err.count("error: ") == 1
    assert err.count("visual tokens") == 2


def test_chat_refuses_a_bad_image_before_the_first_question(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    assert "absent.png" in error_of(capsys, "chat", tmp_path / "absent.png", "-m", folder)


def test_demo_asks_three_questions_and_shows_every_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capsys, "demo", "-m", folder, "--max-new-tokens", 3)
    rows = {line.strip().split("  ")[0]: line for line in out.splitlines()}
    assert code == 0
    for stage in ("preprocess", "encode", "compress", "prefill", "decode", "total"):
        assert rows[stage].count(" ms") == 3
    assert rows["visual tokens"].split()[2:] == ["4", "4", "4"]
    assert rows["uncompressed"].split()[1:] == ["36", "36", "36"]
    assert "--model Tongbo/FlashSloth-3.2B" in out
    assert "flashsloth ask photo.jpg" in out


def test_info_counts_what_the_model_has(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, _ = run(capsys, "info", folder, "--json", "--image-size", "640x480")
    summary = json.loads(out)
    stored = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert code == 0
    assert summary["parameters"] == stored == sum(part["parameters"] for part in summary["parts"])
    assert (summary["visual_tokens"], summary["uncompressed_tokens"]) == (4, 36)
    assert summary["weight_bytes"]["float32"] == 4 * stored
    assert stored < summary["weight_bytes"]["int8"] < summary["weight_bytes"]["bfloat16"]
    assert "640 x 480" in summary["views"]
    code, out, _ = run(capsys, "info", folder)
    assert code == 0
    assert f"{stored:,}" in out


def test_info_refuses_a_bad_size(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "WIDTHxHEIGHT" in error_of(capsys, "info", folder, "--image-size", "large")


def test_convert_refuses_what_is_no_checkpoint(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "new"
    assert error_of(capsys, "convert", folder, destination, "--to-official")
    assert not destination.exists()


def test_convert_copies_what_is_converted_already(
    capsys: pytest.CaptureFixture[str], folder: Path, image: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "copy"
    assert run(capsys, "convert", folder, destination)[0] == 0
    assert run(capsys, "ask", image, "what?", "-m", destination, "--max-new-tokens", 2)[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
def test_the_console_script_asks_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: torch reads the variable once, when it makes its first tensor."""
    variable = cli.HUGE_PAGES_VARIABLE
    assert variable == packed_layers.HUGE_PAGES_VARIABLE
    monkeypatch.delenv(variable, raising=False)
    code = (
        "import flashsloth_cli.main as cli\n"
        "def main():\n"
        "    import torch\n"
        "    tensor = torch.ones(2**24)\n"
        "    print(open('/proc/self/smaps').read().count(' hg'))\n"  # mappings with the advice
        "cli.main = main\n"
        "cli.entry_point()"
    )
    found = []
    for value in (None, "0"):
        if value is not None:
            monkeypatch.setenv(variable, value)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found.append(int(process.stdout))
    assert found[0] > found[1] == 0

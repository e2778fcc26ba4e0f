"""What commands write beside their answers: lines of their own, short, safe, whatever the encoding."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from flashsloth_cli import messages
from flashsloth_cli.main import main
from flashsloth_cli.messages import LONGEST_LINE, one_line
from tiny_session import noise_image, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "image.png"
    noise_image().save(path)
    return path


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("flashsloth_cli.options.load_session", fail)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two\nlines\r\n and\tmore", "two lines and more"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("lone \udcff, right to left \u202e", "lone \\udcff, right to left \\u202e"),
        ("wäs? 好 🦥", "wäs? 好 🦥"),
    ],
)
def test_messages_are_one_line_without_controls(text: str, line: str) -> None:
    assert one_line(text) == line


@pytest.mark.parametrize("text", ["a" * 10**6, "\0" * 10**6])
def test_messages_are_bounded_and_keep_both_ends(text: str) -> None:
    line = one_line("first " + text + " last")
    assert len(line) < LONGEST_LINE + 100
    assert line.startswith("first ") and line.endswith(" last")


def test_a_long_error_is_one_short_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ValueError("\x1b]0;" + "path/" * 10_000 + "\udc80\n"))
    assert main(["ask", "image.png", "what?"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: \\x1b]0;path/")
    assert len(error) < LONGEST_LINE + 100


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "interrupted\n"),
        (KeyboardInterrupt("the same command goes on"), "interrupted; the same command goes on\n"),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: KeyboardInterrupt, line: str
) -> None:
    fail_with(monkeypatch, error)
    assert main(["ask", "image.png", "what?"]) == 130
    assert capsys.readouterr().err == line


def test_an_end_of_file_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, EOFError("the file ended"))
    assert main(["ask", "image.png", "what?"]) == 2
    assert capsys.readouterr().err == "error: the file ended\n"


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send there")
def test_a_signal_ends_chat_in_one_line(folder: Path, image: Path) -> None:
    program = [sys.executable, "-m", "flashsloth_cli", "chat", str(image), "-m", str(folder)]
    with subprocess.Popen(program, stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdout is not None and process.stderr is not None
        assert b"/quit" in process.stdout.readline()  # it waits for a question now
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b"interrupted\n"


def test_a_question_that_is_no_text_is_named(capsys: pytest.CaptureFixture[str], folder: Path, image: Path) -> None:
    for question in ("wha\udcff?", "wha\ud800?", "wha\0?"):
        assert main(["ask", str(image), question, "-m", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"character 4 is U+{ord(question[3]):04X}" in error
        error.encode()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
def test_arguments_that_are_not_utf8(
    capsys: pytest.CaptureFixture[str], folder: Path, image: Path, tmp_path: Path
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/odd-\xff.png")
    os.link(image, odd)
    assert main(["ask", odd, "what?", "-m", str(folder), "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["ask", odd + "\x1b", "what?", "-m", str(folder)]) == 2
    assert "odd-\\udcff.png\\x1b" in capsys.readouterr().err


def accented(folder: Path) -> Path:
    """A copy of a model whose characters have names that ASCII lacks."""
    copy = Path(shutil.copytree(folder, folder.parent / "accents"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        token if len(token) > 1 or token in "what?QA:" else chr(0x100 + index): index
        for token, index in vocabulary.items()
    }
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


def test_answers_reach_an_output_of_another_encoding(
    monkeypatch: pytest.MonkeyPatch, folder: Path, image: Path
) -> None:
    arguments = ["ask", str(image), "what?", "-m", str(accented(folder)), "--max-new-tokens", "12"]

    def output(encoding: str, *more: str) -> bytes:
        buffer = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding))
            assert main([*arguments, *more]) == 0
            sys.stdout.flush()
            return buffer.getvalue()

    plain = output("utf-8").decode()
    assert not plain.isascii()
    assert output("ascii") == plain.encode("ascii", "backslashreplace")
    assert json.loads(output("ascii", "--json"))["text"] + "\n" == plain


def test_only_own_warnings_reach_the_user_each_as_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, library = {"__name__": "flashsloth.data"}, {"__name__": "somelibrary"}
    warn = compile("import warnings\ndef warn(text): warnings.warn(text, stacklevel=2)", "warn.py", "exec")
    exec(warn, own)
    exec(warn, library)
    monkeypatch.setattr(warnings, "showwarning", messages._show_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = messages._show_warning
        own["warn"]("the image has\ntwo frames")
        library["warn"]("deprecated")
    assert capsys.readouterr().err == "warning: the image has two frames\n"


def test_log_records_are_lines_that_no_pipe_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    handler = messages._Lines()
    logger = logging.Logger("flashsloth")
    logger.addHandler(handler)
    logger.warning("%s [bold]is[/bold] left out", "/long/path" * 30)
    logger.info("%d")
    logger.warning("%d", "seven")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["warning: " + "/long/path" * 30 + " [bold]is[/bold] left out", "%d", "warning: %d ('seven',)"]


def test_a_name_that_looks_like_markup_is_printed_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = folder.parent / "[bold]x[" / "red]"
    odd.parent.mkdir()
    assert main(["convert", str(folder), str(odd)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"wrote {odd}"
    assert main(["info", str(odd)]) == 0
    assert str(odd) in capsys.readouterr().out


def test_merge_prints_one_line(folder: Path) -> None:
    """In a process of its own: what libraries warn of while they are imported is seen once."""
    peft = pytest.importorskip("peft")
    from flashsloth import inference

    adapter = folder.parent / "adapter"
    target = ["language_model.layers.0.self_attn.q_proj"]
    wrapped = peft.get_peft_model(inference.load_model(folder), peft.LoraConfig(r=2, target_modules=target))
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(adapter)
    inference.load(folder).processor.save_pretrained(adapter)
    merged = folder.parent / "merged"
    program = [sys.executable, "-m", "flashsloth_cli", "merge", str(adapter), str(merged)]
    done = subprocess.run(program, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (0, b"", f"wrote {merged}\n")

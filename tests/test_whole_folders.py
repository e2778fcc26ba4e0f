"""Folders that are replaced: whoever is killed leaves the former one or the new one under the name, whole."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashsloth.checkpoints import folder as checkpoint_files
from flashsloth.checkpoints.folder import check_destination, write_folder
from flashsloth.checkpoints.hub import locate

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
STEPS = 40  # more than replacing two files takes


def write(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        for name in ("first", "second"):
            (folder / name).write_text(text)

    return fill


def content(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("first", "second")}


def replace_and_die(destination: Path, step: int, can_exchange: bool) -> bool:
    """Replace a folder in a process that dies at its call number `step` to the system; whether it did."""
    child = os.fork()
    if not child:
        calls = 0

        def counted(function: Callable) -> Callable:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == step:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        for owner, name in ((Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (os, "fsync"), (os, "rmdir")):
            setattr(owner, name, counted(getattr(owner, name)))
        exchange = checkpoint_files._exchange if can_exchange else lambda *_: False
        checkpoint_files._exchange = counted(exchange)
        write_folder(destination, True, write("new"), 0)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@needs_fork
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_killed_replacement_leaves_one_whole_folder(tmp_path: Path, can_exchange: bool) -> None:
    found = []
    for step in range(1, STEPS):
        destination = tmp_path / str(step) / "model[1]"
        destination.mkdir(parents=True)
        write("old")(destination)
        died = replace_and_die(destination, step, can_exchange)
        if can_exchange and sys.platform in ("linux", "darwin"):
            assert destination.is_dir()  # at every moment
        check_destination(tmp_path / "source", destination, True)  # as the next command begins
        found.append(content(destination))
        assert write_folder(destination, True, write("newer"), 0) == destination
        assert content(destination) == {"newer"}
        if not died:
            break
    assert not died
    # and one after the other: first always the former, then always the new one
    assert found == sorted(found, key=lambda texts: texts == {"new"})
    assert {"old"} in found
    assert found[-1] == {"new"}


def test_a_model_that_was_being_replaced_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    retired = tmp_path / ".model.replaced-123"
    retired.mkdir()
    (retired / "config.json").write_text("{}")
    (retired / "model.safetensors").write_bytes(b"")
    assert locate(tmp_path / "model") == tmp_path / "model"
    assert "put back" in caplog.text
    assert not retired.exists()


def test_what_a_killed_command_left_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".model.partial-123").mkdir()
    write_folder(tmp_path / "model", False, write("new"), 0)
    assert ".model.partial-123" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    write("old")(real)
    link = tmp_path / "link"
    link.symlink_to(real)
    write_folder(link, True, write("new"), 0)
    assert link.is_symlink()
    assert content(real) == {"new"}
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_an_interrupted_command_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(folder: Path) -> None:
        write("new")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "deep" / "er" / "model", False, interrupt, 0)
    assert not list(tmp_path.iterdir())

"""The order of the storeys holds, and the check that says so refuses imports planted against it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# file, a line planted at its end, and what the check says of it
PLANTED = [
    (
        "kernels/compilation.py",
        "from ..inference.session import load",
        "kernels is not allowed to import flashsloth.inference",
    ),
    (
        "data/schema.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..train.recipe import Recipe",
        "data is not allowed to import flashsloth.train",
    ),
    (
        "checkpoints/hub.py",
        "def late():\n    from .loading import load_model",
        "No cycles are allowed in flashsloth.checkpoints",
    ),
    ("model/positions.py", "import yaml", "flashsloth.model.positions imports yaml"),
    ("files.py", "", "flashsloth.files"),  # a module of no storey
]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_storey_imports_only_those_below_it() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


def test_planted_imports_are_refused(tmp_path: Path) -> None:
    for part in ("src", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, line, _ in PLANTED:
        with (tmp_path / "src/flashsloth" / name).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    for _, _, complaint in PLANTED:
        assert complaint in " ".join(result.stdout.split()), result.stdout

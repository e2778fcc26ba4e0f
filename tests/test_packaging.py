"""What is shipped fits together: dependencies and pins, versions, the table of commands, sample images, CI."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import flashsloth
from flashsloth.hub import ASSETS
from flashsloth_cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
MOST_LINES = 500
LARGEST_SAMPLE_BYTES = 20_000

if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
else:
    import tomli

    PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    found = [Requirement(line) for line in project["dependencies"] + extras]
    return [requirement for requirement in found if requirement.name != project["name"]]


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def test_dependencies_have_lower_bounds_only() -> None:
    for requirement in requirements():
        assert [specifier.operator for specifier in requirement.specifier] == [">="], str(requirement)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_dependency_is_pinned_once(python: str) -> None:
    for requirement in requirements():
        if not applies(requirement, python):
            continue
        matching = [pin for pin in pins()[canonicalize_name(requirement.name)] if applies(pin, python)]
        assert len(matching) == 1, requirement.name
        (specifier,) = matching[0].specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), str(requirement)


def test_one_version() -> None:
    assert f"\nversion: {flashsloth.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("target", [target for target, _ in COMMANDS.values()])
def test_every_command_is_there(target: str) -> None:
    module, attribute = target.split(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_the_console_script_is_there() -> None:
    module, attribute = PROJECT["project"]["scripts"]["flashsloth"].split(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_sample_images_are_small_and_asked_about() -> None:
    samples = json.loads((ASSETS / "samples" / "samples.json").read_text())
    assert len(samples) == 3
    for sample in samples:
        path = ASSETS / "samples" / sample["image"]
        assert path.stat().st_size < LARGEST_SAMPLE_BYTES
        with Image.open(path) as image:
            assert image.mode == "RGB"
        assert sample["question"].endswith("?")
        assert sample["answer"]


def test_no_source_file_is_long() -> None:
    long = [path for path in (ROOT / "src").rglob("*.py") if len(path.read_text().splitlines()) > MOST_LINES]
    assert long == []


def test_weights_are_not_ignored() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "check-ignore", "src/flashsloth/assets/nano/model.safetensors"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1


@pytest.mark.parametrize("status", [0, 1])
def test_ci_runs_lint_and_tests_and_passes_on_their_failure(tmp_path: Path, status: int) -> None:
    record = tmp_path / "arguments"
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$@" > {record}\nexit {status}\n')
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(["bash", str(ROOT / ".ci" / "run")], env=environment)
    assert result.returncode == status
    assert record.read_text().split() == ["lint", "docs", "test"]


def test_make_has_its_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets >= {"install", "demo", "test", "lint"}

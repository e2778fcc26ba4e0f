"""Every Python block and every command of the documents works, every page is linked, and its picture is current."""

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from flashsloth.hub import ASSETS
from flashsloth.study.config import load_study
from flashsloth_cli.main import COMMANDS, LazyCommand, main

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
# Pages whose blocks build on each other: one test runs them in order, in one folder.
ORDERED = ("finetuning.md",)
# What else may stand in a block: that of data.md is checked by test_data_documents.py, that of serving.md by
# test_serve_http.py, that of edge.md by test_export.py, text by nobody.
OTHER_BLOCKS = {
    "data.md": {"yaml", "json"},
    "edge.md": {"bash"},
    "finetuning.md": {"yaml", "text"},
    "serving.md": {"bash"},
    "study.md": {"yaml"},
    "training.md": {"bash"},
    "vllm.md": {"bash"},
}
BLOCK = re.compile(r"^```([a-z]*)( norun)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path, language):
    return [(text, bool(norun)) for name, norun, text in BLOCK.findall(path.read_text()) if name == language]


def commands():
    for path in DOCUMENTS:
        for text, norun in blocks(path, "sh"):
            if path.name in ORDERED and not norun:
                continue
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, norun, id=f"{path.name}: {shlex.join(words)}")


@pytest.fixture
def samples(tmp_path, monkeypatch):
    for path in (ASSETS / "samples").glob("*.jpg"):
        shutil.copy(path, tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "efficiency-cpu.json", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if blocks(p, "python") and p.name not in ORDERED], ids=lambda path: path.name
)
def test_python_blocks_run(path, samples):
    namespace = {}
    for text, norun in blocks(path, "python"):
        if not norun:
            exec(compile(text, path.name, "exec"), namespace)


def check_launch(program, words):
    """The launcher knows its options, its file is there, and behind them stands a command of ours."""
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        arguments = get_args_parser().parse_args(words)
        assert arguments.module
    else:
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch"
        arguments = launch_command_parser().parse_args(words[1:])
        assert (ROOT / "configs" / "accelerate" / Path(arguments.config_file).name).is_file()
        assert arguments.module
    assert arguments.training_script == "flashsloth_cli"
    assert arguments.training_script_args[0] in COMMANDS


@pytest.mark.parametrize("words, norun", list(commands()))
def test_commands(words, norun, samples, capsys):
    program, *rest = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in rest if "=" not in word]
        assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    elif program == "pip":
        extras = re.findall(r"flashsloth\[([a-z,]+)\]", words[-1])[0].split(",")
        project = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    elif program in ("accelerate", "torchrun"):
        check_launch(program, rest)
    elif program == "python" and norun:
        assert (ROOT / rest[0]).is_file()
        known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / rest[0]).read_text()))
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known
    elif program == "flashsloth" and norun:
        command = LazyCommand(rest[0], *COMMANDS[rest[0]]).load()
        below = getattr(command, "commands", {})  # `eval MODEL` is `eval run MODEL`
        command = below.get("".join(rest[1:2])) or below.get("run", command)
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known
        for word in rest[1:]:
            assert not word.startswith("configs/") or (ROOT / word).is_file()
    else:
        assert program == "flashsloth", f"no check for {program}"
        assert main(rest) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name in ORDERED], ids=lambda path: path.name)
def test_blocks_build_on_each_other(path, samples, capsys):
    """A yaml block is the file that the text before it names."""
    namespace = {}
    text = path.read_text()
    for match in BLOCK.finditer(text):
        language, norun, block = match.groups()
        if norun:
            continue
        if language == "python":
            exec(compile(block, path.name, "exec"), namespace)
        elif language == "yaml":
            name = re.findall(r"`([\w/.-]+\.yaml)`", text[: match.start()])[-1]
            (samples / name).write_text(block)
        elif language == "sh":
            for line in block.splitlines():
                program, *rest = shlex.split(line, comments=True)
                assert program == "flashsloth" and main(rest) == 0, f"{line}: {capsys.readouterr().err}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_block_is_checked():
    for path in DOCUMENTS:
        # superfences and GitHub take more for a fence than the expression above does
        assert len(BLOCK.findall(path.read_text())) * 2 == len(re.findall(r"^ *```", path.read_text(), re.MULTILINE))
        languages = {language for language, _, _ in BLOCK.findall(path.read_text())}
        assert languages <= {"sh", "python", *OTHER_BLOCKS.get(path.name, ())}, path.name


def test_the_study_is_valid(tmp_path):
    ((text, _),) = blocks(ROOT / "docs" / "study.md", "yaml")
    base = ROOT / "configs" / "studies" / yaml.safe_load(text)["base"]
    (tmp_path / "queries.yaml").write_text(text.replace(base.name, str(base)))
    assert load_study(tmp_path / "queries.yaml").reference == "small"


def test_shell_scripts_can_be_parsed():
    for path in DOCUMENTS:
        for text, _ in blocks(path, "bash"):
            subprocess.run(["bash", "-n", "-c", text], check=True)


def test_pages_say_first_what_they_are_for():
    for path in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        title, opening = path.read_text().split("\n\n")[:2]
        assert title.startswith("# ") and opening.startswith("After this page you "), path.name


def test_every_page_stands_in_the_tables_of_contents():
    """Of the README, and of the site."""
    readme, site = (ROOT / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for path in PAGES:
        name = path.relative_to(ROOT / "docs").as_posix()
        assert re.search(rf" {re.escape(name)}$", site, re.MULTILINE), name
        assert path.parent.name == "api" or f"| [docs/{name}](docs/{name}) |" in readme, name
    assert "| [docs/api/index.md](docs/api/index.md) |" in readme


@pytest.fixture
def drawing():
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "scripts" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_storeys_is_current(drawing):
    assert drawing.PICTURE.read_text() == drawing.picture(), "run python scripts/draw_architecture.py"


def test_the_table_of_the_storeys_is_that_of_the_contracts(drawing):
    text = (ROOT / "docs" / "architecture.md").read_text()
    shown = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in text.splitlines() if re.match(r"\| `\w+`", line)]
    levels = [[package.removeprefix("flashsloth.") for package in level] for level in drawing.storeys()]
    assert shown[: len(levels)] == levels

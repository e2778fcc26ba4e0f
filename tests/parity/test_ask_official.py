"""`flashsloth ask` with an authors' checkpoint: converted into the cache, and the recorded answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from official_fixture import OfficialFixture
from transformers import AutoTokenizer

from flashsloth_cli.main import main

pytestmark = pytest.mark.parity

BEFORE_QUESTION, AFTER_QUESTION = "<image>\n", "<learnable>"


@pytest.mark.parametrize(("name", "image_hd"), [("single", False), ("hd", True)])
def test_the_recorded_answer(
    parity_dir: Path,
    tmp_path: Path,
    cache_folder: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    image_hd: bool,
) -> None:
    official = OfficialFixture(parity_dir)
    checkpoint = official.write_checkpoint(tmp_path / "official", image_hd=image_hd)
    case = official.cases[name]
    question = case["prompt"].split(BEFORE_QUESTION)[1].split(AFTER_QUESTION)[0]
    expected = case["greedy"]
    arguments = ["ask", str(official.image(case["image"])), question, "--model", str(checkpoint), "--json"]
    answers = []
    for _ in range(2):
        assert main([*arguments, "--device", "cpu", "--max-new-tokens", str(len(expected))]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[0]["visual_tokens"] == (405 if image_hd else 81)
    assert answers[0]["uncompressed_tokens"] == 729 * (5 if image_hd else 1)
    assert len(list((cache_folder / "converted").iterdir())) == 1
    tokenizer = AutoTokenizer.from_pretrained(official.tokenizer)
    assert answers[0]["text"] == tokenizer.decode(expected, skip_special_tokens=True).strip()

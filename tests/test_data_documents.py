"""The recipes and records shown in docs/data.md are valid."""

import json
import re
from pathlib import Path

import pytest
import yaml

from flashsloth.data.schema import Origin, make_record
from flashsloth.train.recipe import parse_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes(text):
    shown = yaml.safe_load(text.replace("2e-5", "2.0e-5"))
    data = shown.get("data", {"mine": {"kind": "llava", "path": "mine.json", "image_folder": "images"}})
    stage = {
        "name": "s",
        "template": "chat",
        "train": ["projector"],
        "learning_rate": 1e-3,
        "max_steps": 1,
        "batch_size": 1,
    }
    for name in data:
        stages = shown.get("stages", [{**stage, "data": name}])
        parse_recipe({"model": {"checkpoint": "x"}, "output_dir": "out", "data": data, "stages": stages})


@pytest.mark.parametrize("text", blocks("json"))
def test_records(text):
    raw = json.loads(text)
    images = raw.get("images", raw.get("image"))
    images = [Path(name) for name in ([images] if isinstance(images, str) else images)]
    record = make_record(Origin("page", "page"), raw, images, 16, 10**6)
    assert not record.defects and len(record.messages) in (2, 4)

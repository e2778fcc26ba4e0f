"""A recipe on samples with and without images, for tests of long runs and of several processes."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from flashsloth.train.freeze import PART_NAMES

ROOT = Path(__file__).parents[1]
WORDS = ["red", "green", "blue", "one", "two", "three", "circle", "square", "above", "below"]


def write_mixed_recipe(folder: Path, steps: int) -> Path:
    """A recipe on 24 LLaVA records of different lengths, every other one without an image."""
    generator = np.random.default_rng(0)
    records = []
    for index in range(24):
        question, answer = (" ".join(generator.choice(WORDS, generator.integers(2, 12))) for _ in range(2))
        record = {"id": str(index)}
        if index % 2:
            record["image"] = f"{index}.png"
            pixels = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / record["image"])
            question = f"<image>\n{question}"
        record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(record)
    (folder / "records.json").write_text(json.dumps(records))
    recipe = yaml.safe_load((ROOT / "configs" / "debug" / "two_stages.yaml").read_text())
    recipe["model"]["chat_template"] = str(ROOT / "configs" / "nano" / "chat_template.jinja")
    recipe["model"]["config"]["compressor_dropout"] = 0.0  # random numbers are drawn per process
    recipe["data"] = {
        "mixed": {"kind": "llava", "path": str(folder / "records.json"), "image_folder": str(folder)},
    }
    stage = recipe["stages"][1] | {"name": "mixed", "data": "mixed", "train": list(PART_NAMES), "max_steps": steps}
    del stage["turns"]
    recipe["stages"] = [stage | {"gradient_accumulation": 2, "weight_decay": 0.1}]
    recipe["checkpoints"] = {"every_steps": steps}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"

"""The recorded training losses come out of the data path: LLaVA file, data set, collator, Trainer, model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from official_fixture import OfficialFixture, expand

from flashsloth.checkpoints.convert_official import convert_checkpoint
from flashsloth.data.dataset import build_collator, build_dataset
from flashsloth.train.build import build
from flashsloth.train.recipe import Recipe, parse_recipe
from flashsloth.train.trainer import StageTrainer, training_arguments

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
CASES = ("train_two_turns", "train_mixed_batch")


@pytest.fixture(scope="module")
def official(parity_dir: Path) -> OfficialFixture:
    return OfficialFixture(parity_dir)


@pytest.fixture(scope="module")
def folder(official: OfficialFixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint, and beside it the recorded conversations as a LLaVA file with its image."""
    folder = tmp_path_factory.mktemp("official")
    convert_checkpoint(official.write_checkpoint(folder / "theirs"), folder / "model")
    case = official.cases["train_two_turns"]
    image = official.image(case["image"])
    shutil.copy(image, folder)
    turns = []
    for number, (question, answer) in enumerate(case["turns"]):
        opening = "<image>\n" if number == 0 else ""
        turns += [{"from": "human", "value": opening + question}, {"from": "gpt", "value": answer}]
    text_only = [
        {"from": "human", "value": "What is the capital of France?"},
        {"from": "gpt", "value": "Paris."},
    ]
    records = [{"id": "0", "image": image.name, "conversations": turns}, {"id": "1", "conversations": text_only}]
    for name, kept in zip(CASES, (1, 2), strict=True):
        (folder / f"{name}.json").write_text(json.dumps(records[:kept]))
    return folder


def recipe_of(folder: Path, name: str, **stage: Any) -> Recipe:
    data = {"kind": "llava", "path": str(folder / f"{name}.json"), "image_folder": str(folder)}
    settings = {
        "name": "only",
        "data": "recorded",
        "template": "chat",
        "chat_template_kwargs": {"space_before_query": True},
        "train": ["projector", "compressor", "query_tokens", "embedded_query", "language_model"],
        "learning_rate": 2e-5,
        "batch_size": 1 if name == "train_two_turns" else 2,
        "max_steps": 1,
    }
    return parse_recipe(
        {
            "model": {"checkpoint": str(folder / "model")},
            "data": {"recorded": data},
            "stages": [settings | stage],
            "output_dir": str(folder / "run"),
            "precision": "float32",
        }
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_recorded_loss_through_the_data_path(
    official: OfficialFixture, folder: Path, name: str, packing: bool
) -> None:
    recipe = recipe_of(folder, name, packing=packing)
    stage = recipe.stages[0]
    model, processor = build(recipe.model)
    dataset = build_dataset(recipe, stage, model.config.image_height)
    trainer = StageTrainer(
        model=model.eval(),
        args=training_arguments(recipe, stage, folder / "run", sequential=True),
        stage=stage,
        train_dataset=dataset,
        data_collator=build_collator(recipe, stage, processor),
        processing_class=processor,
    )
    (batch,) = trainer.get_train_dataloader()
    labelled = (batch["labels"][..., 1:] != -100).sum()
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=labelled)
    assert abs(loss.item() - official.cases[name]["loss"]) < TOLERANCE
    assert batch["input_ids"].shape[0] == (1 if packing else stage.batch_size)
    if packing:
        return
    rows = zip(
        official.expected[f"{name}.labels"],
        official.expected[f"{name}.input_ids"],
        batch["attention_mask"].bool(),
        batch["labels"],
        strict=True,
    )
    for recorded, ids, keep, labels in rows:
        tokens = (model.config.num_image_tokens, model.config.query_token_id, model.config.num_query_tokens)
        assert torch.equal(labels[keep], expand(recorded, ids, *tokens)[: int(keep.sum())])


def test_the_loss_notices_the_template(official: OfficialFixture, folder: Path) -> None:
    recipe = recipe_of(folder, "train_two_turns", chat_template_kwargs={})
    model, processor = build(recipe.model)
    dataset = build_dataset(recipe, recipe.stages[0], model.config.image_height)
    batch = build_collator(recipe, recipe.stages[0], processor)([dataset[0]])
    with torch.no_grad():
        loss = model.eval()(**batch).loss
    assert abs(loss.item() - official.cases["train_two_turns"]["loss"]) > 100 * TOLERANCE

"""Every stage of every recipe trains exactly its parts, through the Trainer and its optimiser."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainerCallback, set_seed

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.train.build import build
from flashsloth.train.freeze import PART_NAMES, part_of
from flashsloth.train.recipe import Recipe, load_recipe, parse_recipe
from flashsloth.train.run import run
from flashsloth.train.trainer import StageTrainer

CONFIGS = Path(__file__).parents[1] / "configs"
DEBUG = CONFIGS / "debug" / "two_stages.yaml"
# captions hold no question, so nothing can be learned there by what answers questions
UNREACHED_BY_CAPTIONS = {"query_tokens", "embedded_query"}
KEPT = ("name", "template", "train", "optimizer", "learning_rates", "schedule", "warmup", "adam_beta2")


def stages():
    for path in sorted(CONFIGS.rglob("*.yaml")):
        tree = yaml.safe_load(path.read_text())
        if "stages" in tree and "model" in tree:
            for stage in tree["stages"]:
                if stage.get("lora") is None:
                    grid = tree["model"].get("config", {}).get("view_grid")
                    yield pytest.param(stage, grid, id=f"{path.stem}-{stage['name']}")


def tiny_recipe(folder: Path, stage: dict, view_grid: list[int] | None, **settings) -> Recipe:
    """The stage on a tiny model and rendered images: three steps with a strong weight decay."""
    tree = yaml.safe_load(DEBUG.read_text())
    tree["model"]["chat_template"] = str(CONFIGS / "nano" / "chat_template.jinja")
    if view_grid:
        tree["model"]["config"]["view_grid"] = view_grid
    size = {"data": "scenes", "learning_rate": 1e-3, "weight_decay": 0.5, "max_steps": 3, "batch_size": 2}
    tree["stages"] = [{key: stage[key] for key in KEPT if key in stage} | size]
    return parse_recipe(tree | {"output_dir": str(folder)} | settings)


class Gradients(TrainerCallback):
    """Names of the parameters that had a gradient, and of those where it was not zero."""

    def __init__(self) -> None:
        self.present: set[str] = set()
        self.nonzero: set[str] = set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.present.add(name)
                if parameter.grad.any():
                    self.nonzero.add(name)


def trained_state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(FlashSlothForConditionalGeneration.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize("stage, view_grid", list(stages()))
def test_a_stage_trains_its_parts_and_leaves_the_others_bit_identical(tmp_path, stage, view_grid):
    recipe = tiny_recipe(tmp_path / "run", stage, view_grid)
    set_seed(recipe.seed)
    before = dict(build(recipe.model)[0].named_parameters())
    gradients = Gradients()
    after = trained_state(run(recipe, callbacks=[gradients]))
    reached = set(stage["train"])
    if stage["template"] == "plain":
        reached -= UNREACHED_BY_CAPTIONS
    assert {part_of(name) for name in gradients.present} == reached
    expected = {name for name in before if part_of(name) in reached}
    assert gradients.nonzero == expected
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (name not in expected), name


def test_operations_are_counted_as_the_trainer_counts_them(tmp_path, monkeypatch):
    """But without a walk over all parameters at every step."""
    counted, walks = [], []
    ours, theirs = StageTrainer.floating_point_ops, Trainer.floating_point_ops
    count = FlashSlothForConditionalGeneration.num_parameters

    def both(trainer, inputs):
        counted.append((ours(trainer, inputs), theirs(trainer, inputs)))
        return counted[-1][0]

    def walk(model, **options):
        walks.append(options)
        return count(model, **options)

    monkeypatch.setattr(StageTrainer, "floating_point_ops", both)
    monkeypatch.setattr(FlashSlothForConditionalGeneration, "num_parameters", walk)
    run(tiny_recipe(tmp_path / "run", {"name": "finetune", "template": "chat", "train": ["projector"]}, None))
    assert len(counted) == len(walks) - 1 > 1
    assert all(mine == other > 0 for mine, other in counted)


def test_the_recipes_cover_both_kinds_of_stages():
    parts = [set(parameters.values[0]["train"]) for parameters in stages()]
    assert {"compressor", "projector"} in parts
    assert set(PART_NAMES) in parts


def test_training_an_encoder_of_several_views_reaches_every_layer(tmp_path):
    """The vision encoder of a model with tiles learns for real, patch embedding included."""
    stage = {"name": "finetune", "template": "chat", "train": list(PART_NAMES)}
    gradients = Gradients()
    after = trained_state(run(tiny_recipe(tmp_path / "run", stage, [2, 2]), callbacks=[gradients]))
    encoder = {name for name in after if part_of(name) == "vision_encoder"}
    assert "model.vision_tower.embeddings.patch_embedding.weight" in encoder <= gradients.nonzero


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    stage = load_recipe(DEBUG).stages[1]
    settings = {"name": stage.name, "template": "chat", "train": list(PART_NAMES)}
    results = []
    for value in (False, True):
        recipe = tiny_recipe(tmp_path / str(value), settings, None, gradient_checkpointing=value)
        results.append(trained_state(run(recipe)))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-6, msg=name)

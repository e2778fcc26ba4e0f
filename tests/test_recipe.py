from pathlib import Path

import pytest

from flashsloth.train.recipe import dump_recipe, load_recipe, parse_recipe

CONFIGS = Path(__file__).parents[1] / "configs"


def minimal() -> dict:
    return {
        "model": {"checkpoint": "somewhere"},
        "data": {"rendered": {"kind": "synthetic", "size": 8, "weights": {"scenes": 1}}},
        "stages": [
            {
                "name": "only",
                "data": "rendered",
                "template": "chat",
                "train": ["projector"],
                "learning_rate": 1e-3,
                "batch_size": 2,
                "max_steps": 3,
            }
        ],
        "output_dir": "out",
    }


# a study is no recipe, but names one; a launcher's file says how a recipe is spread over processes
RECIPES = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.name != "compression.yaml" and path.parent.name != "accelerate"
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("place", "key", "nearest"),
    [
        ((), "sead", "seed"),
        (("model",), "chekpoint", "checkpoint"),
        (("data", "rendered"), "sise", "size"),
        (("stages", 0), "learning_rat", "learning_rate"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_valid_one(place, key, nearest):
    tree = node = minimal()
    for step in place:
        node = node[step]
    node[key] = 1
    with pytest.raises(ValueError, match=f"unknown key '[a-z0-9.]*{key}'; the nearest valid key is '{nearest}'"):
        parse_recipe(tree)


def edited(**changes) -> dict:
    tree = minimal()
    tree["stages"][0].update(changes)
    return tree


@pytest.mark.parametrize(
    ("tree", "fields"),
    [
        (edited(learning_rates={"compressor": 1e-4}), ("learning_rates.compressor", "train")),
        (edited(epochs=1), ("epochs", "max_steps")),
        (edited(max_steps=None), ("epochs", "max_steps", "max_minutes")),
        (edited(template="plain", turns=2), ("turns", "template")),
        (edited(data="other"), ("data", "other", "rendered")),
        (edited(muon_learning_rate=1e-2), ("muon_learning_rate", "optimizer")),
        (edited(schedule="warmup_stable_decay", warmup=0.6, decay=0.6), ("warmup", "decay")),
        (minimal() | {"model": {"checkpoint": "a", "vision": "b"}}, ("model.checkpoint", "model.vision")),
        (minimal() | {"model": {"vision": "a"}}, ("model.vision", "model.language")),
    ],
)
def test_contradictions_name_both_fields(tree, fields):
    with pytest.raises(ValueError) as error:
        parse_recipe(tree)
    for name in fields:
        assert name in str(error.value)


@pytest.mark.parametrize("value", ["0.001", True, -1.0, None])
def test_values_of_the_wrong_kind_are_refused_by_name(value):
    with pytest.raises(ValueError, match="learning_rate"):
        parse_recipe(edited(learning_rate=value))


def test_overrides_reach_stages_by_name_and_index(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(parse_recipe(minimal())))
    recipe = load_recipe(path, ["stages.only.learning_rate=2e-5", "stages.0.batch_size=7", "seed=3"])
    assert (recipe.stages[0].learning_rate, recipe.stages[0].batch_size, recipe.seed) == (2e-5, 7, 3)
    with pytest.raises(ValueError, match="only"):
        load_recipe(path, ["stages.first.batch_size=7"])
    with pytest.raises(ValueError, match="nearest valid key is 'seed'"):
        load_recipe(path, ["sed=3"])


def test_duplicate_keys_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match="seed.*twice"):
        load_recipe(path)
    with pytest.raises(ValueError, match="cannot read recipe"):
        load_recipe(tmp_path / "none.yaml")

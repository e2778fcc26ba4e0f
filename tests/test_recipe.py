import datetime
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsloth import FlashSlothConfig
from flashsloth.bench.models import MODELS
from flashsloth.train.recipe import dump_recipe, load_recipe, parse_recipe, with_accumulation

CONFIGS = Path(__file__).parents[1] / "configs"
# Folders under configs/ whose files are no training recipes.
OTHER_KINDS = ("accelerate", "studies")
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in OTHER_KINDS)
ELASTIC = ("flashsloth-qwen3-0.6b", "flashsloth-smollm2-135m")
SPECIFIED = ("flashsloth-3.2b", "flashsloth-hd-3.2b", "flashsloth-qwen3-1.7b", "flashsloth-smollm2-360m", *ELASTIC)
ADAPTERS = ("lora-24gb", "qlora-16gb")


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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("name", SPECIFIED)
def test_stages_are_those_of_the_method(name):
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    pretrain, finetune = recipe.stages
    everything_but_the_encoder = {"compressor", "projector", "query_tokens", "embedded_query", "language_model"}
    encoder = {"vision_encoder"} if "hd" in name else set()
    assert set(pretrain.train) == {"compressor", "projector"}
    assert set(finetune.train) == everything_but_the_encoder | encoder
    assert (pretrain.template, finetune.template) == ("plain", "chat")
    assert finetune.group_by == "modality_length"
    assert (pretrain.learning_rate, finetune.learning_rate) == (1e-3, 2e-5)
    assert (pretrain.global_batch_size, finetune.global_batch_size) == (256, 128)
    for stage in recipe.stages:
        assert (stage.schedule, stage.warmup, stage.final_learning_rate) == ("cosine", 0.03, 0.0)
        assert (stage.epochs, stage.weight_decay, stage.max_length) == (1, 0.0, 3072)
        assert not stage.learning_rates and stage.optimizer == "adamw" and stage.lora is None
    assert recipe.data[pretrain.data].path.name == "blip_laion_cc_sbu_558k.json"
    assert recipe.data[finetune.data].path.name == "llava_v1_5_mix665k.json"
    assert recipe.precision == "bfloat16" and recipe.model.dtype == "float32"


@pytest.mark.parametrize("name", ["flashsloth-3.2b", "flashsloth-hd-3.2b"])
def test_recipes_of_the_paper_describe_the_published_model(name):
    recipe = load_recipe(CONFIGS / f"{name}.yaml").model
    assert (recipe.vision, recipe.language) == ("google/siglip-so400m-patch14-384", "microsoft/phi-2")
    # the defaults are the published model's backbones
    config = FlashSlothConfig(**recipe.config)
    published = FlashSlothConfig(view_grid=[2, 2] if "hd" in name else None)
    assert config.to_dict() == published.to_dict()
    assert config.num_image_tokens == (405 if "hd" in name else 81)


@pytest.mark.parametrize("name", ELASTIC)
def test_elastic_recipes_describe_the_models_that_are_counted(name):
    recipe = load_recipe(CONFIGS / f"{name}.yaml").model
    counted = MODELS[f"{name}-elastic"].on_meta().config
    assert recipe.vision == "google/siglip2-base-patch16-384"
    config = FlashSlothConfig(vision_config=counted.vision_config, text_config=counted.text_config, **recipe.config)
    assert config.to_dict() == counted.to_dict()
    assert config.visual_token_choices == {64: 3, 36: 4, 16: 6, 4: 12} and config.num_image_tokens == 64


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_recipes_train_small_parts_in_full(name):
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    (stage,) = recipe.stages
    assert recipe.model.checkpoint == "Tongbo/FlashSloth-3.2B" and recipe.model.dtype == "bfloat16"
    assert recipe.model.quantization == ("4bit" if name.startswith("qlora") else None)
    assert set(stage.train) == {"compressor", "projector", "query_tokens", "embedded_query", "language_model"}
    assert stage.lora.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("batch_size", "devices", "accumulation"), [(32, 8, 1), (32, 1, 8), (4, 2, 32)], ids=["8 devices", "1", "2"]
)
def test_the_global_batch_does_not_depend_on_the_devices(batch_size, devices, accumulation):
    stage = parse_recipe(edited(global_batch_size=256, batch_size=batch_size)).stages[0]
    assert with_accumulation(stage, devices).gradient_accumulation == accumulation
    with pytest.raises(ValueError, match="global_batch_size 256.*batch_size.*3"):
        with_accumulation(stage, 3)


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


LORA = {"rank": 2, "alpha": 4}
QUANTIZED = {"checkpoint": "a", "quantization": "4bit"}
BACKBONES = {"vision": "a", "language": "b"}


def edited(**changes) -> dict:
    tree = minimal()
    tree["stages"][0].update(changes)
    return tree


def with_two_stages(**changes) -> dict:
    tree = edited(**changes)
    tree["stages"].append({**minimal()["stages"][0], "name": "next"})
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
        (
            minimal() | {"model": {"checkpoint": "a", "config": {"compressor_window": 2}}},
            ("model.checkpoint", "model.config.compressor_window"),
        ),
        (
            edited(lora=LORA, train=["language_model"])
            | {"model": {"checkpoint": "a", "config": {"compressor_windows": [2, 3]}}},
            ("lora", "model.config", "compressor_windows"),
        ),
        (minimal() | {"model": {"vision": "a"}}, ("model.vision", "model.language")),
        (edited(global_batch_size=8, gradient_accumulation=2), ("global_batch_size", "gradient_accumulation")),
        (edited(global_batch_size=9), ("global_batch_size", "batch_size")),
        (edited(lora=LORA), ("lora", "train", "language_model")),
        (minimal() | {"model": QUANTIZED}, ("model.quantization", "lora")),
        (
            minimal() | {"model": {"checkpoint": "a", "dtype": "bfloat16"}, "precision": "float32"},
            ("model.dtype", "precision"),
        ),
        (minimal() | {"model": {**BACKBONES, "quantization": "4bit"}}, ("model.quantization", "model.checkpoint")),
        (
            edited(lora=LORA, train=["language_model"]) | {"model": BACKBONES},
            ("lora", "model.vision", "model.checkpoint"),
        ),
        (with_two_stages(lora=LORA, train=["language_model"]), ("lora", "'next'", "merge")),
        (
            minimal()
            | {"model": {**BACKBONES, "tokenizer": {"source": "synthetic", "vocabulary_size": 9, "eos_token": "x"}}},
            ("tokenizer.eos_token", "tokenizer.source"),
        ),
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


TEXT = dump_recipe(parse_recipe(minimal()))


def load_text(folder: Path, text: str | bytes):
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path)


@pytest.mark.parametrize("written", ["0012", "12:30:45", "2024-01-01", "1.2.3", "0x", "1_", "2024-01-01T00:00:00Z"])
def test_text_that_yaml_likes_to_read_as_something_else_stays_as_it_is_written(tmp_path, written):
    recipe = load_text(
        tmp_path,
        TEXT.replace("output_dir: out", f"output_dir: {written}").replace(
            "name: only", f"name: {written.replace(':', '-')}"
        ),
    )
    assert recipe.output_dir == Path(written) and recipe.stages[0].name == written.replace(":", "-")
    assert load_recipe(tmp_path / "recipe.yaml", [f"output_dir={written}"]).output_dir == Path(written)


@pytest.mark.parametrize("name", ["no", "0012", "1e5", "null", "2024", "~"])
def test_keys_are_text_as_they_are_written(tmp_path, name):
    text = TEXT.replace("rendered:", f"{name}:").replace("data: rendered", f"data: {name!r}")
    assert list(load_text(tmp_path, text).data) == [name]


@pytest.mark.parametrize("written", ["no", "1e5", "12", "true", "1_000"])
def test_what_yaml_reads_as_a_value_is_no_text_without_quotes(tmp_path, written):
    with pytest.raises(ValueError, match=r"stages\.0\.name: .*in quotes"):
        load_text(tmp_path, TEXT.replace("name: only", f"name: {written}"))
    assert load_text(tmp_path, TEXT.replace("name: only", f"name: '{written}'")).stages[0].name == written
    with pytest.raises(ValueError, match=r"output_dir: .*in quotes"):
        load_text(tmp_path, TEXT.replace("output_dir: out", f"output_dir: {written}"))


def test_numbers_and_switches_are_read_as_before(tmp_path):
    text = TEXT.replace("seed: 0\nprec", "seed: 1_000\nprec").replace("learning_rate: 0.001", "learning_rate: 1e-3")
    recipe = load_text(tmp_path, text.replace("torch_compile: false", "torch_compile: yes"))
    assert (recipe.seed, recipe.stages[0].learning_rate, recipe.torch_compile) == (1000, 1e-3, True)


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    expected = load_text(tmp_path, TEXT)
    assert load_text(tmp_path, b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()) == expected


def test_a_character_that_json_escapes_as_two_is_one(tmp_path):
    load_text(tmp_path, TEXT)
    assert load_recipe(tmp_path / "recipe.yaml", ['license="\\ud83d\\ude00"']).license == "\U0001f600"


def test_what_an_alias_shares_is_overridden_in_one_place(tmp_path):
    text = (
        "model: {checkpoint: a}\noutput_dir: out\ndata: {d: {kind: synthetic, size: 8, weights: {scenes: 1}}}\n"
        "stages:\n- &first {name: one, data: d, template: chat, train: [projector], learning_rate: 1e-3,"
        " batch_size: 2, max_steps: 3, learning_rates: {projector: 1e-4}}\n- {<<: *first, name: two}\n"
    )
    load_text(tmp_path, text)
    recipe = load_recipe(tmp_path / "recipe.yaml", ["stages.one.learning_rates.projector=1"])
    assert [stage.learning_rates["projector"] for stage in recipe.stages] == [1.0, 1e-4]


LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "aliases repeat too much"),
        ("a: &a {b: *a}", "'a' refers to itself"),
        ("a: " + "[" * 3000, "levels deep"),
        ("- " * 3000, "levels deep"),
        (TEXT + "license: !!python/object/apply:os.getcwd []\n", "tags such as"),
        (TEXT + "license: !!binary aGE=\n", "tags such as"),
        (TEXT + "license: !!int ''\n", "tags such as"),
        (TEXT + "? [a, b]\n: 1\n", "a key is no single word"),
        (TEXT + "seed: 1\n", "'seed' appears twice"),
        (TEXT + 'license: "\\ud83d"\n', "half a surrogate pair"),
        (b"\xff\xfe\x00r\x00", "not UTF-8"),
        (bytes(range(256)), "not UTF-8"),
        ("x" * 2_000_000, "more than the limit"),
        ("- a\n", "a mapping of keys, got list"),
        ("", "a mapping of keys, got NoneType"),
        (TEXT.replace("learning_rate: 0.001", "learning_rate: .nan"), "learning_rate: "),
        (TEXT.replace("learning_rate: 0.001", "learning_rate: .inf"), "learning_rate: .*finite"),
        (TEXT.replace("learning_rate: 0.001", "learning_rate: 1e999"), "learning_rate: .*finite"),
        (TEXT.replace("batch_size: 2", "batch_size: -2"), "batch_size"),
        (TEXT.replace("batch_size: 2", f"batch_size: {10**30}"), "batch_size"),
        (TEXT.replace("batch_size: 2", f"batch_size: {'9' * 5000}"), "not valid YAML"),
        (TEXT.replace("seed: 0\nprec", "seed: -1\nprec"), "seed"),
        (TEXT.replace("name: only", "name: .."), "taken by the run"),
        (TEXT.replace("name: only", "name: log.jsonl"), "taken by the run"),
        (TEXT.replace("name: only", f"name: {'é' * 100_000}"), r"stages\.0\.name"),
    ],
)  # fmt: skip
def test_files_of_a_wrong_shape_end_in_one_sentence(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_text(tmp_path, text)
    assert str(tmp_path / "recipe.yaml") in str(caught.value) and len(str(caught.value)) < 3000


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")  # reading it would wait for a writer
    for path in (tmp_path, tmp_path / "pipe.yaml"):
        with pytest.raises(ValueError, match="cannot read recipe .*no regular file"):
            load_recipe(path)


def test_a_tree_of_other_values_than_settings_is_refused():
    with pytest.raises(ValueError, match="only text, numbers"):
        parse_recipe(minimal() | {"output_dir": datetime.date(2024, 1, 1)})
    with pytest.raises(ValueError, match="surrogate"):
        parse_recipe(minimal() | {"license": "\ud83d"})


OVERRIDES = [
    "seed",
    "=1",
    "a..b=1",
    "stages.²=1",
    "stages.0.lora={a: *b}",
    "seed.x=1",
    "model.dtype=!!set {a}",
    "a.\udcff=1",
]


@pytest.mark.parametrize("override", OVERRIDES)
def test_malformed_overrides_are_refused(tmp_path, override):
    load_text(tmp_path, TEXT)
    with pytest.raises(ValueError, match="override"):
        load_recipe(tmp_path / "recipe.yaml", [override])


PIECES = [
    "!!set ",
    "&a ",
    "*a",
    "? ",
    ": ",
    "- ",
    "[",
    "{",
    "]",
    "\t",
    "0012",
    "no",
    "2024-01-01",
    ".nan",
    "-1",
    ">",
    "'",
    '"',
    "\x00",
    "\u2028",
    "<<: ",
    "--- ",
    "%",
]
EDITS = st.lists(
    st.tuples(st.integers(0, len(TEXT)), st.integers(0, 8), st.sampled_from(PIECES) | st.text(max_size=3)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(EDITS)
def test_mutations_of_a_recipe_are_read_or_refused(tmp_path_factory, edits):
    text = TEXT
    for place, length, piece in edits:
        text = text[:place] + piece + text[place + length :]
    folder = tmp_path_factory.getbasetemp()
    try:
        load_text(folder, text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        assert len(str(error)) < 5000

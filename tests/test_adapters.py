"""LoRA stages: what learns, what is saved, and that every way of loading and merging gives the same model."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from flashsloth import FlashSlothForConditionalGeneration, inference
from flashsloth.checkpoints.adapters import base_folder, load_merged, merge
from flashsloth.train.adapters import add_adapter
from flashsloth.train.build import build, set_dtypes
from flashsloth.train.freeze import count_parts, format_counts, part_of
from flashsloth.train.recipe import ModelRecipe, Recipe, load_recipe, parse_recipe
from flashsloth.train.run import run
from flashsloth_cli.main import main
from tiny_models import build_rows, tiny_model
from tiny_session import noise_image, tiny_folder

peft = pytest.importorskip("peft")

NAMES = [
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet"),
    *("kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango"),
]
CONFIGS = Path(__file__).parents[1] / "configs"
WHOLE = ["compressor", "projector", "query_tokens", "embedded_query"]
QUESTION = "who is this?"


def own_images(folder: Path, count: int = len(NAMES), names=NAMES) -> Path:
    """A user's images, each with a name of its own, and the LLaVA file that says so."""
    generator = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index, name in enumerate(names[:count]):
        image = Image.new("RGB", (96, 80), tuple(generator.randrange(256) for _ in range(3)))
        draw = ImageDraw.Draw(image)
        for _ in range(3):
            left, top = generator.randrange(70), generator.randrange(60)
            corner = left + generator.randrange(10, 40), top + generator.randrange(10, 40)
            draw.rectangle((left, top, *corner), fill=tuple(generator.randrange(256) for _ in range(3)))
        image.save(folder / f"{name}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": name}]
        records.append({"id": index, "image": f"{name}.png", "conversations": turns})
    (folder / "own.json").write_text(json.dumps(records))
    return folder


def recipe_of(data: Path, output: Path, checkpoint: Path | str, **changes) -> Recipe:
    model = {"checkpoint": str(checkpoint), "attention": "eager", **changes.pop("model", {})}
    stage = {
        "name": "finetune",
        "data": "own",
        "template": "chat",
        "train": [*WHOLE, "language_model"],
        "lora": {"rank": 4, "alpha": 8},
        "learning_rate": 1e-2,
        "max_steps": 3,
        "batch_size": 4,
        "max_length": 256,
        **changes.pop("stage", {}),
    }
    return parse_recipe(
        {
            "model": model,
            "data": {"own": {"kind": "llava", "path": str(data / "own.json"), "image_folder": str(data)}},
            "stages": [stage],
            "output_dir": str(output),
            "precision": "float32",
            "logging": {"every_steps": 1, "tensorboard": False},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base") / "model", "qwen3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return own_images(tmp_path_factory.mktemp("data"), count=8)


@pytest.fixture(scope="module")
def adapter(base, data, tmp_path_factory):
    """A tiny trained adapter."""
    return run(recipe_of(data, tmp_path_factory.mktemp("run") / "lora", base))


def prompt(folder: Path):
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    processor = AutoProcessor.from_pretrained(folder)
    return processor.apply_chat_template(
        [message],
        images=[noise_image()],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def logits(model, folder: Path) -> torch.Tensor:
    return model.eval()(**prompt(folder)).logits


# What learns


@pytest.mark.parametrize(
    ("train", "learning"),
    [
        ([*WHOLE, "language_model"], {*WHOLE, "language_model"}),
        (["projector", "vision_encoder"], {"projector", "vision_encoder"}),
        (["language_model"], {"language_model"}),
    ],
)
def test_gradients_reach_adapters_and_whole_parts_alone(train, learning):
    model = tiny_model("llama").train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    wrapped = add_adapter(model, stage_of(train), "nano")
    batch = build_rows(model.config, [[(1, 5, 2)]])
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(**batch, labels=batch["input_ids"]).loss.backward()
    moved = {part_of(name) for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == learning
    optimizer.step()
    names = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    after = {name.removeprefix("base_model.model."): p for name, p in wrapped.named_parameters()}
    for name, value in before.items():  # the weights of the base are where they were, and as they were
        spot = next(other for other in after if _same_place(name, other))
        assert torch.equal(after[spot], value), name


def _same_place(name: str, other: str) -> bool:
    return name == other.replace(".base_layer", "").replace(".original_module", "")


def stage_of(train, **lora):
    recipe = recipe_of(Path("d"), Path("o"), "nano", stage={"train": train, "lora": {"rank": 2, "alpha": 4, **lora}})
    return recipe.stages[0]


def test_target_modules_are_of_the_parts_and_unknown_ones_are_refused():
    wrapped = add_adapter(
        tiny_model("llama"), stage_of(["language_model"], target_modules=["q_proj", "up_proj"]), "nano"
    )
    adapted = {name.rpartition(".lora_A")[0] for name, _ in wrapped.named_parameters() if ".lora_A" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "up_proj"}
    assert all(part_of(name) == "language_model" for name in adapted) and len(adapted) == 6
    with pytest.raises(ValueError, match="target_modules names 'fc1'.*q_proj"):  # a layer of the encoder alone
        add_adapter(tiny_model("llama"), stage_of(["language_model"], target_modules=["fc1"]), "nano")


def test_counts_tell_adapters_from_frozen_weights():
    plain = {count.name: count.trainable + count.frozen for count in count_parts(tiny_model("llama"))}
    counts = {
        count.name: count
        for count in count_parts(add_adapter(tiny_model("llama"), stage_of([*WHOLE, "language_model"]), "nano"))
    }
    for part in WHOLE:
        assert (counts[part].trainable, counts[part].frozen) == (plain[part], 0)
    assert counts["language_model"].frozen == plain["language_model"]
    assert counts["vision_encoder"].frozen == plain["vision_encoder"] and not counts["vision_encoder"].trainable
    hidden, inner, grouped = 32, 48, 16
    widths = [(hidden, hidden)] * 2 + [(hidden, grouped)] * 2 + [(hidden, inner)] * 3
    assert counts["language_model"].trainable == 3 * sum(2 * (rows + columns) for rows, columns in widths)
    assert "language_model" in format_counts(counts.values()).split(";")[0]


def test_a_missing_part_is_reported(caplog):
    add_adapter(tiny_model("llama", compressor="average"), stage_of(["compressor", "language_model"]), "nano")
    assert "'compressor'" in caplog.text


def test_frozen_weights_may_be_bfloat16(base, data, tmp_path):
    folder = run(recipe_of(data, tmp_path / "run", base, model={"dtype": "bfloat16"}, precision="bfloat16"))
    saved = load_file(folder / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    model = FlashSlothForConditionalGeneration.from_pretrained(base)
    wrapped = add_adapter(model, stage_of(["language_model"]), str(base))
    set_dtypes(wrapped, "bfloat16")
    kinds = {(p.requires_grad, p.dtype) for p in wrapped.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


# What is saved, and how it loads


def test_an_adapter_holds_the_whole_parts_and_no_base_weight(adapter, base):
    names = set(load_file(adapter / "adapter_model.safetensors"))
    whole = {name for name in names if "lora_" not in name}
    expected = {name for name, _ in FlashSlothForConditionalGeneration.from_pretrained(base).named_parameters()}
    assert {name.removeprefix("base_model.model.") for name in whole} == {
        name for name in expected if part_of(name) in WHOLE
    }
    assert all(part_of(name) == "language_model" for name in names - whole)
    assert not (adapter / "config.json").exists()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_every_way_of_loading_gives_the_same_logits(adapter, base, tmp_path):
    merged = merge(adapter, tmp_path / "merged")
    expected = logits(FlashSlothForConditionalGeneration.from_pretrained(merged), merged)
    with_base = FlashSlothForConditionalGeneration.from_pretrained(base)
    assert not torch.allclose(logits(with_base, base), expected, atol=1e-2)
    ways = {
        "PeftModel": peft.PeftModel.from_pretrained(FlashSlothForConditionalGeneration.from_pretrained(base), adapter),
        "AutoPeftModel": peft.AutoPeftModel.from_pretrained(adapter),
        "inference.load": inference.load(adapter).model,
        "AutoModel of the merged folder": AutoModelForImageTextToText.from_pretrained(merged),
    }
    if Version(transformers.__version__) >= Version("5.18"):  # before, it drops what an adapter holds in full
        with_base.load_adapter(str(adapter))
        ways["load_adapter"] = with_base
        ways["from_pretrained of the adapter"] = AutoModelForImageTextToText.from_pretrained(adapter)
    for name, model in ways.items():
        torch.testing.assert_close(
            logits(model, adapter), expected, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def without_dtype(path: Path) -> dict:
    def drop(value: dict) -> dict:
        return {key: drop(item) if isinstance(item, dict) else item for key, item in value.items() if key != "dtype"}

    return drop(json.loads(path.read_text()))


def test_a_merged_folder_is_plain(adapter, base, tmp_path):
    merged = merge(adapter, tmp_path / "merged")
    assert not list(merged.glob("adapter*"))
    original = FlashSlothForConditionalGeneration.from_pretrained(base)
    again, report = FlashSlothForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert without_dtype(merged / "config.json") == without_dtype(base / "config.json")
    same = {name for name, value in original.state_dict().items() if torch.equal(value, again.state_dict()[name])}
    assert {part_of(name) for name in same} >= {"vision_encoder"}
    assert not {name for name in same if part_of(name) == "projector"}
    card = (merged / "README.md").read_text()
    assert "library_name: transformers" in card and "library_name: peft" in (adapter / "README.md").read_text()


def test_merging_twice_gives_the_same_files_and_never_overwrites_unasked(adapter, tmp_path):
    out = merge(adapter, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="not empty"):
        merge(adapter, out)
    merge(adapter, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(ValueError, match="needs no merging"):
        merge(out, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_interrupted_merge_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full_disk(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FlashSlothForConditionalGeneration, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="the disk is full"):
        merge(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["lora_A", "projector"])
def test_an_adapter_that_lacks_a_weight_is_refused(adapter, tmp_path, damage):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    lost = next(name for name in weights if damage in name)
    save_file({name: value for name, value in weights.items() if name != lost}, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"does not fit its base model.*missing.*{damage}"):
        load_merged(broken)


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    other = tiny_folder(tmp_path / "other", "phi")
    with pytest.raises(ValueError, match="does not fit its base model"):
        load_merged(adapter, base=str(other))


def test_a_base_that_moved_is_found_by_name_or_option(adapter, base, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    assert base_folder(moved) == base  # by the name the recipe gave
    (moved / "base_model.json").write_text(json.dumps({"name": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="--base"):
        base_folder(moved)
    torch.testing.assert_close(
        logits(load_merged(moved, base=str(base)), moved), logits(load_merged(adapter), adapter)
    )


def test_half_precision_merges_to_half_precision(base, data, tmp_path):
    half = tmp_path / "half"
    FlashSlothForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    AutoProcessor.from_pretrained(base).save_pretrained(half)
    folder = run(recipe_of(data, tmp_path / "run", half))
    merged = load_merged(folder)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


# Runs


def test_a_run_of_two_stages_ends_in_an_adapter_of_the_first(base, data, tmp_path):
    recipe = recipe_of(data, tmp_path / "run", base)
    full = parse_recipe(
        _tree(recipe)
        | {"stages": [{**_tree(recipe)["stages"][0], "name": "first", "lora": None}, *_tree(recipe)["stages"]]}
    )
    folder = run(full)
    assert base_folder(folder) == tmp_path / "run" / "first" / "model"
    assert run(full, resume=True) == folder  # everything is finished already


def _tree(recipe: Recipe) -> dict:
    import yaml

    from flashsloth.train.recipe import dump_recipe

    return yaml.safe_load(dump_recipe(recipe))


def test_resuming_a_lora_stage_continues_it(base, data, adapter, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    recipe = recipe_of(data, tmp_path / "run", base, checkpoints={"every_steps": 2})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flashsloth.train.callbacks.Clock.on_save", interrupted)
        run(recipe)
    resumed = load_file(run(recipe, resume=True) / "adapter_model.safetensors")
    once = load_file(adapter / "adapter_model.safetensors")
    assert resumed.keys() == once.keys()
    for name, value in once.items():
        assert torch.equal(value, resumed[name]), name


def test_quantized_language_model_learns_and_merges_into_the_unquantized_base(base, data, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    recipe = recipe_of(data, tmp_path / "run", base, model={"quantization": "4bit"})
    model, _ = build(recipe.model)
    assert "without a GPU" in caplog.text or torch.cuda.is_available()
    kinds = {type(module).__name__ for name, module in model.named_modules() if "language_model.layers" in name}
    assert "Linear4bit" in kinds
    quantized = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert not [name for name in quantized if not name.startswith("model.language_model.layers.")]
    plain = FlashSlothForConditionalGeneration.from_pretrained(base)
    sizes = [count.trainable + count.frozen for count in count_parts(plain)]
    assert [count.trainable + count.frozen for count in count_parts(model)] == sizes
    folder = run(recipe)
    merged = load_merged(folder)
    assert not hasattr(merged, "hf_quantizer") or merged.hf_quantizer is None
    assert {type(module).__name__ for module in merged.modules()}.isdisjoint({"Linear4bit"})
    assert not torch.allclose(logits(merged, folder), logits(plain, base), atol=1e-3)


@pytest.mark.parametrize("name", ["lora-24gb", "qlora-16gb"])
def test_the_presets_run(name, base, data, tmp_path, caplog):
    """The recipe as it ships, on a tiny model: bfloat16 or 4-bit weights, gradient checkpointing, a global batch."""
    if name.startswith("qlora"):
        pytest.importorskip("bitsandbytes")
    small = ["epochs=1", "global_batch_size=4", "batch_size=2", "max_length=200", "lora.rank=2", "lora.alpha=4"]
    overrides = [f"stages.finetune.{setting}" for setting in small]
    places = [f"data.own.path={data / 'own.json'}", f"data.own.image_folder={data}", f"output_dir={tmp_path / 'run'}"]
    recipe = load_recipe(
        CONFIGS / f"{name}.yaml", [f"model.checkpoint={base}", "loader.workers=0", *places, *overrides]
    )
    with caplog.at_level("INFO", logger="flashsloth"):
        folder = run(recipe)
    assert "stage finetune: trainable: compressor" in caplog.text and "; frozen: vision_encoder" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2]  # 8 samples, 4 a step; the last step is logged whatever every_steps is
    before = FlashSlothForConditionalGeneration.from_pretrained(base)
    after = load_merged(folder)
    moved = {
        part_of(key) for key, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[key])
    }
    assert moved == {*WHOLE, "language_model"}


def test_recomputing_activations_changes_nothing(base, data, adapter, tmp_path):
    once = load_file(adapter / "adapter_model.safetensors")
    again = load_file(
        run(recipe_of(data, tmp_path / "run", base, gradient_checkpointing=True)) / "adapter_model.safetensors"
    )
    for key, value in once.items():
        torch.testing.assert_close(again[key], value)


def test_commands_take_adapters(adapter, data, tmp_path, capsys):
    image = str(data / "alpha.png")
    assert main(["merge", str(adapter), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    answers = []
    for model in (adapter, tmp_path / "out"):
        assert main(["ask", image, QUESTION, "--model", str(model), "--max-new-tokens", "4"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main(["info", str(adapter), "--json"]) == 0
    assert main(["merge", str(adapter), str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "needs no merging" in capsys.readouterr().err


def test_a_missing_bitsandbytes_is_one_sentence(base, monkeypatch):
    monkeypatch.setattr("flashsloth.train.build.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'flashsloth\[quantization\]'"):
        build(ModelRecipe(checkpoint=str(base), quantization="4bit"))


@pytest.mark.slow
def test_twenty_images_of_a_user_are_learned_merged_and_answered(tmp_path, capsys):
    """From the packaged model to a plain folder that knows twenty images it had never seen."""
    images = own_images(tmp_path / "own")
    recipe = recipe_of(
        images,
        tmp_path / "run",
        "nano",
        stage={
            "lora": {"rank": 16, "alpha": 32},
            "learning_rate": 1e-3,
            "learning_rates": {"language_model": 3e-3},
            "max_steps": 40,
            "batch_size": 20,
        },
    )
    before = inference.load("nano")
    assert sum(before.ask(images / f"{name}.png", QUESTION).text == name for name in NAMES) == 0
    adapter = run(recipe)
    assert (adapter / "adapter_config.json").is_file()
    learned = inference.load(adapter)
    assert [learned.ask(images / f"{name}.png", QUESTION).text for name in NAMES] == NAMES
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    merged = inference.load(tmp_path / "merged")
    assert [merged.ask(images / f"{name}.png", QUESTION).text for name in NAMES] == NAMES
    capsys.readouterr()
    for model in (adapter, tmp_path / "merged"):
        assert main(["ask", str(images / "quebec.png"), QUESTION, "--model", str(model)]) == 0
        assert capsys.readouterr().out.strip() == "quebec"
    assert main(["info", str(adapter), "--json"]) == 0
    plain = inference.load(tmp_path / "merged", kernels="torch").model
    assert json.loads(capsys.readouterr().out)["parameters"] == sum(p.numel() for p in plain.parameters())

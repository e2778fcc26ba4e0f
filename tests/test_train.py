import itertools
import json
import logging
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.data.collator import Collator
from flashsloth.data.dataset import build_dataset
from flashsloth.data.schema import Sample
from flashsloth.evaluate.ablations import replaced_compressor, zeroed_embedded_query
from flashsloth.evaluate.synthetic import answer_batch, evaluate
from flashsloth.train.build import build, build_processor
from flashsloth.train.freeze import PART_NAMES, part_of, set_trainable_parts
from flashsloth.train.optimization import ProgressScheduler, build_optimizer, orthogonalise
from flashsloth.train.recipe import Recipe, load_recipe
from flashsloth.train.run import run
from flashsloth.train.trainer import StageTrainer, training_arguments
from flashsloth_cli.main import main

DEBUG = Path(__file__).parents[1] / "configs" / "debug" / "two_stages.yaml"


def debug_recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(DEBUG, [f"output_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def built():
    return build(load_recipe(DEBUG).model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "debug"
    return run(debug_recipe(folder))


def log_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture()
def samples(built):
    recipe = load_recipe(DEBUG)
    dataset = build_dataset(recipe, recipe.stages[1], built[0].config.image_height)
    return [dataset[index] for index in range(3)]


@pytest.mark.parametrize("stage_index", [0, 1])
def test_gradients_reach_exactly_the_parts_of_the_stage(built, samples, stage_index):
    model, processor = built
    stage = load_recipe(DEBUG).stages[stage_index]
    set_trainable_parts(model, stage.train)
    model.train().zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = Collator(processor, stage.template, stage.max_length)(samples)
    model(**batch, use_cache=False).loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert {part_of(name) for name, gradient in gradients.items() if gradient.any()} == set(stage.train)
    build_optimizer(model, stage, ()).step()
    for name, value in model.named_parameters():
        unchanged = torch.equal(before[name], value)
        assert unchanged if part_of(name) not in stage.train else not (unchanged and value.grad.any()), name
    model.load_state_dict(before)


def test_every_parameter_has_a_part_and_unknown_ones_are_refused(built):
    assert {part_of(name) for name, _ in built[0].named_parameters()} == set(PART_NAMES)
    with pytest.raises(ValueError, match=r"model\.connector\.weight"):
        part_of("model.connector.weight")


def test_a_part_without_parameters_is_reported(built, caplog):
    recipe = load_recipe(DEBUG, ["model.config.compressor=average"])
    with caplog.at_level(logging.WARNING):
        set_trainable_parts(build(recipe.model)[0], ["compressor", "projector"])
    assert "compressor" in caplog.text


def test_labels_cover_answers_and_their_end_only(built, samples):
    processor = built[1]
    batch = Collator(processor, "chat", 256)(samples)
    for labels, ids, sample in zip(batch["labels"], batch["input_ids"], samples, strict=True):
        learned = labels[labels != -100]
        assert torch.equal(learned, ids[labels != -100])
        answers = [m["content"][0]["text"] for m in sample.messages if m["role"] == "assistant"]
        text = processor.tokenizer.decode(learned)
        assert text.split("</s>") == [f" {answer}" for answer in answers] + [""]


def test_captions_are_learned_whole_and_nothing_else(built, samples):
    processor = built[1]
    batch = Collator(processor, "plain", 256)(samples)
    for labels, sample in zip(batch["labels"], samples, strict=True):
        assert processor.tokenizer.decode(labels[labels != -100]) == sample.caption + "\n"
    assert "query_positions" not in batch


def test_turns_that_do_not_fit_are_dropped_whole(built, samples):
    processor = built[1]
    full = Collator(processor, "chat", 256)(samples[:1])
    length = int(full["attention_mask"].sum())
    short = Collator(processor, "chat", length - 1, pad_to_multiple_of=8)(samples[:1])
    assert short["query_positions"].shape[1] == full["query_positions"].shape[1] - 1
    assert short["input_ids"].shape[1] % 8 == 0
    kept = int(short["attention_mask"].sum())
    assert torch.equal(short["input_ids"][0, :kept], full["input_ids"][0, :kept])
    with pytest.raises(ValueError, match="max_length"):
        Collator(processor, "chat", 4)(samples[:1])


def test_the_model_folder_loads_and_generates(trained, samples):
    model = FlashSlothForConditionalGeneration.from_pretrained(trained)
    processor = FlashSlothProcessor.from_pretrained(trained)
    answers = answer_batch(model.eval(), processor, [samples[0].images[0]] * 2, ["what shape is it?", "how many?"], 3)
    assert len(answers) == 2
    card = (trained / "README.md").read_text()
    assert "pretrain" in card and "finetune" in card and "output_dir" in card
    assert not {path.suffix for path in trained.iterdir()} & {".bin", ".pt", ".pth", ".pkl"}


def test_an_encoder_may_come_from_a_flashsloth_folder(trained):
    donor = FlashSlothForConditionalGeneration.from_pretrained(trained).model.vision_tower.state_dict()
    model, processor = build(load_recipe(DEBUG, [f"model.vision={trained}", "model.config.compressor=none"]).model)
    tower = model.model.vision_tower.state_dict()
    assert tower and all(torch.equal(donor[name], value) for name, value in tower.items())
    assert processor.image_processor.size["height"] == model.config.image_height == 72
    with pytest.raises(ValueError, match="vision_final_norm"):
        build(load_recipe(DEBUG, [f"model.vision={trained}", "model.config.vision_final_norm=true"]).model)


def test_a_decoder_may_come_from_a_flashsloth_folder(trained):
    donor = FlashSlothForConditionalGeneration.from_pretrained(trained)
    recipe = load_recipe(DEBUG, [f"model.language={trained}", "model.config.compressor=none"]).model
    model, _ = build(recipe)
    expected = donor.model.language_model.state_dict()
    found = model.model.language_model.state_dict()
    assert expected and all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(model.lm_head.weight, donor.lm_head.weight)
    assert not torch.equal(model.model.projector[0].weight, donor.model.projector[0].weight)
    config, processor = build_processor(recipe)
    assert config.text_config.vocab_size == donor.config.text_config.vocab_size
    assert processor.num_image_tokens == model.config.num_image_tokens


def test_the_loss_falls_and_the_log_has_every_step(tmp_path):
    run(debug_recipe(tmp_path / "run", "stages.finetune.max_steps=30", "stages.finetune.learning_rate=1e-2"))
    rows = [row for row in log_rows(tmp_path / "run") if row["stage"] == "finetune"]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_resume_continues_as_if_nothing_had_happened(trained, tmp_path, monkeypatch):
    folder = tmp_path / "debug"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flashsloth.train.callbacks.Clock.on_save", interrupted)
        run(debug_recipe(folder, "stages.pretrain.max_steps=4"))
    with pytest.raises(ValueError, match="--resume"):
        run(debug_recipe(folder))
    resumed = run(debug_recipe(folder), resume=True)
    once = FlashSlothForConditionalGeneration.from_pretrained(trained).state_dict()
    again = FlashSlothForConditionalGeneration.from_pretrained(resumed).state_dict()
    for name, value in once.items():
        assert torch.equal(value, again[name]), name
    steps = [(row["stage"], row["step"], row["loss"]) for row in log_rows(folder)]
    assert steps == [(row["stage"], row["step"], row["loss"]) for row in log_rows(trained.parents[1])]


def test_the_clock_ends_a_stage_and_its_schedule(tmp_path, monkeypatch):
    ticks = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: 0.1 * next(ticks))
    monkeypatch.setattr("flashsloth.train.optimization.time", clock)
    overrides = ["stages.finetune.max_steps=null", "stages.finetune.max_minutes=0.02", "stages.pretrain.max_steps=1"]
    run(debug_recipe(tmp_path / "run", *overrides))
    rows = [row for row in log_rows(tmp_path / "run") if row["stage"] == "finetune"]
    assert rows[-2]["seconds"] < 1.2 <= rows[-1]["seconds"]
    rates = [row["learning_rate"] for row in rows[2:]]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.1 * rates[0]


def test_time_used_survives_a_resume(built):
    stage = load_recipe(DEBUG, ["stages.finetune.max_steps=null", "stages.finetune.max_minutes=1"]).stages[1]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = ProgressScheduler(optimizer, stage, None)
    scheduler.elapsed_seconds = 59.0
    state = scheduler.state_dict()
    resumed = ProgressScheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), stage, None)
    resumed.load_state_dict(state)
    assert resumed.progress == pytest.approx(59 / 60) and not resumed.is_over


def test_muon_updates_are_orthogonal_and_its_state_survives(built):
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(3, 8, 24)))
    assert singular.min() > 0.5 and singular.max() < 1.5
    recipe = load_recipe(DEBUG, ["stages.finetune.optimizer=muon"])
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.projector = torch.nn.Sequential(torch.nn.Linear(6, 4))
    optimizer = build_optimizer(model, recipe.stages[1], ())
    kinds = [len(group["params"]) for group in optimizer.param_groups]
    assert kinds == [1, 1]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    copy = build_optimizer(model, recipe.stages[1], ())
    copy.load_state_dict(optimizer.state_dict())
    weight = model.model.projector[0].weight
    assert torch.equal(copy.muon.state[weight]["momentum"], optimizer.muon.state[weight]["momentum"])


def test_evaluation_counts_questions_and_undoes_its_ablations(built):
    model, processor = built
    model.eval()
    options = {"count": 3, "turns": 2, "families": ["scenes"], "batch_size": 4, "majority_images": 5}
    report = evaluate(model, processor, **options).to_json()
    assert report["overall"]["total"] == sum(task["total"] for task in report["tasks"].values()) > 0
    image = Image.effect_noise((72, 72), 60).convert("RGB")
    batch = Collator(processor, "chat", 256)(
        [
            Sample(
                [image],
                [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
                ],
            )
        ]
    )
    with torch.no_grad():
        plain = model(**batch).logits
        with zeroed_embedded_query(model):
            assert not torch.equal(model(**batch).logits, plain)
        with replaced_compressor(model, "average"):
            assert not torch.equal(model(**batch).logits, plain)
        assert torch.equal(model(**batch).logits, plain)
    with pytest.raises(ValueError, match="retraining"), replaced_compressor(model, "none"):
        pass


REFUSED = {
    "missing data": (
        ["data.mine={kind: llava, path: none.json, image_folder: .}", "stages.1.data=mine", "stages.1.turns=null"],
        "none.json: there is no such file",
    ),
    "missing folder": (
        ["data.mine={kind: llava, path: none.json, image_folder: gone}", "stages.pretrain.data=mine"],
        "gone is not a folder",
    ),
    "missing model": (["model={checkpoint: no-such-model}"], "no-such-model"),
    "impossible model": (["model.language.hidden_size=-3"], "hidden_size"),
    "unknown function": (["model.vision.hidden_act=cube"], "no model can be made of these settings"),
    "too large a batch": (["stages.pretrain.batch_size=1000"], "fill no batch"),
    "unknown layer": (
        ["stages.1.lora={rank: 2, alpha: 2, target_modules: [nothing]}", "stages.0.max_steps=1"],
        "no linear layer",
    ),
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_a_refused_run_leaves_nothing_in_the_way_of_the_next(tmp_path, capsys, overrides):
    command = ["train", str(DEBUG), f"output_dir={tmp_path / 'runs' / 'debug'}"]
    changes, message = REFUSED[overrides]
    assert main([*command, *changes]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    folder = tmp_path / "runs" / "debug"
    if overrides == "unknown layer":  # the first stage has ended well: that is kept, and the way on is named
        assert main(command) == 2 and "--resume" in capsys.readouterr().err
        assert main([*command, "--resume"]) == 0
    else:
        assert not folder.exists()


def test_a_run_that_fails_before_its_first_checkpoint_can_be_begun_again(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("flashsloth.train.callbacks.Clock.on_step_end", failing)
        run(debug_recipe(folder))
    assert not (folder / "recipe.yaml").exists()
    assert run(debug_recipe(folder)).is_dir()
    assert [row["step"] for row in log_rows(folder)] == [1, 2, 3, 4, 1, 2, 3, 4]


def failing(*args, **kwargs):
    raise RuntimeError("out of luck")


@pytest.mark.parametrize("moment", ["on_step_end", "on_save"])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys, monkeypatch, moment):
    folder = tmp_path / "a run"
    command = ["train", str(DEBUG), f"output_dir={folder}", "checkpoints.every_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(f"flashsloth.train.callbacks.Clock.{moment}", interrupted)
        assert main(command) == 130
    shown = " ".join(capsys.readouterr().err.splitlines()[-1:])
    again = f"flashsloth train {DEBUG} 'output_dir={folder}' checkpoints.every_steps=2"
    if moment == "on_step_end":
        assert shown == f"interrupted; no checkpoint was made yet; begin again with: {again}"
        assert not (folder / "recipe.yaml").exists()
    else:
        assert shown == f"interrupted; {folder / 'pretrain' / 'checkpoint-2'} is kept; go on with: {again} --resume"
        assert (folder / "pretrain" / "checkpoint-2" / "model.safetensors").exists()
        assert main([*command, "--resume"]) == 0


def test_a_stage_is_evaluated_with_metrics_of_its_logits(built, tmp_path):
    model, processor = built
    recipe = debug_recipe(tmp_path)
    stage = recipe.stages[1]
    dataset = [
        Sample([], text_turns("what?", "yes")),
        Sample([], text_turns("how are you?", "well")),
        Sample([], text_turns("a", "b")),
    ]
    trainer = StageTrainer(
        model=model,
        args=training_arguments(recipe, stage, tmp_path, sequential=True),
        stage=stage,
        eval_dataset=dataset,
        data_collator=Collator(processor, "chat", stage.max_length),
        processing_class=processor,
        compute_metrics=lambda given: {"width": given.predictions.shape[-1], "rows": len(given.predictions)},
    )
    found = trainer.evaluate()
    assert (found["eval_width"], found["eval_rows"]) == (model.config.text_config.vocab_size, 3)
    assert found["eval_loss"] > 0


def text_turns(question: str, answer: str) -> list[dict]:
    turns = (("user", question), ("assistant", answer))
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]

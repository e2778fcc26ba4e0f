"""Studies: the plan of runs, what is measured, the report, and a miniature study that is killed and started again."""

import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from filelock import FileLock
from transformers import TrainerControl, TrainerState

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.reports.process_memory import peak_resident_bytes, resident_bytes
from flashsloth.study.config import Study, load_study
from flashsloth.study.measure import TrainingUsage, count_flops
from flashsloth.study.plan import RESULT_FILE, TRAINING_FOLDER, Run, make_plan
from flashsloth.study.report import write_report
from flashsloth.study.results import Spread, VariantResults, collect, difference
from flashsloth.study.runner import run_study
from flashsloth.study.worker import LOCK_FILE, run_one
from flashsloth.train.build import build
from flashsloth.train.recipe import load_recipe
from flashsloth.train.run import run as train
from flashsloth_cli.main import main

CONFIGS = Path(__file__).parents[1] / "configs"
COMPRESSION = CONFIGS / "studies" / "compression.yaml"
DEBUG = CONFIGS / "debug" / "two_stages.yaml"

SETTINGS = {
    "base": "base.yaml",
    "seeds": [0, 1, 2],
    "reference": "average",
    "variants": {
        "average": {"label": "average", "overrides": {"model.config.compressor": "average"}},
        "sap": {"label": "SAP", "overrides": ["model.config.compressor=spatial_attention"]},
    },
    "claims": [{"text": "SAP is better", "variant": "sap", "reference": "average"}],
    "evaluation": {"families": ["scenes"], "count": 4, "turns": 2, "majority_images": 4},
    "output_dir": "out",
}


def write_study(folder: Path, **changes) -> Path:
    """A study of the debug recipe, its files in `folder` and its runs in `folder/out`."""
    base = yaml.safe_load(DEBUG.read_text())
    base["model"]["chat_template"] = str((DEBUG.parent / base["model"]["chat_template"]).resolve())
    # plain YAML reads 1e-3 as text
    for stage in base["stages"]:
        stage["learning_rate"] = 0.001
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(folder / "out"), **changes}))
    return path


@pytest.fixture
def study(tmp_path) -> Study:
    return load_study(write_study(tmp_path))


def test_the_shipped_study_compares_the_same_training_under_other_configurations():
    runs = make_plan(load_study(COMPRESSION), ["model.vision=nano"])
    assert [run.visual_tokens for run in runs[:8]] == [144, 16, 16, 16, 16, 16, 36, 4]
    assert [run.query_tokens for run in runs[:8]] == [0, 0, 0, 0, 4, 4, 4, 4]
    # seed by seed: a study that is stopped early has every variant
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8 + [2] * 8
    assert len({run.folder for run in runs}) == 24
    for run in runs:
        assert run.recipe.seed == run.seed
        first = next(other for other in runs if other.seed == run.seed).recipe
        assert (run.recipe.data, run.recipe.stages, run.recipe.precision) == (
            first.data,
            first.stages,
            first.precision,
        )
        assert run.recipe.model.vision == "nano" and run.recipe.model.language == first.model.language
    configurations = {json.dumps(run.recipe.model.config, sort_keys=True) for run in runs}
    assert len(configurations) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 1]}, "seeds"),
        ({"seeds": [0, 1, 1]}, "twice"),
        ({"reference": "none"}, "reference: no variant 'none'"),
        ({"claims": [{"text": "x", "variant": "embq", "reference": "sap"}]}, r"claims.0.variant: no variant 'embq'"),
        ({"evaluation": {**SETTINGS["evaluation"], "families": ["photographs"]}}, "photographs"),
        ({"evaluation": {**SETTINGS["evaluation"], "images": 3}}, r"unknown key 'evaluation.images'.*nearest"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_study(write_study(tmp_path, **changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ["seed=3"]}, "change its seeds"),
        ({"overrides": ["model.config.compressor=none"]}, "contradicts variant 'average'"),
        ({"overrides": ["stages.finetune.max_steps=null", "stages.finetune.max_minutes=1"]}, "'finetune'.*max_steps"),
        ({"only": ["embq"]}, "no variant 'embq'"),
        ({"seeds": [7]}, "no seed 7"),
        ({"overrides": ["model.vision=/no/such/folder"]}, "model.vision"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(study, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(study, **options)


def test_a_folder_with_other_settings_is_not_mixed_in(study):
    runs = make_plan(study, only=["sap"], seeds=[1])
    assert [(run.variant, run.seed) for run in runs] == [("sap", 1)]
    runs[0].write_plan()
    make_plan(study, only=["sap"], seeds=[1])[0].write_plan()
    # a plan of an older version, whose recipe lacked a field that has its default now
    plan = json.loads((runs[0].folder / "plan.json").read_text())
    del plan["recipe"]["torch_compile"]
    (runs[0].folder / "plan.json").write_text(json.dumps(plan))
    runs[0].write_plan()
    with pytest.raises(ValueError, match="other settings"):
        make_plan(study, ["stages.finetune.max_steps=5"], only=["sap"])[1].write_plan()


def test_two_processes_do_not_work_on_one_run(study):
    run = make_plan(study)[0]
    run.write_plan()
    with FileLock(run.folder / LOCK_FILE), pytest.raises(ValueError, match="another process"):
        run_one(run.folder)


def test_operations_are_those_of_the_formulas():
    model, _ = build(load_recipe(DEBUG).model)
    model.set_attn_implementation("eager")
    config = model.config
    vision, text = config.vision_config, config.text_config
    patches, width, inner, images = config.num_patches_per_view, vision.hidden_size, vision.intermediate_size, 2
    tokens, queries = config.num_image_tokens, config.num_query_tokens
    row = [config.image_token_id] * tokens + [10, 11, 12] + [config.query_token_id] * queries + [13]
    ids = torch.tensor([row] * images)
    question = torch.zeros_like(ids)
    question[:, tokens : tokens + 3] = 1
    batch = {
        "input_ids": ids,
        "pixel_values": torch.zeros(images, 1, 3, config.image_height, config.image_width),
        "question_ids": question,
        "attention_mask": torch.ones_like(ids),
    }
    found = count_flops(model, batch)

    layer = 8 * patches * width**2 + 4 * patches * width * inner + 4 * patches**2 * width
    patch_embedding = 2 * patches * (3 * vision.patch_size**2) * width
    assert found["vision_encoder"] == images * (vision.num_hidden_layers * layer + patch_embedding)

    score = 2 * patches * width**2 + 2 * patches * width
    pooling = 2 * patches * width
    projector = 2 * tokens * (width * text.hidden_size + text.hidden_size**2)
    assert found["compressor_and_projector"] == images * (score + pooling + projector)

    size, length = config.embedded_query_hidden_size, len(row)
    reads_question = 2 * length * text.hidden_size * size + 2 * (queries + 2 * length) * size**2
    reads_question += 4 * queries * length * size
    reads_image = 2 * patches * width * size + 2 * (patches + queries) * size**2 + 2 * patches * width**2
    reads_image += 2 * queries * patches * (size + width) + 2 * queries * width * text.hidden_size
    assert found["embedded_query"] == images * (reads_question + reads_image)

    heads, head = text.num_attention_heads, text.head_dim
    attention = 2 * text.hidden_size * head * (2 * heads + 2 * text.num_key_value_heads)
    feed_forward = 6 * text.hidden_size * text.intermediate_size
    decoder = text.num_hidden_layers * (length * (attention + feed_forward) + 4 * length**2 * heads * head)
    embedding = text.hidden_size * text.vocab_size
    assert found["language_model"] - images * (decoder + 2 * length * embedding) in range(
        # rotary angles are a matrix product as well: of the positions with half a head's frequencies
        images * length * head + 1
    )
    assert found["total"] == sum(count for part, count in found.items() if part != "total")

    labels = ids.masked_fill(ids < 10, -100)
    step = count_flops(model, {**batch, "labels": labels}, backward=True)
    assert 2 * found["total"] < step["total"] < 3 * found["total"] + 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_time_lost_with_a_killed_attempt_is_not_counted_twice(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(TrainingUsage, "_clock", lambda self: clock.now)
    args = SimpleNamespace(output_dir=str(tmp_path / "pretrain"))
    path = tmp_path / "usage.json"

    def step(usage, number, save=False, stop=False):
        clock.now += 1
        control = TrainerControl(should_save=save, should_training_stop=stop)
        usage.on_step_end(args, TrainerState(global_step=number), control)

    first = TrainingUsage(path)
    first.on_train_begin(args, TrainerState(global_step=0), TrainerControl())
    step(first, 1)
    step(first, 2, save=True)
    step(first, 3)  # lost: the process is killed here
    clock.now = 500.0
    second = TrainingUsage(path)
    second.on_train_begin(args, TrainerState(global_step=2), TrainerControl())
    step(second, 3)
    step(second, 4, save=True, stop=True)
    second.on_train_end(args, TrainerState(global_step=4), TrainerControl())
    totals = TrainingUsage(path).totals()
    assert totals["seconds"] == pytest.approx(4.0)
    assert totals["peak_bytes"] > 0 and 0 <= totals["added_bytes"] < totals["peak_bytes"]


def hold_for_a_moment(mebibytes: int) -> None:
    # pages of its own: malloc may hand out again what another test has freed
    with mmap.mmap(-1, mebibytes * 2**20) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak")
def test_the_peak_of_memory_is_that_of_the_training(tmp_path):
    hold_for_a_moment(128)  # before training
    usage = TrainingUsage(tmp_path / "usage.json")
    usage.on_accelerator = False
    args = SimpleNamespace(output_dir=str(tmp_path / "pretrain"))
    usage.on_train_begin(args, TrainerState(global_step=0), TrainerControl())
    assert peak_resident_bytes() < resident_bytes() + 16 * 2**20
    hold_for_a_moment(64)
    usage.on_train_end(args, TrainerState(global_step=1), TrainerControl())
    assert 60 * 2**20 < usage.totals()["added_bytes"] < 80 * 2**20


def fake_result(run: Run, correct: int, seconds: float, **changes) -> None:
    """A result with `correct` of 200 questions answered: counts that a test can follow by hand."""

    def score(right: int, total: int) -> dict:
        return {"correct": right, "total": total, "accuracy": round(right / total, 4)}

    half = {"scenes/scene_count": score(correct - 50, 100), "scenes/scene_shape": score(50, 100)}
    flops = dict.fromkeys(
        ("vision_encoder", "compressor_and_projector", "embedded_query", "language_model"), 250_000_000.0
    )
    result = {
        "variant": run.variant,
        "seed": run.seed,
        "visual_tokens": run.visual_tokens,
        "query_tokens": run.query_tokens,
        "images": {"finetune": 16},
        "training": {"clock": "CPU seconds", "seconds": seconds, "peak_bytes": 5 * 2**20, "added_bytes": 2**20},
        "flops": {
            "prefill": {**flops, "total": 1e9},
            "training_forward": {**flops, "total": 1e9},
            "training_step": 3e9,
            "labelled_tokens": 40,
        },
        "evaluation": {
            "settings": {"count": 4},
            "overall": score(correct, 200),
            "families": {"scenes": score(correct, 200)},
            "tasks": half,
            "majority": {key: score(20, 100) for key in ("all", "scenes", *half)},
        },
        "software": {"torch": "1", "transformers": "2"},
        "device": "CPU",
        "precision": "float32",
        **changes,
    }
    run.folder.mkdir(parents=True)
    (run.folder / RESULT_FILE).write_text(json.dumps(result))


def test_the_report_says_what_the_results_say(study, tmp_path):
    correct = {("average", 0): 100, ("average", 1): 90, ("average", 2): 110}
    correct |= {("sap", 0): 112, ("sap", 1): 104, ("sap", 2): 120}
    runs = make_plan(study)
    for run in runs:
        fake_result(run, correct[run.variant, run.seed], seconds=10.0 if run.variant == "average" else 5.0)
    docs = tmp_path / "docs"
    page = write_report(study, runs, "mini", docs).read_text()
    # by hand: average 50, 45, 55 %; SAP 56, 52, 60 %; standard deviations 5 and 4
    row = next(line for line in page.splitlines() if line.startswith("| average | 3"))
    assert "| 50.0 ± 5.0 (45.0–55.0) |" in row and "| 10 s (1.00x) | 1 MiB (1.00x) |" in row
    row = next(line for line in page.splitlines() if line.startswith("| SAP | 3"))
    assert "| 56.0 ± 4.0 (52.0–60.0) |" in row and "| 4 + 2 | 1.000 | 3.000 | 5 s (0.50x) |" in row
    assert "| scenes/scene_count | 50.0 ± 10.0 | 62.0 ± 8.0 | 20.0 |" in page
    # differences 6, 7, 5 points: mean 6, deviation 1; t(0.975, 2) = 4.3027, so 6 -+ 4.3027 / sqrt(3)
    assert "| SAP is better | **holds** |  | +6.00 | +3.52 to +8.48 | +6.00 (seed 0), +7.00 (seed 1)" in page
    assert "| SAP − average | all | holds | +6.00 | 1.00 | +3.52 to +8.48 |" in page
    saved = json.loads((study.output_dir / "mini.json").read_text())
    assert saved["claims"][0]["verdict"] == "holds"
    assert saved["variants"]["sap"]["exact_match"]["all"]["standard_deviation"] == pytest.approx(0.04)
    assert sorted(path.name for path in docs.iterdir()) == ["mini-costs.png", "mini-tasks.png", "mini.md"]
    assert (docs / "mini.md").read_text() == page and (docs / "mini-costs.png").read_bytes()[1:4] == b"PNG"


def test_the_report_of_an_unfinished_study_says_what_is_missing(study):
    runs = make_plan(study)
    with pytest.raises(ValueError, match="no run"):
        write_report(study, runs, "mini")
    fake_result(runs[1], 112, 5.0)  # SAP, seed 0
    page = write_report(study, runs, "mini").read_text()
    assert "1 of 6 runs" in page and "| SAP is better | not measured" in page
    assert "| SAP | 1 | 56.0 | 56.0 |" in page and "x)" not in page


def results(name: str, *correct: int) -> VariantResults:
    runs = {seed: {"evaluation": {"overall": {"correct": c, "total": 100}}} for seed, c in enumerate(correct)}
    return VariantResults(name, name, runs)


@pytest.mark.parametrize(
    ("first", "second", "margin", "verdict"),
    [
        ((60, 61, 62), (50, 51, 53), 0.0, "holds"),
        ((50, 51, 53), (60, 61, 62), 0.0, "does not hold"),
        ((50, 60, 55), (52, 55, 56), 0.0, "not resolved by these seeds"),
        ((59, 60, 61), (60, 61, 62), 0.0, "does not hold"),
        ((59, 60, 61), (60, 61, 62), 0.02, "holds"),
        ((60,), (50,), 0.0, "not resolved by these seeds"),
    ],
)
def test_claims_are_decided_by_the_interval(first, second, margin, verdict):
    assert difference(results("a", *first), results("b", *second)).verdict(margin) == verdict


def test_differences_pair_the_seeds_that_both_variants_have():
    found = difference(results("a", 60, 70, 80), results("b", 50, 50))
    assert found.spread.by_seed == pytest.approx({0: 0.1, 1: 0.2})
    assert difference(results("a", 60), VariantResults("b", "b", {})) is None
    assert Spread({3: 0.5}).deviation is None


def test_unequal_training_data_is_reported(study, caplog):
    runs = make_plan(study)
    fake_result(runs[0], 100, 5.0)
    fake_result(runs[1], 100, 5.0, images={"finetune": 8})
    with caplog.at_level(logging.WARNING):
        collect(study, runs)
    assert "images" in caplog.text and "not fair" in caplog.text


def test_a_run_is_trained_measured_and_scored(study, capsys):
    run = make_plan(study)[3]
    run.write_plan()
    result = run_one(run.folder)
    assert json.loads((run.folder / RESULT_FILE).read_text()) == result
    assert (result["variant"], result["seed"], result["visual_tokens"]) == ("sap", 1, 4)
    assert result["images"] == {"pretrain": 16, "finetune": 16}
    assert result["training"]["seconds"] > 0
    assert 0 < result["evaluation"]["overall"]["total"] <= 8  # four images with at most two questions
    assert not list(run.folder.rglob("checkpoint-*"))
    model = FlashSlothForConditionalGeneration.from_pretrained(run.folder / TRAINING_FOLDER / "finetune" / "model")
    assert result["parameters"]["language_model"] == model.model.language_model.num_parameters()


def test_a_failed_run_is_reported_with_its_reason(study):
    # the plan knows the encoder only; that the vocabulary is too small comes out when the model is built
    runs = make_plan(study, ["model.language.vocab_size=8"], only=["sap"], seeds=[0])
    with pytest.raises(ValueError, match=r"sap, seed 0 failed .*vocab_size=8 contradicts .*worker\.log"):
        run_study(runs)


def test_the_command_lists_runs_and_redraws_reports(study, tmp_path, capsys):
    path = str(tmp_path / "study.yaml")
    runs = make_plan(study)
    fake_result(runs[1], 112, 5.0)
    assert main(["study", path, "--dry-run", "--only", "sap"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("sap") == 3 and "average" not in listed and "finished" in listed
    assert main(["study", path, "--report"]) == 0
    assert (study.output_dir / "study.md").is_file() and not runs[0].folder.exists()
    assert main(["study", path, "--dry-run", "--report"]) == 2
    assert main(["study", path, "--only", "embq"]) == 2
    assert "no variant 'embq'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_miniature_study_survives_a_kill(tmp_path):
    path = write_study(tmp_path)
    command = [sys.executable, "-m", "flashsloth_cli", "study", str(path), "stages.finetune.max_steps=30"]
    command += ["--seed", "0", "--seed", "1", "--publish", str(tmp_path / "docs")]
    study = load_study(path)
    runs = make_plan(study, ["stages.finetune.max_steps=30"], seeds=[0, 1])
    begun = runs[1].folder / TRAINING_FOLDER / "finetune"
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while not list(begun.glob("checkpoint-*")):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert runs[0].is_finished and not runs[1].is_finished
    first = (runs[0].folder / RESULT_FILE).stat().st_mtime_ns
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert (runs[0].folder / RESULT_FILE).stat().st_mtime_ns == first
    assert "goes on" not in (runs[1].folder / "worker.log").read_text()

    once = runs[1].recipe
    once.output_dir = tmp_path / "once"
    expected = FlashSlothForConditionalGeneration.from_pretrained(train(once)).state_dict()
    found = FlashSlothForConditionalGeneration.from_pretrained(begun / "model").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())

    page = (tmp_path / "docs" / "study.md").read_text()
    for name, label in (("average", "average"), ("sap", "SAP")):
        shares = []
        for seed in (0, 1):
            result = json.loads((study.output_dir / name / f"seed-{seed}" / RESULT_FILE).read_text())
            overall = result["evaluation"]["overall"]
            shares.append(100 * overall["correct"] / overall["total"])
        mean, deviation = sum(shares) / 2, abs(shares[0] - shares[1]) / 2**0.5
        cell = f"{mean:.1f} ± {deviation:.1f} ({min(shares):.1f}–{max(shares):.1f})"
        assert f"| {label} | 2 | {cell} |" in page

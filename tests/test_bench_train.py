"""`flashsloth bench train`: an optimiser step with compression and without."""

import json

import pytest
import torch

from flashsloth.bench.training import (
    TrainingLoop,
    TrainingSettings,
    measure_training,
    random_batch,
    training_config,
    training_models,
    training_table,
)
from flashsloth.model.modeling_flashsloth import FlashSlothForConditionalGeneration
from flashsloth_cli.main import main


def test_variants_differ_in_compression_alone():
    compressed, plain = (training_config("nano", variant) for variant in ("compressed", "uncompressed"))
    assert (compressed.compressor, compressed.num_query_tokens) == ("spatial_attention", 4)
    assert (plain.compressor, plain.num_query_tokens) == ("none", 0)
    assert plain.num_image_tokens == 9 * compressed.num_image_tokens
    assert plain.text_config.to_dict() == compressed.text_config.to_dict()


@pytest.mark.parametrize("name", training_models())
def test_every_model_of_the_family_has_both_variants(name):
    assert (
        training_config(name, "uncompressed").num_image_tokens >= training_config(name, "compressed").num_image_tokens
    )


@pytest.mark.parametrize("variant", ["compressed", "uncompressed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_learn_the_batch(variant, dtype):
    torch.manual_seed(0)
    config = training_config("tiny", variant)
    settings = TrainingSettings("tiny", variant, batch=2, answer_tokens=4)
    model = FlashSlothForConditionalGeneration(config)
    batch = random_batch(config, settings)
    assert int((batch["labels"] >= 0).sum()) == 2 * 4
    before = model(**batch).loss.item()
    TrainingLoop(model, [batch], 1e-2, dtype).run(8)
    assert model(**batch).loss.item() < 0.8 * before


def test_the_command_measures_both_variants_in_processes_of_their_own(tmp_path, capsys):
    arguments = ["bench", "train", "--model", "tiny", "--batch", "2", "--steps", "3", "--warmup", "1"]
    files = ["--json", str(tmp_path / "train.json"), "--markdown", str(tmp_path / "train.md")]
    assert main([*arguments, *files]) == 0
    report = json.loads((tmp_path / "train.json").read_text())
    assert list(report["variants"]) == ["compressed", "uncompressed"]
    for result in report["variants"].values():
        assert len(result["step_seconds"]) == 3 and min(result["step_seconds"]) > 0
        assert result["memory_peak_bytes"] >= result["memory_before_bytes"] > 0
        rate = result["samples_per_second"]
        assert rate["min"] <= rate["median"] <= rate["max"] == pytest.approx(2 / min(result["step_seconds"]))
    text = (tmp_path / "train.md").read_text()
    assert "uncompressed" in text and "2 samples a step" in text
    assert "uncompressed" in capsys.readouterr().out


def test_ratios_are_to_the_first_variant():
    result = {
        "visual_tokens": 4, "tokens_of_a_sample": 9, "samples_per_second": {"median": 8.0, "min": 7.0, "max": 9.0},
        "seconds": {"median": 0.25}, "memory_peak_bytes": 2**21, "memory_added_bytes": 2**20,
    }  # fmt: skip
    slower = {**result, "samples_per_second": {"median": 2.0, "min": 1.0, "max": 3.0}}
    table = training_table({"variants": {"compressed": result, "uncompressed": slower}})
    assert [row[table.columns.index("ratio")] for row in table.rows] == ["1.00", "4.00"]


def test_what_cannot_be_measured_is_refused(monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"qwen2-vl-2b cannot be compressed"):
        training_config("qwen2-vl-2b", "compressed")
    with pytest.raises(ValueError, match="float16"):
        TrainingSettings(dtype="float16")
    with pytest.raises(ValueError, match=r"the compressed variant of nan failed: ValueError: unknown model 'nan'"):
        measure_training(TrainingSettings("nan", steps=1))
    assert main(["bench", "train", "--dtype", "int8"]) == 2
    assert "int8" in capsys.readouterr().err

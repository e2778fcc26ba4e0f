"""Optional kernels are used as asked, or refused in one sentence."""

import importlib.machinery
import sys
import types

import pytest
import torch
from torch.nn import functional

from flashsloth.train.kernels import apply_kernels
from flashsloth.train.recipe import KernelRecipe
from flashsloth.train.run import _check_precision_on_cpu, run
from flashsloth.train.trainer import StageTrainer
from test_stages import tiny_recipe
from tiny_models import build_rows, tiny_model

STAGE = {"name": "finetune", "template": "chat", "train": ["projector", "language_model"]}
CUT, LIGER = KernelRecipe(cut_cross_entropy=True), KernelRecipe(liger=True)


def pretend(monkeypatch, name: str, **contents) -> None:
    """Let a library be importable; it needs a GPU, which is not here."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def linear_cross_entropy(e, c, targets, softcap=None, reduction="mean"):
    """What the library documents, with the logits in memory."""
    logits = (e @ c.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, targets, reduction=reduction)


@pytest.mark.parametrize("kernels, name", [(CUT, "cut_cross_entropy"), (LIGER, "liger_kernel")])
def test_a_library_that_is_missing_or_a_machine_without_gpu_is_refused(monkeypatch, kernels, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"{name} is not installed; pip install"):
        apply_kernels(tiny_model("qwen3"), kernels, on_cpu=False)
    monkeypatch.undo()
    pretend(monkeypatch, name)
    with pytest.raises(ValueError, match="need a GPU"):
        apply_kernels(tiny_model("qwen3"), kernels, on_cpu=True)


@pytest.mark.parametrize("decoder", ["qwen3", "gemma2"])
@pytest.mark.parametrize("num_items", [None, 37])
def test_the_fused_loss_is_the_loss(monkeypatch, decoder, num_items):
    pretend(monkeypatch, "cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    model = tiny_model(decoder)
    batch = build_rows(model.config, [[(1, 3, 4), (0, 2, 2)], [(1, 5, 3)]], padding_side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["question_ids"] > 0, -100)
    options = {"loss_only": True, "num_items_in_batch": num_items}
    expected = model(**batch, **options).loss
    apply_kernels(model, CUT, on_cpu=False)
    output = model(**batch, **options)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None
    apply_kernels(model, KernelRecipe(), on_cpu=False)
    assert model.head_loss is None


def test_a_head_that_the_fused_loss_cannot_compute_is_refused(monkeypatch):
    pretend(monkeypatch, "cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    with pytest.raises(ValueError, match=r"decoder \(phi\) has a bias on the head"):
        apply_kernels(tiny_model("phi"), CUT, on_cpu=False)


def test_liger_gets_the_decoder_or_refuses_its_family(monkeypatch):
    calls = []

    def apply(model, **options):
        calls.append((model, options))

    pretend(monkeypatch, "liger_kernel")
    pretend(monkeypatch, "liger_kernel.transformers", _apply_liger_kernel_to_instance=apply)
    pretend(monkeypatch, "liger_kernel.transformers.monkey_patch", MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen3": None})
    model = tiny_model("qwen3")
    apply_kernels(model, LIGER, on_cpu=False)
    assert calls == [(model.model.language_model, {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    with pytest.raises(ValueError, match="'phi'"):
        apply_kernels(tiny_model("phi"), LIGER, on_cpu=False)


def test_what_sharding_cannot_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(StageTrainer, "is_sharded", True)
    with pytest.raises(ValueError, match="muon contradicts"):
        run(tiny_recipe(tmp_path / "muon", STAGE | {"optimizer": "muon"}, None))
    monkeypatch.setattr(StageTrainer, "shards_weights", True)
    monkeypatch.setattr("flashsloth.model.modeling_flashsloth.FlashSlothForConditionalGeneration.head_loss", id)
    monkeypatch.setattr("flashsloth.train.run.apply_kernels", lambda *args: None)
    with pytest.raises(ValueError, match="cut_cross_entropy contradicts"):
        run(tiny_recipe(tmp_path / "cut", STAGE, None))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="float16 works on this machine")
def test_float16_on_a_cpu_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="float16 contradicts training on a CPU"):
        run(tiny_recipe(tmp_path / "run", STAGE, None, precision="float16"))


@pytest.mark.parametrize("lacks", [True, False])
def test_bfloat16_without_kernels_on_a_cpu_is_warned_about(lacks, monkeypatch, caplog):
    monkeypatch.setattr("flashsloth.train.run.lacks_kernels", lambda dtype: lacks and dtype == torch.bfloat16)
    _check_precision_on_cpu("bfloat16")
    _check_precision_on_cpu("float32")
    assert caplog.text.count("set precision=float32") == lacks

"""Training on several processes is training on one: same losses, same gradients, whoever holds which image.

Measured on the data below, eight steps of two micro-batches, against one process with the same global batch: see
`TOLERANCE`. The processes run on the CPU and talk over gloo; FSDP2 and DeepSpeed through `launch_on_cpu.py`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashsloth.inference import load_model
from flashsloth.train.participation import add_blank_images
from flashsloth.train.trainer import SHARDING_VARIABLES
from mixed_recipe import write_mixed_recipe
from tiny_models import build_rows, tiny_model

ROOT = Path(__file__).parents[1]
ACCELERATE = ROOT / "configs" / "accelerate"
STEPS, PROCESSES, GLOBAL_BATCH = 8, 2, 4
# Relative difference of losses and of gradient norms. The largest measured: 7.5e-8 and 1.0e-6.
TOLERANCE = 5e-7
GRADIENT_TOLERANCE = 5e-6


def launch(launcher: list[str], *arguments: str, timeout: int = 600, **environment: str) -> None:
    """Run `flashsloth` under a launcher; the test fails with its last lines."""
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def logged(folder: Path) -> list[dict]:
    """Full-precision losses and gradient norms of a run."""
    state = json.loads((folder / "mixed" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return state["log_history"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_mixed_recipe(tmp_path_factory.mktemp("mixed"), STEPS)


@pytest.fixture(scope="module")
def alone(recipe) -> list[dict]:
    """The log of one process with the same global batch."""
    folder = recipe.parent / "alone"
    launch(["flashsloth_cli"], "train", str(recipe), f"output_dir={folder}", f"stages.mixed.batch_size={GLOBAL_BATCH}")
    return logged(folder)


def needs_deepspeed(name: str):
    missing = importlib.util.find_spec("deepspeed") is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason="deepspeed is not installed"))


def launcher(kind: str) -> list[str]:
    """The module and arguments in front of `train` that run it on `PROCESSES` processes."""
    if kind == "torchrun":
        return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "-m", "flashsloth_cli"]
    program = ["-m", "flashsloth_cli"] if kind == "ddp" else [str(Path(__file__).with_name("launch_on_cpu.py"))]
    return [
        *("accelerate.commands.launch", "--config_file", str(ACCELERATE / f"{kind}.yaml")),
        *("--num_processes", str(PROCESSES), "--main_process_port", "0"),
        *program,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", needs_deepspeed("zero2"), needs_deepspeed("zero3")])
def test_two_processes_give_the_losses_of_one(recipe, alone, kind):
    folder = recipe.parent / kind
    per_process = f"stages.mixed.batch_size={GLOBAL_BATCH // PROCESSES}"
    launch(launcher(kind), "train", str(recipe), f"output_dir={folder}", per_process)
    together = logged(folder)
    assert [row["step"] for row in together] == [row["step"] for row in alone] == list(range(1, STEPS + 1))
    worst = {"loss": 0.0, "grad_norm": 0.0}
    for one, two in zip(alone, together, strict=True):
        for name in worst:
            worst[name] = max(worst[name], abs(one[name] - two[name]) / one[name])
    print(f"{kind}: largest relative differences {worst}")
    assert worst["loss"] < TOLERANCE and worst["grad_norm"] < GRADIENT_TOLERANCE, worst
    result = load_model(folder / "mixed" / "model", "float32")
    assert all(value.dtype == torch.float32 for value in result.parameters())


def gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False, loss_only=True).loss
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("encoder", ["siglip", "siglip2", "clip"])
def test_a_blank_image_changes_nothing_and_reaches_every_part(encoder):
    model = tiny_model("qwen3", encoder).train()
    batch = build_rows(model.config, [[(0, 3, 4), (0, 2, 2)], [(0, 5, 3)]], padding_side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["question_ids"] > 0, -100)
    loss, without = gradients(model, batch)
    handle = add_blank_images(model)
    again, blank = gradients(model, batch)
    handle.remove()
    assert torch.equal(loss, again)
    assert sum(gradient is None for gradient in without.values()) > 10
    for name, gradient in blank.items():
        expected = torch.zeros_like(gradient) if without[name] is None else without[name]
        assert torch.equal(gradient, expected), name


def test_a_batch_with_an_image_stays_as_it_is():
    model = tiny_model("qwen3", compressor_dropout=0.0).train()
    batch = build_rows(model.config, [[(1, 3, 4)], [(0, 5, 3)]], padding_side="right")
    batch["labels"] = batch["input_ids"].clone()
    loss, without = gradients(model, batch)
    add_blank_images(model)
    again, blank = gradients(model, batch)
    assert torch.equal(loss, again) and without.keys() == blank.keys()
    for name, gradient in blank.items():
        assert torch.equal(gradient, without[name]), name


def test_placeholders_without_images_are_still_refused():
    model = tiny_model("qwen3").train()
    batch = build_rows(model.config, [[(1, 3, 4)]])
    del batch["pixel_values"]
    add_blank_images(model)
    with pytest.raises(ValueError, match="image"):
        model(**batch)


@pytest.mark.parametrize("variable", SHARDING_VARIABLES)
def test_sharding_that_would_not_happen_is_refused(tmp_path, variable):
    result = subprocess.run(
        [sys.executable, "-m", "flashsloth_cli", "train", str(ROOT / "configs" / "debug" / "two_stages.yaml")]
        + [f"output_dir={tmp_path / 'run'}"],
        env={**os.environ, variable: "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: the launcher asks for") and "configs/accelerate/ddp.yaml" in error


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_launcher_files_leave_the_recipe_in_charge(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no" and not config.use_cpu
    settings = {**(config.fsdp_config or {}), **(config.deepspeed_config or {})}
    chosen_by_recipes = {"gradient_accumulation_steps", "gradient_clipping", "fsdp_transformer_layer_cls_to_wrap"}
    assert not chosen_by_recipes & settings.keys()

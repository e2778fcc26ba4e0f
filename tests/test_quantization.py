"""Quantized models: what is quantized, the way through a folder, and what is refused."""

import copy
import io
import json

import pytest
import torch
from PIL import Image
from torch import nn
from transformers.activations import GELUTanh

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.inference import load, load_model
from flashsloth.kernels import quantization
from flashsloth.kernels.int8_linear import Int8Linear
from flashsloth.kernels.quantization import SCHEMES, is_quantized, quantize_, quantize_folder
from flashsloth_cli.main import main
from tiny_models import ENCODERS, build_rows, tiny_model

pytest.importorskip("torchao", reason="quantization needs torchao")
SAVED = [name for name, scheme in SCHEMES.items() if scheme.saved_as is None]
IN_MEMORY = [name for name in SCHEMES if name not in SAVED]
pytestmark = pytest.mark.filterwarnings("ignore:int4-weight-only holds")


def model_of_even_widths(**overrides) -> FlashSlothForConditionalGeneration:
    """Widths that groups of 64 divide, in the decoder and in the encoder."""
    text = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = tiny_model("llama", **overrides)
    config = model.config
    for key, value in text.items():
        setattr(config.text_config, key, value)
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 64, 128
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


def dtype_of(scheme: str) -> torch.dtype:
    return SCHEMES[scheme].dtype or torch.float32


def quantized_names(model: nn.Module) -> set[str]:
    return {
        name.removesuffix(".prompt").removesuffix(".token")  # the two forms of one layer
        for name, module in model.named_modules()
        if isinstance(module, Int8Linear)
        or (isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor)
    }


@pytest.mark.parametrize("scheme", SAVED)
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
        names = quantized_names(quantize_(model_of_even_widths().to(dtype_of(scheme)), scheme))
        in_encoder[scheme] = any(name.startswith("model.vision_tower.") for name in names)
    assert {scheme for scheme, quantized in in_encoder.items() if quantized} == {
        "int8-dynamic",
        "int8-dynamic-cpu",
        "int8-int4-cpu",
    }


@pytest.mark.parametrize("scheme", IN_MEMORY)
@pytest.mark.parametrize("encoder", [False, True])
def test_schemes_for_memory_compute_nearly_the_same_and_cannot_be_saved(tmp_path, scheme, encoder):
    model = model_of_even_widths().to(dtype_of(scheme))
    exact = logits_of(model)
    # the same parts by a scheme of torchao say what as many bits may cost
    like = quantize_(model_of_even_widths().to(dtype_of(scheme)), SCHEMES[scheme].saved_as, encoder=encoder)
    quantize_(model, scheme, encoder=encoder)
    assert quantized_names(model) == quantized_names(like)
    assert is_quantized(model) and not is_quantized(model_of_even_widths())
    difference = (logits_of(model) - exact).abs().mean()
    assert 0 < difference < 2 * (logits_of(like) - exact).abs().mean()
    with pytest.raises(ValueError, match="quantized already"):
        quantize_(model, "int8-weight-only")
    with pytest.raises(ValueError, match=f"{scheme} .* cannot be saved; write"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_int8_for_memory_is_close_to_the_layer_it_was_made_from():
    torch.manual_seed(0)
    linear = nn.Linear(96, 40).requires_grad_(False)
    values = torch.randn(2, 7, 96)
    values[1, 3] = 0.0  # a row without a largest value
    found, expected = Int8Linear.from_float(linear)(values), linear(values)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).norm() < 0.02 * expected.norm()
    torch.testing.assert_close(found[1, 3], linear.bias)
    whole = linear.bfloat16()
    assert Int8Linear.from_float(whole)(values.bfloat16()).dtype == torch.bfloat16


def test_int8_for_memory_computes_the_exact_gelu_in_16_bits_only():
    for dtype, exact in ((torch.float32, False), (torch.bfloat16, True)):
        model = quantize_(tiny_model("phi").to(dtype), "int8-dynamic-cpu")
        kinds = {type(module) for module in model.model.language_model.modules() if "GELU" in type(module).__name__}
        assert kinds == {nn.GELU if exact else GELUTanh}


def test_prompts_take_int8_and_single_steps_int4_whatever_the_batch():
    model = model_of_even_widths().bfloat16()
    mixed = quantize_(copy.deepcopy(model), "int8-int4-cpu").model.language_model.layers[0].mlp.up_proj
    int8 = quantize_(copy.deepcopy(model), "int8-dynamic-cpu").model.language_model.layers[0].mlp.up_proj
    int4 = quantize_(copy.deepcopy(model), "int4-packed").model.language_model.layers[0].mlp.up_proj
    values = torch.randn(3, 5, mixed.in_features).bfloat16()
    with torch.inference_mode():
        assert torch.equal(mixed(values), int8(values)) and torch.equal(mixed(values[:1]), int8(values[:1]))
        assert torch.equal(mixed(values[:, :1]), int4(values[:, :1]))
        assert torch.equal(mixed(values[:1, :1]), int4(values[:1, :1]))


def test_schemes_for_memory_are_refused_where_they_have_no_kernels(tmp_path):
    with pytest.raises(ValueError, match="multiplies in bfloat16, but the model is in float32"):
        quantize_(model_of_even_widths(), "int4-packed")
    with pytest.raises(ValueError, match="int8-dynamic-cpu has kernels for cpu only; use int8-dynamic on meta"):
        quantize_(model_of_even_widths().to("meta"), "int8-dynamic-cpu")
    for scheme in IN_MEMORY:
        with pytest.raises(
            ValueError, match=f"cannot be saved; write {SCHEMES[scheme].saved_as}, or use {scheme} in memory"
        ):
            quantize_folder("nano", tmp_path / "out", scheme)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_packed_int4_runs_on_a_gpu():
    model = model_of_even_widths().to("cuda", torch.bfloat16)
    inputs = {name: value.to("cuda") for name, value in build_rows(model.config, [[(1, 4, 3)]]).items()}
    with torch.inference_mode():
        exact = model(**inputs).logits
        found = quantize_(model, "int4-packed")(**inputs).logits
    assert 0 < (found - exact).abs().max() < 0.5 * exact.abs().max()


@pytest.mark.parametrize("scheme", ["int8-dynamic-cpu", "int8-dynamic"])
def test_a_scheme_is_applied_while_loading(scheme):
    session = load("nano", device="cpu", quantization=scheme, kernels="torch")
    expected = quantize_(load_model(quantization.hub.resolve("nano"), "float32"), scheme)
    assert quantized_names(session.model) == quantized_names(expected) != set()
    picture = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    answer = session.ask(picture, "What is in the picture?", max_new_tokens=4)
    session.model = expected.eval()
    assert session.ask(picture, "What is in the picture?", max_new_tokens=4).text == answer.text


def test_a_scheme_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    out = quantize_folder("nano", tmp_path / "nano-int8", "int8-weight-only")
    monkeypatch.setattr("flashsloth.inference.session.load_model", None)
    with pytest.raises(ValueError, match="nano-int8 is quantized already, so int4-packed cannot be applied"):
        load(out, quantization="int4-packed")
    with pytest.raises(ValueError, match="unknown quantization scheme 'int3'; use int8-dynamic"):
        load("nano", quantization="int3")


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
    assert main(["quantize", "nano", str(tmp_path / "packed"), "--scheme", "int4-packed"]) == 2
    assert "write int4-weight-only" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_commands_quantize_in_memory(command, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "grey.png"
    Image.new("RGB", (40, 40), (90, 90, 90)).save(picture)
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n/quit\n"))
    words = [command, str(picture), *(["what is it?"] if command == "ask" else []), "--device", "cpu"]
    expected = load("nano", device="cpu", quantization="int8-dynamic-cpu").ask(picture, "what is it?").text
    assert main([*words, "--quantize", "int8-dynamic-cpu", "--share-equal-views"]) == 0
    assert expected in capsys.readouterr().out
    assert main([*words, "--quantize", "int4-packed"]) == 2
    assert "--dtype bfloat16" in capsys.readouterr().err

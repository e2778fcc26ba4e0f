"""Layers held in 16 bits and multiplied in float32: at least as exact as PyTorch's, on any processor."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.kernels import int8_linear, packed_layers, widened_layers
from flashsloth.kernels.int8_linear import Int8Linear
from flashsloth.kernels.packed_layers import prepare_for_cpu_
from flashsloth.kernels.widened_layers import (
    FEW_ROWS,
    WIDENED_ATTENTION,
    WidenedConv2d,
    WidenedLinear,
    widen_,
    widened_attention,
    widened_product,
)
from tiny_models import DECODERS, ENCODERS, build_rows, tiny_model

needs_x86 = pytest.mark.skipif(
    not packed_layers.supported(torch.float32), reason="no x86 processor, or a torch without oneDNN"
)


@pytest.fixture
def without_short_kernels(monkeypatch):
    """A processor that multiplies float32 alone."""
    monkeypatch.setattr(packed_layers, "supported", lambda dtype: dtype == torch.float32)


@torch.inference_mode()
def logits_of(model):
    return model(**build_rows(model.config, [[(1, 4, 3)], [(2, 3, 5)]])).logits.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float32])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_weight_is_multiplied_piece_by_piece(dtype, rows, monkeypatch):
    monkeypatch.setattr(widened_layers, "_CHUNK", 14 * 7)  # the last piece is smaller
    torch.manual_seed(0)
    weight = (torch.randn(61, 7) * 20).to(dtype)
    values = torch.randn(rows, 7)
    torch.testing.assert_close(widened_product(values, weight), values @ weight.float().t())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [FEW_ROWS - 1, FEW_ROWS])
def test_a_widened_layer_is_exact_but_for_rounding_its_result(rows, bias):
    torch.manual_seed(0)
    linear = nn.Linear(48, 20, bias=bias).bfloat16()
    values = torch.randn(1, rows, 48).bfloat16()
    exact = functional.linear(values.double(), linear.weight.double(), None if bias is False else linear.bias.double())
    with torch.no_grad():
        found = WidenedLinear(linear)(values)
    assert found.dtype == torch.bfloat16 and found.shape == (1, rows, 20)
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-8)


def test_a_widened_layer_refuses_to_be_trained():
    values = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be trained; load it with kernels='torch'"):
        WidenedLinear(nn.Linear(8, 4).bfloat16())(values)


def test_a_widened_convolution_is_the_convolution():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 4, stride=2, padding=1, bias=False).bfloat16()
    pixels = torch.randn(2, 3, 12, 12).bfloat16()
    expected = functional.conv2d(pixels.float(), convolution.weight.float(), stride=2, padding=1)
    assert torch.equal(WidenedConv2d(convolution)(pixels), expected.bfloat16())


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_widened_attention_is_attention(masked, key_heads):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8).bfloat16()
    key, value = (torch.randn(2, key_heads, 9, 8).bfloat16() for _ in range(2))
    seen = torch.rand(2, 1, 5, 9) > 0.3
    seen[..., 0] = True
    floats = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, float("-inf"))
    mask = {None: None, "bool": seen, "float": floats}[masked]
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = False, 4 // key_heads
    found, weights = widened_attention(module, query, key, value, mask, scaling=0.3)
    assert weights is None and found.dtype == torch.bfloat16
    keys, values = (part.float().repeat_interleave(4 // key_heads, 1) for part in (key, value))
    expected = functional.scaled_dot_product_attention(
        query.float(), keys, values, None if mask is None else seen, scale=0.3
    )
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), rtol=2**-7, atol=2**-8)


@needs_x86
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("decoder", "encoder"), [(name, "siglip") for name in DECODERS] + [("phi", name) for name in ENCODERS]
)
def test_a_model_without_short_kernels_is_widened(decoder, encoder, dtype, without_short_kernels):
    exact = logits_of(tiny_model(decoder, encoder))
    model = tiny_model(decoder, encoder).to(dtype)
    before = (logits_of(model) - exact).abs().mean()
    replaced = prepare_for_cpu_(model)
    wide = [module for module in model.modules() if isinstance(module, (WidenedLinear, WidenedConv2d))]
    assert replaced == len(wide) > 20
    assert not any(type(module) is nn.Linear for module in model.model.language_model.modules())
    assert any(isinstance(module, WidenedLinear) for module in model.model.projector.modules())
    for part in (model.model.language_model, model.model.vision_tower):
        # transformers 5.24 has no sdpa for gemma2, whose scores are capped: it stays as it was
        expected = WIDENED_ATTENTION if part._supports_sdpa else "eager"
        assert part.config._attn_implementation == expected
    assert (logits_of(model) - exact).abs().mean() < 1.2 * before


@needs_x86
def test_a_widened_model_answers_and_is_saved_as_it_was_loaded(tmp_path, without_short_kernels):
    model = tiny_model("qwen2").bfloat16()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_for_cpu_(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.generate(**build_rows(model.config, [[(1, 4, 3)]]), max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    found = FlashSlothForConditionalGeneration.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_quantized_layers_and_other_formats_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), Int8Linear.from_float(nn.Linear(4, 4)), nn.Conv2d(1, 1, 1))
    assert widen_(model) == 0
    attention = nn.MultiheadAttention(8, 2).bfloat16()
    assert widen_(attention) == 0


@pytest.mark.parametrize("shape", [(64, 32), (61, 37)])
@pytest.mark.parametrize("rows", [1, FEW_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_layers_without_integer_kernels_keep_their_numbers(dtype, rows, shape, monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    values = torch.randn(1, rows, shape[1]).to(dtype)
    monkeypatch.setattr(int8_linear, "onednn_available", lambda: False)
    layer = Int8Linear.from_float(linear)
    assert layer.packed is None
    rounded, scale = int8_linear._round_to_int8(values[0])
    exact = rounded.double() @ layer.weight.double().t() * (scale.double() * layer.scale.double())
    exact = exact + linear.bias.double()
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(layer(values)[0].double(), exact, rtol=tolerance, atol=tolerance)

"""Layers packed for oneDNN compute what the ordinary ones do, and the model can still be saved."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.inference import load
from flashsloth.kernels import packed_layers
from flashsloth.kernels.int8_linear import Int8Linear
from flashsloth.kernels.packed_layers import (
    PackedLinear,
    chosen_kernels,
    keep_freed_memory,
    matmul_attention,
    prepare_for_cpu_,
)
from flashsloth.kernels.quantization import quantize_
from tiny_models import DECODERS, ENCODERS, build_rows, tiny_model

pytestmark = pytest.mark.skipif(
    not packed_layers.supported(torch.float32), reason="no x86 processor, or a torch without oneDNN"
)


@pytest.fixture(autouse=True)
def small_layers_count(monkeypatch):
    monkeypatch.setattr(packed_layers, "_SMALLEST_WEIGHT", 0)


@torch.inference_mode()
def logits_of(model):
    return model(**build_rows(model.config, [[(1, 4, 3)], [(2, 3, 5)]])).logits


@pytest.mark.parametrize(
    ("decoder", "encoder"), [(name, "siglip") for name in DECODERS] + [("phi", name) for name in ENCODERS]
)
def test_a_packed_model_computes_the_same(decoder, encoder):
    model = tiny_model(decoder, encoder)
    expected = logits_of(model)
    replaced = prepare_for_cpu_(model)
    assert replaced == sum(isinstance(module, PackedLinear) for module in model.modules()) > 20
    assert not any(type(module) is nn.Linear for module in model.model.language_model.modules())
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_the_activation_of_a_perceptron_is_fused_and_matters():
    model = tiny_model("phi", "siglip")
    expected = logits_of(model)
    prepare_for_cpu_(model)
    fused = [
        module for module in model.modules() if isinstance(module, PackedLinear) and module.activation[0] != "none"
    ]
    layers = model.config.text_config.num_hidden_layers + len(model.model.vision_tower.encoder.layers)
    assert len(fused) == layers
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    fused[0].activation = ("none", "")
    assert (logits_of(model) - expected).abs().max() > 1e-3


# attention by products rounds its scores as transformers' eager attention does
@pytest.mark.parametrize(("fewest", "attention"), [(2**60, "sdpa"), (0, "eager")])
@pytest.mark.skipif(not packed_layers.supported(torch.bfloat16), reason="this processor has no bfloat16 kernels")
def test_a_packed_bfloat16_model_is_as_close_to_float32_as_before(fewest, attention, monkeypatch):
    for name in ("_FEWEST_OF_ONE", "_FEWEST_OF_SEVERAL"):
        monkeypatch.setattr(packed_layers, name, {torch.bfloat16: fewest})
    exact = logits_of(tiny_model())
    model = tiny_model().bfloat16()
    model.set_attn_implementation(attention)
    before = (logits_of(model) - exact).abs().mean()
    model = tiny_model().bfloat16()
    prepare_for_cpu_(model)
    assert model.model.vision_tower.config._attn_implementation == packed_layers.MATMUL_ATTENTION
    assert model.model.language_model.config._attn_implementation == packed_layers.MATMUL_ATTENTION
    assert (logits_of(model) - exact).abs().mean() < 1.5 * before


def test_a_packed_model_is_saved_as_it_was_loaded(tmp_path):
    model = tiny_model()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_for_cpu_(model)
    assert set(model.state_dict()) == set(expected)
    model.save_pretrained(tmp_path)
    found = FlashSlothForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_small_layers_of_a_decoder_and_shared_heads_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(packed_layers, "_SMALLEST_WEIGHT", 2**40)
    model = tiny_model()
    in_encoder = sum(type(module) is nn.Linear for module in model.model.vision_tower.modules())
    assert prepare_for_cpu_(model) == in_encoder > 0
    assert not any(isinstance(module, PackedLinear) for module in model.model.language_model.modules())
    monkeypatch.setattr(packed_layers, "_SMALLEST_WEIGHT", 0)
    model = tiny_model("qwen2")
    prepare_for_cpu_(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_packed_layer_refuses_to_be_trained():
    layer = PackedLinear(nn.Linear(8, 4))
    values = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be trained; load it with kernels='torch'"):
        layer(values)
    with torch.no_grad():
        assert layer(values).shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_products_is_attention(dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(packed_layers, "_FEWEST_OF_SEVERAL", {dtype: 0})
    query, key, value = (torch.randn(2, 3, 7, 8).to(dtype) for _ in range(3))
    module = nn.Module()
    module.is_causal = False
    expected = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=0.3)
    found, weights = matmul_attention(module, query, key, value, None, scaling=0.3)
    assert weights is None and found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), rtol=tolerance, atol=tolerance)
    causal, _ = matmul_attention(nn.Module(), query, key, value, None, scaling=0.3)
    expected = functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), scale=0.3, is_causal=True
    )
    torch.testing.assert_close(causal.float(), expected.transpose(1, 2), rtol=tolerance, atol=tolerance)
    last, _ = matmul_attention(nn.Module(), query[:, :, 6:], key, value, None, scaling=0.3)
    torch.testing.assert_close(last.float(), expected.transpose(1, 2)[:, 6:], rtol=tolerance, atol=tolerance)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[:, :, :, 5:] = False
    masked, _ = matmul_attention(module, query, key, value, mask, scaling=0.3)
    shorter, _ = matmul_attention(module, query, key, value[:, :, :7], mask, scaling=0.3)
    assert torch.equal(masked, shorter)
    assert (masked - found).abs().max() > 0.05


@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize("queries", [5, 9])
def test_several_queries_see_what_the_mask_says(key_heads, masked, queries, monkeypatch):
    """As a prompt, whole or after a cache: heads that share keys, rows padded on the left."""
    torch.manual_seed(0)
    query = torch.randn(2, queries, 6, 8).transpose(1, 2)
    key, value = torch.randn(2, 2, key_heads, 9, 8)
    seen = torch.ones(2, 1, queries, 9, dtype=torch.bool).tril_(9 - queries)
    if masked:
        seen[1, :, :, :3] = False
    mask = {None: None, "bool": seen, "float": torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))}[masked]
    monkeypatch.setattr(packed_layers, "_FEWEST_OF_SEVERAL", {torch.float32: 6 * queries * 9 * 8})
    monkeypatch.setattr(packed_layers, "_SCORES", 100)  # several chunks
    own_kernel = functional.scaled_dot_product_attention(query, key, value, seen, scale=0.3, enable_gqa=True)
    if masked is None and queries < 9:  # nothing says which keys a query may see
        monkeypatch.setattr(packed_layers, "sdpa_attention_forward", lambda *args, **kwargs: ("fused", None))
        assert matmul_attention(nn.Module(), query, key, value, mask, scaling=0.3)[0] == "fused"
        return
    monkeypatch.setattr(packed_layers, "sdpa_attention_forward", None)
    found, _ = matmul_attention(nn.Module(), query, key, value, mask, scaling=0.3)
    of_padding = slice(3 - (9 - queries) if masked and queries == 9 else 0, None)
    torch.testing.assert_close(found[:, of_padding], own_kernel.transpose(1, 2)[:, of_padding], rtol=1e-5, atol=1e-5)
    assert masked == "float" or found.isfinite().all()
    with pytest.raises(TypeError):  # a mask for each head
        matmul_attention(nn.Module(), query, key, value, seen.expand(-1, 6, -1, -1), scaling=0.3)
    monkeypatch.setattr(packed_layers, "_FEWEST_OF_SEVERAL", {torch.float32: 6 * queries * 9 * 8 + 1})
    with pytest.raises(TypeError):
        matmul_attention(nn.Module(), query, key, value, mask, scaling=0.3)


@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_a_single_query_sees_every_key(key_heads, masked, monkeypatch):
    """As a step of an answer: one query, keys of a cache, heads that share them, rows padded on the left."""
    torch.manual_seed(0)
    monkeypatch.setattr(packed_layers, "sdpa_attention_forward", None)  # so that only the products can answer
    query = torch.randn(2, 1, 6, 8).transpose(1, 2)
    key, value = torch.randn(2, 2, key_heads, 9, 8)
    seen = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    seen[1, :, :, :4] = False
    mask = {None: None, "bool": seen, "float": torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))}[masked]
    products = 6 * 9 * 8  # of one row, however many there are
    monkeypatch.setattr(packed_layers, "_FEWEST_OF_ONE", {torch.float32: products})
    found, _ = matmul_attention(nn.Module(), query, key, value, mask, scaling=0.3)
    expected = functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    for fewest in ({torch.float32: products + 1}, {}):
        monkeypatch.setattr(packed_layers, "_FEWEST_OF_ONE", fewest)
        with pytest.raises(TypeError):
            matmul_attention(nn.Module(), query, key, value, mask, scaling=0.3)


@pytest.mark.skipif(not packed_layers.supported(torch.bfloat16), reason="this processor has no bfloat16 kernels")
def test_a_model_without_a_layer_to_pack_still_gets_the_quicker_attention():
    model = quantize_(tiny_model("qwen2").bfloat16(), "int8-dynamic-cpu")
    assert prepare_for_cpu_(model) == 0
    for part in (model.model.vision_tower, model.model.language_model):
        assert part.config._attn_implementation == packed_layers.MATMUL_ATTENTION


def test_int8_layers_of_torchao_keep_their_numbers():
    pytest.importorskip("torchao")
    model = quantize_(tiny_model(), "int8-dynamic")
    compared = 0

    def compare(linear, inputs, expected):
        nonlocal compared
        torch.testing.assert_close(Int8Linear.from_torchao(linear)(*inputs), expected, rtol=1e-4, atol=1e-5)
        compared += 1

    # layer by layer: a last bit of the input may turn the rounding of a row's largest value over
    handles = [
        module.register_forward_hook(compare)
        for module in model.modules()
        if type(module) is nn.Linear and hasattr(module.weight, "qdata")
    ]
    exact = logits_of(model)
    for handle in handles:
        handle.remove()
    assert compared == len(handles) > 20
    prepare_for_cpu_(model)
    assert not any(type(module) is nn.Linear for module in model.model.vision_tower.modules())
    assert (logits_of(model) - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no VNNI")
@torch.inference_mode()
def test_layers_that_read_the_same_round_it_once(monkeypatch):
    model = quantize_(tiny_model(), "int8-dynamic-cpu")
    attention = model.model.language_model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    values, others = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    expected = [(layer(values), layer(others)) for layer in layers]
    before = logits_of(model)
    prepare_for_cpu_(model)
    assert torch.equal(logits_of(model), before)
    shared = layers[0].shared
    assert shared is not None and attention.dense.shared is None
    calls, rounding = [], Int8Linear.round
    monkeypatch.setattr(Int8Linear, "round", lambda layer, inputs: calls.append(inputs) or rounding(layer, inputs))
    for order in ((0, 1, 2), (2, 0, 1)):
        for index in order:
            assert torch.equal(layers[index](values), expected[index][0])
        assert shared._last is None
    assert len(calls) == 2
    # an input in between is never answered with the rounding of another
    for index, which in ((0, 0), (1, 1), (2, 0), (1, 0), (0, 1), (0, 1)):
        assert torch.equal(layers[index]((values, others)[which]), expected[index][which])


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no VNNI")
def test_both_integer_products_give_the_same(monkeypatch):
    torch.manual_seed(0)
    linear, values = nn.Linear(96, 40).requires_grad_(False), torch.randn(3, 5, 96)
    by_onednn = Int8Linear.from_float(linear)
    monkeypatch.setattr("flashsloth.kernels.int8_linear.onednn_available", lambda: False)
    by_torch = Int8Linear.from_float(linear)
    assert by_onednn.packed is not None and by_torch.packed is None
    torch.testing.assert_close(by_onednn(values), by_torch(values), rtol=1e-5, atol=1e-5)
    assert by_onednn(values.half()).dtype == torch.float16


def test_a_session_is_packed_on_a_cpu_unless_told_otherwise():
    packed, plain = load("nano"), load("nano", kernels="torch")
    assert any(isinstance(module, PackedLinear) for module in packed.model.modules())
    assert not any(isinstance(module, PackedLinear) for module in plain.model.modules())
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    answers = [session.ask(picture, "what is it?", max_new_tokens=6).text for session in (packed, plain)]
    assert answers[0] == answers[1]


def test_kernels_are_chosen_by_device_and_refused_by_name():
    assert chosen_kernels("auto", "cpu") == "packed"
    assert chosen_kernels("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match="unknown kernels 'fast'; use auto, torch, packed"):
        load("nano", kernels="fast")
    with pytest.raises(ValueError, match="packed kernels need"):
        chosen_kernels("packed", "cuda")


def test_settings_of_malloc_in_the_environment_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert not keep_freed_memory()

"""One answer however it is computed: batch or single, cached or not, checkpointed, compiled, saved and loaded."""

import copy

import pytest
import torch
from transformers import StaticCache

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.model.backbones import CACHE_ARGUMENT
from flashsloth.model.compressors import COMPRESSORS
from tiny_models import DECODERS, ENCODERS, build_rows, tiny_config, tiny_model

ROWS = [[(1, 5, 2), (0, 3, 1)], [(0, 4, 0)], [(2, 2, 3)], [(1, 3, 1), (1, 4, 2), (0, 2, 0)]]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def row_logits(logits, batch, row):
    """Logits at the row's own tokens."""
    return logits[row][batch["attention_mask"][row].bool()]


def single_row(config, row, seed_of_pixels, pixels):
    batch = build_rows(config, [ROWS[row]], seed=row)
    if "pixel_values" in batch:
        batch["pixel_values"] = pixels
    return batch


def singles(model, pixels):
    """Every row alone, with its own images."""
    outputs, first = [], 0
    for row in range(len(ROWS)):
        count = sum(turn[0] for turn in ROWS[row])
        batch = single_row(model.config, row, row, pixels[first : first + count])
        first += count
        outputs.append((batch, model(**batch).logits[0]))
    return outputs


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_batch_equals_singles(decoder, padding_side):
    model = tiny_model(decoder)
    batch = build_rows(model.config, ROWS, padding_side=padding_side)
    logits = model(**batch).logits
    for row, (_, expected) in enumerate(singles(model, batch["pixel_values"])):
        torch.testing.assert_close(row_logits(logits, batch, row), expected, **TOLERANCE)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_encoders_batch_equals_singles(encoder):
    model = tiny_model("llama", encoder)
    batch = build_rows(model.config, ROWS)
    logits = model(**batch).logits
    for row, (_, expected) in enumerate(singles(model, batch["pixel_values"])):
        torch.testing.assert_close(row_logits(logits, batch, row), expected, **TOLERANCE)


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_generation_of_a_batch_equals_singles(decoder):
    model = tiny_model(decoder)
    batch = build_rows(model.config, ROWS)
    answers = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
    for row, (single, _) in enumerate(singles(model, batch["pixel_values"])):
        alone = model.generate(**single, max_new_tokens=6, do_sample=False)[0, -6:]
        assert answers[row].tolist() == alone.tolist()


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_prefill_and_decode_equal_full_forward(decoder):
    model = tiny_model(decoder)
    batch = build_rows(model.config, ROWS)
    generated = model.generate(
        **batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    new = generated.sequences[:, batch["input_ids"].shape[1] :]
    full = dict(batch, input_ids=generated.sequences)
    full["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(new)], dim=1)
    full["question_ids"] = torch.cat([batch["question_ids"], torch.zeros_like(new)], dim=1)
    logits = model(**full).logits[:, -6:-1]
    torch.testing.assert_close(torch.stack(generated.logits, dim=1), logits, **TOLERANCE)


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_static_cache_equals_dynamic(decoder):
    model = tiny_model(decoder)
    batch = build_rows(model.config, ROWS)
    dynamic = model.generate(**batch, max_new_tokens=5, do_sample=False)
    static = model.generate(
        **batch, max_new_tokens=5, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert dynamic.tolist() == static.tolist()


@pytest.mark.parametrize("decoder", ["phi", "gemma3"])
@torch.no_grad()
def test_beams_equal_beams_of_singles(decoder):
    model = tiny_model(decoder)
    batch = build_rows(model.config, ROWS)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    answers = model.generate(**batch, **options)[:, -4:]
    for row, (single, _) in enumerate(singles(model, batch["pixel_values"])):
        assert answers[row].tolist() == model.generate(**single, **options)[0, -4:].tolist()


@pytest.mark.parametrize("decoder", DECODERS)
def test_checkpointing_changes_no_gradient(decoder):
    model = tiny_model(decoder, compressor_dropout=0.0).train()
    batch = build_rows(model.config, ROWS)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert "model.embedded_query.down_projection_image.weight" in plain
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], msg=name, **TOLERANCE)


@pytest.mark.parametrize("decoder", ["phi", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3"])
@torch.no_grad()
def test_compiled_prefill_and_decode_equal_eager(decoder):
    torch._dynamo.reset()
    model = tiny_model(decoder)
    batch = build_rows(model.config, ROWS[:2])
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    expected = model(**batch, use_cache=True)
    found = compiled(**batch, use_cache=True)
    torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)

    length = batch["input_ids"].shape[1] + 2
    step = torch.tensor([[11], [12]])
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    results = []
    for forward in (model.forward, compiled):
        cache = StaticCache(model.config.text_config, max_cache_len=length)
        model(**batch, **{CACHE_ARGUMENT: cache})
        position = batch["attention_mask"].sum(dim=1, keepdim=True)
        results.append(forward(step, attention_mask=mask, position_ids=position, **{CACHE_ARGUMENT: cache}).logits)
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["phi", "qwen3"])
@torch.no_grad()
def test_inductor_prefill_equals_eager(decoder):
    torch._dynamo.reset()
    model = tiny_model(decoder)
    batch = build_rows(model.config, ROWS[:2])
    found = torch.compile(model.forward, fullgraph=True)(**batch, use_cache=False).logits
    torch.testing.assert_close(found, model(**batch, use_cache=False).logits, **TOLERANCE)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_save_and_load(decoder, encoder, tmp_path):
    model = tiny_model(decoder, encoder)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = FlashSlothForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    batch = build_rows(model.config, ROWS[:2])
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_attention_backends_agree(implementation):
    model = tiny_model("llama")
    batch = build_rows(model.config, ROWS)
    model.set_attn_implementation("eager")
    expected = model(**batch).logits
    model.set_attn_implementation(implementation)
    found = model(**batch).logits
    for row in range(len(ROWS)):
        torch.testing.assert_close(row_logits(found, batch, row), row_logits(expected, batch, row), **TOLERANCE)


@pytest.mark.parametrize("decoder", ["phi", "gemma2"])
@torch.no_grad()
def test_encode_once_and_continue_with_the_cache(decoder):
    model = tiny_model(decoder)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    turns = build_rows(model.config, [ROWS[3]])
    features = model.get_image_features(turns["pixel_values"])
    assert len(calls) == 1
    expected = model(**turns).logits
    del turns["pixel_values"]
    calls.clear()
    torch.testing.assert_close(model(**turns, image_features=features).logits, expected, **TOLERANCE)
    second = int(turns["query_positions"][0, 0]) + model.config.num_query_tokens + 2
    head = {
        "input_ids": turns["input_ids"][:, :second],
        "attention_mask": turns["attention_mask"][:, :second],
        "question_ids": turns["question_ids"][:, :second],
        "query_positions": turns["query_positions"][:, :1],
        "image_positions": turns["image_positions"][:, :1],
    }
    first_image = type(features)(
        last_hidden_state=features.last_hidden_state[:1], pooler_output=features.pooler_output[:1]
    )
    cache = model(**head, image_features=first_image, use_cache=True)[CACHE_ARGUMENT]
    rest = dict(turns, input_ids=turns["input_ids"][:, second:])
    for name in ("past_key_values", "cache"):  # whichever of the two the installed transformers knows
        logits = model(**rest, image_features=features, **{name: copy.deepcopy(cache)}).logits
        torch.testing.assert_close(logits, expected[:, second:], **TOLERANCE)
    assert calls == []


@torch.no_grad()
def test_copy_has_its_own_embedded_query():
    model = tiny_model("llama")
    batch = build_rows(model.config, ROWS)
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    twin.model.embedded_query.up_projection.weight.zero_()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)
    assert not torch.allclose(twin(**batch).logits, expected)


@pytest.mark.parametrize("window, padding", [(3, "refuse"), (2, "refuse"), (4, "pad")])
@pytest.mark.parametrize("compressor", COMPRESSORS)
@torch.no_grad()
def test_every_compressor_generates_with_every_window(compressor, window, padding):
    model = tiny_model("qwen3", compressor=compressor, compressor_window=window, compressor_padding=padding)
    batch = build_rows(model.config, ROWS)
    expected = 36 if compressor == "none" else (-(-6 // window)) ** 2
    assert model.config.num_image_tokens == expected
    assert model.get_image_features(batch["pixel_values"]).pooler_output.shape[1] == expected
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 2


@torch.no_grad()
def test_high_resolution_views():
    model = tiny_model("phi", view_grid=[2, 2])
    assert model.config.num_image_tokens == 5 * 4
    batch = build_rows(model.config, ROWS)
    logits = model(**batch).logits
    for row, (_, expected) in enumerate(singles(model, batch["pixel_values"])):
        torch.testing.assert_close(row_logits(logits, batch, row), expected, **TOLERANCE)
    swapped = batch["pixel_values"].clone()
    swapped[0, [1, 2]] = swapped[0, [2, 1]]
    assert not torch.allclose(model(**dict(batch, pixel_values=swapped)).logits[0], logits[0], **TOLERANCE)


@torch.no_grad()
def test_encoder_stops_at_the_feature_layer():
    """Features equal the hidden state of the whole encoder at that layer."""
    config = tiny_config("llama", "siglip", vision_feature_layer=-2)
    model = FlashSlothForConditionalGeneration(config).eval()
    assert len(model.model.vision_tower.encoder.layers) == config.vision_config.num_hidden_layers - 1
    from transformers import SiglipVisionModel

    whole = SiglipVisionModel(config.vision_config).eval()
    whole.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    pixels = torch.randn(2, 1, 3, config.image_height, config.image_width)
    hidden = whole(pixels[:, 0], output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.model.encode_views(pixels), hidden)

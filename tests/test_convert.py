"""Conversion of a small checkpoint in the authors' format: exactness, error paths, nothing half-written."""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import flashsloth
from flashsloth.checkpoints import convert_official
from flashsloth.checkpoints import folder as checkpoint_files
from flashsloth.checkpoints.convert_official import convert_checkpoint
from flashsloth.checkpoints.official_format import (
    EMBEDDING,
    PREFIXES,
    QUERY_TOKENS,
    config_from_official,
    to_ours,
    to_theirs,
)

VOCABULARY, WIDTH, INNER, VISION, PATCH, GRID = 50304, 8, 36, 72, 4, 6
NUM_LAYERS, HEADS, ROTARY = 8, 2, 0.5
IMAGE_SIZE = PATCH * GRID


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a tiny checkpoint as the authors lay it out."""
    linears = {"lm_head": (VOCABULARY, WIDTH), "model.mm_projector.0": (WIDTH, VISION)}
    linears |= {"model.mm_projector.2": (WIDTH, WIDTH)}
    linears |= {"model.pooling.mlp.0": (VISION, VISION), "model.pooling.mlp.3": (1, VISION)}
    norms = {"model.final_layernorm": WIDTH}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        linears |= {f"{prefix}.self_attn.{name}": (WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "dense")}
        linears |= {f"{prefix}.mlp.fc1": (4 * WIDTH, WIDTH), f"{prefix}.mlp.fc2": (WIDTH, 4 * WIDTH)}
        norms[f"{prefix}.input_layernorm"] = WIDTH
    query = "model.lqformer"
    linears |= {f"{query}.down_projector_learnable_text": (INNER, WIDTH)}
    linears |= {f"{query}.down_projector_image": (INNER, VISION), f"{query}.up_projector": (WIDTH, VISION)}
    for attention in ("t2q_attn", "i2q_attn"):
        linears |= {f"{query}.layers.0.{attention}.{name}": (INNER, INNER) for name in ("q_proj", "k_proj", "v_proj")}
    linears[f"{query}.layers.0.i2q_attn.v_proj"] = (VISION, VISION)
    norms |= {f"{query}.layers.0.{name}": INNER for name in ("ln_text", "ln_q", "ln_kv")}
    tower = "model.vision_tower.vision_tower.vision_model"
    for layer in range(2):
        prefix = f"{tower}.encoder.layers.{layer}"
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        linears |= {f"{prefix}.self_attn.{name}": (VISION, VISION) for name in names}
        linears |= {f"{prefix}.mlp.fc1": (16, VISION), f"{prefix}.mlp.fc2": (VISION, 16)}
        norms |= {f"{prefix}.layer_norm1": VISION, f"{prefix}.layer_norm2": VISION}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (VOCABULARY, WIDTH), QUERY_TOKENS: (9, WIDTH)}
    shapes[f"{tower}.embeddings.patch_embedding.weight"] = (VISION, 3, PATCH, PATCH)
    shapes[f"{tower}.embeddings.patch_embedding.bias"] = (VISION,)
    shapes[f"{tower}.embeddings.position_embedding.weight"] = (GRID * GRID, VISION)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes


def official_config(**changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["FlashSlothForCausalLM"],
        "model_type": "phi",
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "mm_hidden_size": VISION,
        "partial_rotary_factor": ROTARY,
        "rope_theta": 5000.0,
        "eos_token_id": 50256,
        "torch_dtype": "float16",
        "image_hd": False,
    }
    return config | changes


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in official_shapes().items()}


@pytest.fixture
def theirs(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    return write(tmp_path / "theirs", tensors)


def write(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(official_config(**changes)))
    save_file(tensors, folder / "model.safetensors")
    return folder


def convert(source: Path, destination: Path, **kwargs: Any) -> Path:
    if not kwargs.get("to_official"):
        kwargs.setdefault("image_size", IMAGE_SIZE)
    return convert_checkpoint(source, destination, **kwargs)


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_converted_folder(theirs: Path, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    seen: list[tuple[int, int]] = []
    ours = convert(theirs, tmp_path / "deep" / "ours", progress=lambda *done: seen.append(done))
    model, info = AutoModelForImageTextToText.from_pretrained(ours, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, flashsloth.FlashSlothForConditionalGeneration)
    assert not any(info.values()), info
    config = model.config
    assert (config.vision_config.num_hidden_layers, config.vision_feature_layer) == (3, -2)
    assert config.vision_config.num_attention_heads == 1
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (IMAGE_SIZE, PATCH)
    assert (config.embedded_query_hidden_size, config.embedded_query_num_heads) == (INNER, HEADS)
    assert config.text_config.rope_parameters["partial_rotary_factor"] == ROTARY
    assert config.text_config.rope_parameters["rope_theta"] == 5000.0
    assert model.generation_config.eos_token_id == config.text_config.eos_token_id == 50296
    assert config.view_grid is None
    folded = tensors[QUERY_TOKENS].float() + tensors[EMBEDDING][764].float()
    torch.testing.assert_close(model.model.query_tokens.weight.data, folded, atol=0, rtol=0)
    assert seen[-1][0] == seen[-1][1] > 0
    stored = all_tensors(ours)
    half = {name: tensor for name, tensor in stored.items() if name != to_ours(QUERY_TOKENS)}
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_high_resolution_by_its_config(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    ours = convert(write(tmp_path / "hd", tensors, image_hd=True), tmp_path / "ours")
    config = flashsloth.FlashSlothConfig.from_pretrained(ours)
    assert (config.view_grid, config.num_views, config.num_image_tokens) == ([2, 2], 5, 5 * (GRID // 3) ** 2)
    back = convert(ours, tmp_path / "back", to_official=True)
    assert json.loads((back / "config.json").read_text())["image_hd"] is True


def test_names_are_a_bijection() -> None:
    names = list(official_shapes())
    assert [to_theirs(to_ours(name)) for name in names] == names
    assert to_theirs("model.vision_tower.vision_model.embeddings.patch_embedding.bias") == to_theirs(
        "model.vision_tower.embeddings.patch_embedding.bias"
    )
    for side in (list(PREFIXES), list(PREFIXES.values())):
        assert not any(a != b and a.startswith(b) for a in side for b in side)


@pytest.mark.parametrize("max_shard_size", ["100KB", "2GB"])
def test_round_trip_of_shards(tmp_path: Path, tensors: dict[str, Tensor], max_shard_size: str) -> None:
    theirs = write(tmp_path / "theirs", tensors)
    (theirs / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, theirs / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))

    ours = convert(theirs, tmp_path / "ours", max_shard_size=max_shard_size)
    assert (ours / "model.safetensors.index.json").exists() == (max_shard_size == "100KB")
    back = convert(ours, tmp_path / "back", to_official=True, max_shard_size=max_shard_size)
    assert_same(all_tensors(back), tensors)
    returned = json.loads((back / "config.json").read_text())
    assert official_config().items() <= returned.items()

    (theirs / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model-00002-of-00002.safetensors"):
        convert(theirs, tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip_is_exact_where_sums_are_not(
    tmp_path: Path, tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """A tiny query token beside a large embedding loses bits in any sum of bounded precision."""
    changed = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
    changed[QUERY_TOKENS][0, 0], changed[EMBEDDING][764, 0] = 2.0**-24 * 3, 1.5
    changed[QUERY_TOKENS][1, 1], changed[EMBEDDING][764, 1] = -(2.0**-14), 60000.0
    ours = convert(write(tmp_path / "theirs", changed), tmp_path / "ours")
    assert json.loads((ours / "official_checkpoint.json").read_text())["query_tokens"]["inexact"]
    assert_same(all_tensors(convert(ours, tmp_path / "back", to_official=True)), changed)


def test_further_trained_weights_go_back(theirs: Path, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    ours = convert(theirs, tmp_path / "ours")
    model = AutoModelForImageTextToText.from_pretrained(ours, dtype=torch.float32)
    model.model.query_tokens.weight.data += 1
    model.model.language_model.embed_tokens.weight.data[764] -= 2
    model.save_pretrained(tmp_path / "trained")
    back = all_tensors(convert(tmp_path / "trained", tmp_path / "back", to_official=True))
    expected = {name: tensor.float() for name, tensor in tensors.items()}
    expected[QUERY_TOKENS] += 3
    expected[EMBEDDING][764] -= 2
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(back[name], tensor, atol=1e-6, rtol=0)


def test_half_precision_loads_like_the_authors_sum(theirs: Path, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(convert(theirs, tmp_path / "ours"))
    assert model.dtype == torch.float16
    assert torch.equal(model.model.query_tokens.weight, tensors[QUERY_TOKENS] + tensors[EMBEDDING][764])


@pytest.mark.parametrize("to_official", [False, True])
def test_wanted_format_is_copied(
    theirs: Path, tmp_path: Path, to_official: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source = theirs if to_official else convert(theirs, tmp_path / "ours")
    with caplog.at_level(logging.INFO, logger="flashsloth"):
        again = convert_checkpoint(source, tmp_path / "again", to_official=to_official)
    assert "already is in the wanted format" in caplog.text
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    before = sorted(source.iterdir())
    assert convert_checkpoint(source, source, to_official=to_official) == source
    assert sorted(source.iterdir()) == before


def test_every_wrong_tensor_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    wrong = dict(tensors)
    missing = ["model.layers.3.mlp.fc2.bias", QUERY_TOKENS, EMBEDDING]
    for name in missing:
        del wrong[name]
    wrong["model.surprise.weight"] = torch.zeros(2)
    wrong["model.vision_tower.vision_tower.vision_model.post_layernorm.weight"] = torch.zeros(VISION)
    wrong["model.mm_projector.2.weight"] = torch.zeros(WIDTH, WIDTH + 1)
    with pytest.raises(ValueError) as caught:
        convert(write(tmp_path / "theirs", wrong), tmp_path / "ours")
    message = str(caught.value)
    assert all(f"missing {name}" in message for name in missing)
    assert "unexpected model.surprise.weight" in message
    assert "unexpected model.vision_tower.vision_tower.vision_model.post_layernorm.weight" in message
    assert f"misshapen model.mm_projector.2.weight: [{WIDTH}, {WIDTH + 1}], expected [{WIDTH}, {WIDTH}]" in message
    assert message.count("missing ") == len(missing)
    assert message.count("unexpected ") == 2
    assert message.count("misshapen ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_any_missing_tensor_is_named(tmp_path: Path) -> None:
    every = official_shapes()
    expected: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in every:
        shapes = {key: shape for key, shape in every.items() if key != name}
        config = config_from_official(official_config(), shapes, image_size=IMAGE_SIZE)
        key = config.to_json_string()
        if key not in expected:
            found = convert_official._expected_shapes(config)
            expected[key] = {to_theirs(ours) or ours: shape for ours, shape in found.items()}
        with pytest.raises(ValueError, match=f"missing {name}[.;]"):
            convert_official._account(tmp_path, shapes, expected[key])


def test_missing_tensor_on_the_way_back(theirs: Path, tmp_path: Path) -> None:
    ours = convert(theirs, tmp_path / "ours")
    stored = load_file(ours / "model.safetensors")
    for lost in ("model.language_model.embed_tokens.weight", "model.query_tokens.weight"):
        save_file({name: tensor for name, tensor in stored.items() if name != lost}, ours / "model.safetensors")
        with pytest.raises(ValueError, match=f"missing {lost}"):
            convert(ours, tmp_path / "back", to_official=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 50296}, "no row 50297 for the image placeholder"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"architectures": ["PhiForCausalLM"]}, "PhiForCausalLM"),
        ({"mm_hidden_size": 80}, "give vision_num_attention_heads"),
        ({"num_hidden_layers": 7}, "unexpected model.layers.7|embedded_query_layer"),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_config_that_cannot_be_converted(
    tmp_path: Path, tensors: dict[str, Tensor], changes: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "theirs", tensors, **changes)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_image_size_that_does_not_fit_is_refused(theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the image_size"):
        convert_checkpoint(theirs, tmp_path / "ours")


def test_pickle_is_refused(theirs: Path, tmp_path: Path) -> None:
    (theirs / "model.safetensors").rename(theirs / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle.*pytorch_model.bin.*safetensors"):
        convert(theirs, tmp_path / "ours")


@pytest.mark.parametrize("size", [0, 100, -10])
def test_truncated_weights_are_named(theirs: Path, tmp_path: Path, size: int) -> None:
    file = theirs / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        convert(theirs, tmp_path / "ours")


def test_missing_source_and_broken_config(theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "ours")
    (theirs / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert(theirs, tmp_path / "ours")


def test_destination_is_not_overwritten(theirs: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert(theirs, ours)
    assert (ours / "notes.txt").read_text() == "mine"
    convert(theirs, ours, overwrite=True)
    assert not (ours / "notes.txt").exists()
    assert (ours / "config.json").exists()
    with pytest.raises(ValueError, match="lies in the source"):
        convert(theirs, theirs / "inside")
    with pytest.raises(ValueError, match="source lies in"):
        convert(theirs, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


FULL_DISK = (
    OSError(errno.ENOSPC, "No space left on device"),
    Exception("No space left on device (os error 28)"),  # as tokenizers says it
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
)


def full_after(number: int, error: Exception = FULL_DISK[0]) -> Callable[..., None]:
    calls = iter(range(number))

    def save(*args: Any, **kwargs: Any) -> None:
        if next(calls, None) is None:
            raise error
        save_file(*args, **kwargs)

    return save


@pytest.mark.parametrize("error", FULL_DISK, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk_leaves_nothing(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, error: Exception
) -> None:
    ours = tmp_path / "made" / "ours"
    if overwrite:
        ours.mkdir(parents=True)
        (ours / "notes.txt").write_text("mine")
    monkeypatch.setattr(convert_official, "save_file", full_after(2, error))
    with pytest.raises(OSError, match="the disk is full") as caught:
        convert(theirs, ours, max_shard_size="100KB", overwrite=overwrite)
    assert caught.value.errno == errno.ENOSPC
    left = sorted(path.name for path in tmp_path.rglob("*") if theirs not in (path, *path.parents))
    assert left == (["made", "notes.txt", "ours"] if overwrite else [])


def test_error_that_is_not_of_the_system_passes_through(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_official, "save_file", full_after(0, KeyError("a mistake of ours")))
    with pytest.raises(KeyError, match="a mistake of ours"):
        convert(theirs, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_too_small_disk_is_noticed_before_writing(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(convert_official, "save_file", full_after(0))
    with pytest.raises(OSError, match="the disk is full.*1000 are free"):
        convert(theirs, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_unwritable_place_is_an_os_error(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Cannot write"):
        convert(theirs, tmp_path / "file" / "ours")


@pytest.mark.parametrize(
    ("field", "value"), [("compressor", "average"), ("embedded_query_layer", 3), ("view_grid", [1, 2])]
)
def test_model_the_authors_cannot_hold_is_refused(theirs: Path, tmp_path: Path, field: str, value: Any) -> None:
    ours = convert(theirs, tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    config[field] = value
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"cannot hold this model: .*{field}"):
        convert(ours, tmp_path / "back", to_official=True)

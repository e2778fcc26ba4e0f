"""The converted tiny checkpoint computes what the authors' implementation recorded, through the real processor."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from official_fixture import OfficialFixture, expand
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import flashsloth  # noqa: F401 - registers the classes
from flashsloth.checkpoints.convert_official import convert_checkpoint

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
SINGLES = ("single", "single_b", "hd")
TEXT_ONLY_ROW = [("What is the capital of France?", "Paris.")]


@pytest.fixture(scope="module")
def official(parity_dir: Path) -> OfficialFixture:
    return OfficialFixture(parity_dir)


class Converted:
    """A converted checkpoint, loaded."""

    def __init__(self, folder: Path, **kwargs: Any) -> None:
        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


@pytest.fixture(scope="module")
def converted(official: OfficialFixture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    folder = tmp_path_factory.mktemp("official")
    made = {}
    for name, image_hd in (("square", False), ("hd", True)):
        source = official.write_checkpoint(folder / name, image_hd=image_hd)
        target = convert_checkpoint(source, folder / f"{name}-ours")
        made[name] = Converted(target, attn_implementation="eager")
    return made


def conversation(turns: list[Any], image: Path | None) -> list[dict[str, Any]]:
    messages = []
    for number, (question, answer) in enumerate(turns):
        content = [{"type": "text", "text": question}]
        if image is not None and number == 0:
            content.insert(0, {"type": "image", "path": str(image)})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def inputs_of(official: OfficialFixture, converted: dict[str, Converted], name: str) -> tuple[Any, Any]:
    """Model and batch of a case, prepared from its prompt or conversation and its image files."""
    case = official.cases[name]
    ours = converted["hd" if name == "hd" else "square"]
    if name.startswith("train"):
        turns = official.cases["train_two_turns"]
        rows = [conversation(turns["turns"], official.image(turns["image"]))]
        if name == "train_mixed_batch":
            rows.append(conversation(TEXT_ONLY_ROW, None))
        inputs = ours.processor.apply_chat_template(
            rows,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_labels=True,
            padding_side="right",
            space_before_query=True,
        )
    else:
        prompts = case.get("prompts") or [case["prompt"]]
        images = [official.image(image) for image in case.get("images") or [case["image"]]]
        inputs = ours.processor(text=prompts, images=images, padding_side="right", return_tensors="pt")
    return ours.model, inputs


def recorded_rows(official: OfficialFixture, model: Any, name: str, key: str) -> list[Tensor]:
    """A recorded tensor at every position after expansion, row by row, without padding."""
    config = model.config
    ids = official.expected[f"{name}.input_ids"]
    mask = official.expected.get(f"{name}.attention_mask", torch.ones_like(ids)).bool()
    values = official.expected[f"{name}.{key}"]
    return [
        expand(row[keep], row_ids[keep], config.num_image_tokens, config.query_token_id, config.num_query_tokens)
        for row, row_ids, keep in zip(values, ids, mask, strict=True)
    ]


@pytest.mark.parametrize("name", ["single", "single_b", "batch2", "hd", "train_two_turns", "train_mixed_batch"])
def test_case(official: OfficialFixture, converted: dict[str, Converted], name: str) -> None:
    model, inputs = inputs_of(official, converted, name)
    keep = inputs["attention_mask"].bool()

    ids = recorded_rows(official, model, name, "input_ids")
    for row, row_keep, expected in zip(inputs["input_ids"], keep, ids, strict=True):
        expected[expected < 0] = model.config.image_token_id
        assert torch.equal(row[row_keep], expected)
    if "labels" in inputs:
        for row, row_keep, expected in zip(
            inputs["labels"], keep, recorded_rows(official, model, name, "labels"), strict=True
        ):
            assert torch.equal(row[row_keep], expected)

    with torch.no_grad():
        outputs = model(**inputs)
    expected = official.expected[f"{name}.logits"]
    torch.testing.assert_close(
        outputs.logits[..., official.vocab_columns][keep], expected[keep], atol=TOLERANCE, rtol=0.0
    )
    assert torch.equal(outputs.logits.argmax(-1)[keep], official.expected[f"{name}.argmax"][keep])
    if "labels" in inputs:
        assert abs(outputs.loss.item() - official.cases[name]["loss"]) < TOLERANCE


@pytest.mark.parametrize("name", SINGLES)
def test_greedy_tokens(official: OfficialFixture, converted: dict[str, Converted], name: str) -> None:
    model, inputs = inputs_of(official, converted, name)
    expected = official.cases[name]["greedy"]
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=len(expected))
    assert answer[0, inputs["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("name", SINGLES)
def test_chat_template_gives_the_recorded_prompt(
    official: OfficialFixture, converted: dict[str, Converted], name: str
) -> None:
    _, inputs = inputs_of(official, converted, name)
    case = official.cases[name]
    question = case["prompt"].split("<image>\n")[1].split("<learnable>")[0]
    messages = conversation([(question, "")], official.image(case["image"]))[:1]
    ours = converted["hd" if name == "hd" else "square"].processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert ours.keys() == inputs.keys()
    for key in ours:
        assert torch.equal(ours[key], inputs[key]), key


def test_image_features(official: OfficialFixture, converted: dict[str, Converted]) -> None:
    model, inputs = inputs_of(official, converted, "single")
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
        grid = (model.config.grid_height, model.config.grid_width)
        pooled = model.model.compressor(features.last_hidden_state.unflatten(1, grid))
    for found, name in (
        (features.last_hidden_state[:, ::27], "vision_features"),
        (pooled[:, ::9], "sap"),
        (features.pooler_output, "visual_tokens"),
    ):
        torch.testing.assert_close(found, official.expected[f"single.{name}"], atol=TOLERANCE, rtol=0.0)


@pytest.mark.parametrize("views", ["square", "hd"])
def test_pixels(official: OfficialFixture, converted: dict[str, Converted], views: str) -> None:
    processor = converted[views].processor.image_processor
    names = [key.removeprefix(f"{views}.") for key in official.pixels_sha256 if key.startswith(f"{views}.")]
    assert names
    for name in names:
        pixels = processor(official.image(name), return_tensors="pt")["pixel_values"][0]
        levels = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)
        levels = levels if views == "hd" else levels[0]
        assert torch.equal(levels[..., ::4, ::4], official.expected[f"pixels_u8.{views}.{name}"])
        assert hashlib.sha256(levels.numpy().tobytes()).hexdigest() == official.pixels_sha256[f"{views}.{name}"]


@pytest.mark.parametrize("implementation", ["sdpa"])
def test_other_attention(official: OfficialFixture, converted: dict[str, Converted], implementation: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(
        converted["square"].folder, dtype=torch.float32, attn_implementation=implementation
    ).eval()
    _, inputs = inputs_of(official, converted, "batch2")
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs).logits[..., official.vocab_columns]
    torch.testing.assert_close(logits[keep], official.expected["batch2.logits"][keep], atol=TOLERANCE, rtol=0.0)


def without_pooling_attention(model: Any, inputs: Any) -> None:
    model.model.compressor.score[-1].weight.data.zero_()


def without_embedded_query(model: Any, inputs: Any) -> None:
    model.model.embedded_query.up_projection.weight.data.zero_()
    model.model.embedded_query.up_projection.bias.data.zero_()


def first_question_for_every_turn(model: Any, inputs: Any) -> None:
    question = inputs["question_ids"]
    question[question == 1] = 2


def swapped_images(model: Any, inputs: Any) -> None:
    inputs["pixel_values"] = inputs["pixel_values"].flip(0)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("single", without_pooling_attention),
        ("single", without_embedded_query),
        ("train_two_turns", first_question_for_every_turn),
        ("batch2", swapped_images),
    ],
)
def test_parity_notices_each_part(
    official: OfficialFixture, converted: dict[str, Converted], name: str, damage: Any
) -> None:
    _, inputs = inputs_of(official, converted, name)
    model = AutoModelForImageTextToText.from_pretrained(converted["square"].folder, dtype=torch.float32).eval()
    damage(model, inputs)
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs).logits[..., official.vocab_columns]
    assert (logits[keep] - official.expected[f"{name}.logits"][keep]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("num_shards", [1, 3])
def test_round_trip(official: OfficialFixture, tmp_path: Path, num_shards: int) -> None:
    source = official.write_checkpoint(tmp_path / "theirs", num_shards=num_shards)
    convert_checkpoint(source, tmp_path / "ours", max_shard_size="8MB" if num_shards > 1 else "2GB")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to_official=True)
    expected = official.tensors()
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    for file in source.glob("*.json"):
        if not file.name.startswith("model"):
            assert read(tmp_path / "back" / file.name) == read(file), file.name


def test_tokenizer_ids(converted: dict[str, Converted]) -> None:
    ours = converted["square"]
    tokenizer = ours.processor.tokenizer
    text_config = ours.model.config.text_config
    assert tokenizer.convert_tokens_to_ids("<image>") == ours.model.config.image_token_id == 50297
    assert tokenizer.convert_tokens_to_ids("<learnable>") == ours.model.config.query_token_id == 50295
    assert tokenizer.eos_token_id == text_config.eos_token_id == ours.model.generation_config.eos_token_id == 50296
    assert tokenizer.pad_token_id == text_config.pad_token_id == ours.model.generation_config.pad_token_id == 50256
    assert len(tokenizer) == 50298


def test_tokenizer_with_other_ids_is_refused(official: OfficialFixture, tmp_path: Path) -> None:
    source = official.write_checkpoint(tmp_path / "theirs")
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace("<learnable>", "<something>"))
    text = (source / "tokenizer_config.json").read_text()
    (source / "tokenizer_config.json").write_text(text.replace("<learnable>", "<something>"))
    with pytest.raises(ValueError, match="<learnable> the id 50297"):
        convert_checkpoint(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_tokenizer_from_elsewhere(official: OfficialFixture, tmp_path: Path) -> None:
    source = official.write_checkpoint(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink()
    convert_checkpoint(source, tmp_path / "ours", tokenizer=official.tokenizer)
    assert AutoProcessor.from_pretrained(tmp_path / "ours").num_image_tokens == 81


def test_back_after_training_elsewhere(
    official: OfficialFixture, converted: dict[str, Converted], tmp_path: Path
) -> None:
    """A folder saved by `save_pretrained` remembers nothing of the authors' files, and still goes back."""
    ours = converted["hd"]
    ours.model.save_pretrained(tmp_path / "saved")
    ours.processor.save_pretrained(tmp_path / "saved")
    back = convert_checkpoint(tmp_path / "saved", tmp_path / "back", to_official=True)
    found = load_file(back / "model.safetensors")
    for name, tensor in official.tensors().items():
        torch.testing.assert_close(found[name], tensor.float(), atol=1e-6, rtol=0)
    config = read(back / "config.json")
    assert (config["image_hd"], config["model_type"], config["torch_dtype"]) == (True, "phi", "float32")
    text = "USER: a  picture<learnable> ASSISTANT: yes</s>"
    theirs = AutoTokenizer.from_pretrained(official.tokenizer)
    returned = AutoTokenizer.from_pretrained(back)
    assert returned(text).input_ids == theirs(text).input_ids
    assert len(returned) == len(theirs)


def read(file: Path) -> Any:
    return json.loads(file.read_text())

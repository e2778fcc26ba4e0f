"""Models built from folders of pretrained encoders and decoders."""

import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
)

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.train.build import VOCABULARY_MULTIPLE, build, load
from flashsloth.train.recipe import ModelRecipe, TokenizerRecipe
from tiny_models import DECODERS, ENCODERS, VOCABULARY
from tiny_session import noise_image

LETTERS = [chr(code) for code in range(32, 32 + VOCABULARY - 2)]
CONFIG = {
    "num_query_tokens": 2,
    "embedded_query_layer": 1,
    "embedded_query_hidden_size": 12,
    "embedded_query_num_heads": 4,
}


def save_language(folder: Path, family: str, pad: bool = True) -> Path:
    """A random decoder and a tokenizer without FlashSloth's placeholders."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(DECODERS[family]).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: 2 + index for index, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>"} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **names).save_pretrained(folder)
    return folder


def save_vision(folder: Path, family: str) -> Path:
    """A random encoder: alone, or inside an image-text model as SigLIP and CLIP are published."""
    random_vision(family).save_pretrained(folder)
    return folder


def random_vision(family: str) -> torch.nn.Module:
    torch.manual_seed(2)
    alone = ENCODERS[family.removesuffix("-dual")]
    text = {
        "vocab_size": 8,
        "hidden_size": 24,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    if family == "siglip-dual":
        return SiglipModel(SiglipConfig(vision_config=alone.to_dict(), text_config=SiglipTextConfig(**text).to_dict()))
    if family == "clip-dual":
        text_config = CLIPTextConfig(**text).to_dict()
        return CLIPModel(CLIPConfig(vision_config=alone.to_dict(), text_config=text_config, projection_dim=8))
    return AutoModel.from_config(alone)


def recipe_of(vision: Path, language: Path, **settings) -> ModelRecipe:
    config = {**CONFIG, **settings.pop("config", {})}
    return ModelRecipe(vision=str(vision), language=str(language), config=config, **settings)


@pytest.mark.parametrize("vision", ["siglip", "siglip-dual", "clip", "clip-dual", "dinov2"])
@pytest.mark.parametrize("language", ["qwen3", "phi", "qwen2"])
def test_pretrained_weights_are_copied(tmp_path, vision, language):
    folders = save_vision(tmp_path / "vision", vision), save_language(tmp_path / "language", language)
    model, processor = build(recipe_of(*folders))
    tower = model.model.vision_tower
    kept = tower.config.num_hidden_layers
    assert kept == ENCODERS[vision.removesuffix("-dual")].num_hidden_layers - 1
    stored = {name.removeprefix("vision_model."): value for name, value in random_vision(vision).state_dict().items()}
    copied = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    assert copied and all(torch.equal(value, stored[name]) for name, value in copied.items())

    decoder = AutoModelForCausalLM.from_pretrained(folders[1])
    tied = {"lm_head.weight"} if decoder.config.tie_word_embeddings else set()
    ours = model.model.language_model.state_dict()
    for name, value in decoder.base_model.state_dict().items():
        assert torch.equal(ours[name][: len(value)], value), name
    assert torch.equal(model.lm_head.weight[:VOCABULARY], decoder.get_output_embeddings().weight)
    assert model.config.text_config.vocab_size == model.lm_head.weight.shape[0] == VOCABULARY_MULTIPLE * 2
    assert bool(tied) == (model.lm_head.weight is model.get_input_embeddings().weight)
    assert processor.tokenizer.convert_ids_to_tokens([model.config.query_token_id, model.config.image_token_id]) == [
        "<learnable>",
        "<image>",
    ]


def test_a_built_model_learns_saves_and_answers(tmp_path):
    vision, language = save_vision(tmp_path / "vision", "siglip-dual"), save_language(tmp_path / "language", "qwen3")
    model, processor = build(recipe_of(vision, language))
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(conversation, images=[noise_image()], return_labels=True, **options)
    model(**batch).loss.backward()
    assert model.model.embedded_query.up_projection.weight.grad.any()
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    again, processor = load(tmp_path / "whole")
    prompt = processor.apply_chat_template(
        conversation[:1], images=[noise_image()], add_generation_prompt=True, **options
    )
    expected = model.eval().generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.eval().generate(**prompt, max_new_tokens=4, do_sample=False), expected)
    assert again.generation_config.eos_token_id == 1 == processor.tokenizer.eos_token_id


def test_tokens_of_the_recipe_get_the_published_order(tmp_path):
    vision, language = save_vision(tmp_path / "vision", "siglip"), save_language(tmp_path / "language", "phi")
    tokenizer = TokenizerRecipe(source=str(language), eos_token="</s>", pad_token="<eos>")
    model, processor = build(recipe_of(vision, language, tokenizer=tokenizer))
    ids = processor.tokenizer.convert_tokens_to_ids(["<learnable>", "</s>", "<image>"])
    assert ids == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    assert (processor.tokenizer.eos_token, processor.tokenizer.pad_token) == ("</s>", "<eos>")
    assert model.config.text_config.eos_token_id == model.generation_config.eos_token_id == ids[1]
    assert model.config.text_config.pad_token_id == 1


def test_phi_2_gets_the_ids_of_the_published_checkpoints(parity_dir):
    from flashsloth.train.build import _tokenizer

    source = str(parity_dir / "phi2-tokenizer")
    recipe = recipe_of(Path("unused"), Path("unused"))
    recipe.tokenizer = TokenizerRecipe(source=source, eos_token="</s>", pad_token="<|endoftext|>")
    tokenizer = _tokenizer(recipe)
    tokens = ["<|endoftext|>", "<learnable>", "</s>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [50256, 50295, 50296, 50297]


def test_a_tokenizer_without_padding_is_reported(tmp_path, caplog):
    language = save_language(tmp_path / "language", "phi", pad=False)
    with caplog.at_level(logging.WARNING):
        _, processor = build(recipe_of(save_vision(tmp_path / "vision", "siglip"), language))
    assert "no padding token" in caplog.text and processor.tokenizer.pad_token == "<eos>"


def test_pixels_are_normalized_as_the_encoder_was_trained(tmp_path, caplog):
    vision, language = save_vision(tmp_path / "vision", "clip-dual"), save_language(tmp_path / "language", "phi")
    with caplog.at_level(logging.WARNING):
        assert build(recipe_of(vision, language))[1].image_processor.image_mean == [0.5, 0.5, 0.5]
    assert "mean and deviation" in caplog.text
    (vision / "preprocessor_config.json").write_text(
        '{"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}'
    )
    image_processor = build(recipe_of(vision, language))[1].image_processor
    assert image_processor.image_mean == [0.48, 0.46, 0.41] and image_processor.image_std == [0.27, 0.26, 0.28]


def test_weights_that_are_not_there_are_refused(tmp_path):
    """A file without the encoder's weights must not silently leave them random."""
    from safetensors.torch import load_file, save_file

    vision, language = save_vision(tmp_path / "vision", "siglip"), save_language(tmp_path / "language", "phi")
    weights = load_file(vision / "model.safetensors")
    lost = next(name for name in weights if "layers.0" in name)
    save_file(
        {name: value for name, value in weights.items() if name != lost},
        vision / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="model.vision .* lacks 1 of the weights.*layers.0"):
        build(recipe_of(vision, language))


def test_a_whole_model_is_named_or_a_folder(tmp_path):
    model, _ = load("nano")
    assert isinstance(model, FlashSlothForConditionalGeneration)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="flashsloth merge"):
        load(tmp_path)

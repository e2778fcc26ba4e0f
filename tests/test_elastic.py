"""One set of weights, many token counts: chosen by a request, mixed in a batch, drawn in training."""

import logging

import pytest
import torch
from PIL import Image

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.data.collator import Collator
from flashsloth.data.schema import Sample
from flashsloth.inference import load
from flashsloth.inference.batches import Record, answer, prepare
from flashsloth.model.compressors import COMPRESSORS
from flashsloth.train.build import build, build_processor
from flashsloth.train.recipe import ModelRecipe
from tiny_models import tiny_config
from tiny_session import TEMPLATE, character_tokenizer, noise_image, tiny_folder

ELASTIC = {"compressor_window": 2, "compressor_windows": [1, 2, 3, 6]}  # of a 6 x 6 grid: 36, 9, 4 and 1 tokens
COUNTS = (36, 9, 4, 1)
GENERATION = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("elastic"), "qwen3", **ELASTIC)


@pytest.fixture(scope="module")
def model(folder):
    return FlashSlothForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return FlashSlothProcessor.from_pretrained(folder)


def chat(*questions, images=1):
    first = [{"type": "image"}] * images + [{"type": "text", "text": questions[0]}]
    messages = [{"role": "user", "content": first}]
    for question in questions[1:]:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "no"}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    return messages


def encode(processor, conversations, images, visual_tokens, **options):
    return processor.apply_chat_template(
        conversations,
        images=images,
        visual_tokens=visual_tokens,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        **options,
    )


def test_the_choices_are_listed(model, processor):
    assert model.config.visual_token_choices == {36: 1, 9: 2, 4: 3, 1: 6}
    assert processor.visual_token_choices == list(COUNTS)
    assert model.config.num_image_tokens == 9


@pytest.mark.parametrize("compressor", ["spatial_attention", "average", "random"])
@pytest.mark.parametrize(("window", "count"), [(1, 36), (2, 9), (3, 4), (6, 1)])
def test_a_choice_equals_a_model_with_that_window_alone(compressor, window, count):
    torch.manual_seed(0)
    elastic = FlashSlothForConditionalGeneration(tiny_config(compressor=compressor, **ELASTIC)).eval()
    alone = FlashSlothForConditionalGeneration(tiny_config(compressor=compressor, compressor_window=window)).eval()
    alone.load_state_dict(elastic.state_dict())
    pixels = torch.randn(2, 1, 3, 24, 24)
    chosen = elastic.get_image_features(pixels, image_token_counts=torch.tensor([count, count]))
    torch.testing.assert_close(chosen.pooler_output, alone.get_image_features(pixels).pooler_output)
    assert chosen.pooler_output.shape[1] == count == alone.config.num_image_tokens


def test_the_default_is_the_configured_window(model, processor):
    image = noise_image()
    plain = encode(processor, [chat("what?")], [image], None)
    assert "image_token_counts" not in plain
    chosen = encode(processor, [chat("what?")], [image], 9)
    assert torch.equal(plain["input_ids"], chosen["input_ids"])
    assert torch.equal(model(**plain).logits, model(**chosen).logits)


@torch.no_grad()
def test_counts_mixed_in_a_batch_change_nothing(model, processor):
    conversations = [chat("one?"), chat("two and more?", images=2), chat("three?", "four?"), chat("five?")]
    images = [noise_image(seed) for seed in range(5)]
    counts = [36, 4, 9, 1, 9]
    batch = encode(processor, conversations, images, counts)
    assert batch["image_token_counts"].tolist() == counts
    together = model(**batch).logits
    ids = model.generate(**batch, **GENERATION)
    first = 0
    for row, (conversation, number) in enumerate(zip(conversations, (1, 2, 1, 1), strict=True)):
        own = slice(first, first + number)
        single = encode(processor, [conversation], images[own], counts[own])
        length = single["input_ids"].shape[1]
        torch.testing.assert_close(together[row, -length:], model(**single).logits[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(ids[row, -6:], model.generate(**single, **GENERATION)[0, -6:])
        first += number


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": False, "num_beams": 2}]
)
def test_beams(model, processor, options):
    batch = encode(processor, [chat("one?"), chat("two?")], [noise_image(0), noise_image(1)], [4, 36])
    both = model.generate(**batch, **{**GENERATION, **options})
    single = encode(processor, [chat("two?")], [noise_image(1)], 36)
    alone = model.generate(**single, **{**GENERATION, **options})
    assert torch.equal(both[-len(alone) :, -6:], alone[:, -6:])


@torch.no_grad()
@pytest.mark.parametrize("counts", [[4, 36], [36, 1]])
def test_a_cached_beginning_with_other_counts(model, processor, counts):
    """The first image is in the cache; the second comes with the second call."""
    images = [noise_image(0), noise_image(1)]
    batch = encode(processor, [chat("one and two?", images=2)], images, counts)
    whole = model(**batch).logits
    features = model.get_image_features(batch.pop("pixel_values"), image_token_counts=batch.pop("image_token_counts"))
    cut = int(batch["image_positions"][0, 1])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = model(
        input_ids=ids[:, :cut],
        attention_mask=mask[:, :cut],
        use_cache=True,
        image_features=features.__class__(
            last_hidden_state=features.last_hidden_state[:1],
            pooler_output=features.pooler_output[:1],
            token_counts=features.token_counts[:1],
        ),
    )
    cache = first.get("past_key_values", first.get("cache"))
    rest = {name: batch[name] for name in ("image_positions", "query_positions", "question_ids")}
    second = model(input_ids=ids[:, cut:], attention_mask=mask, past_key_values=cache, image_features=features, **rest)
    torch.testing.assert_close(second.logits, whole[:, cut:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_embeddings_in_place_of_ids(model, processor):
    batch = encode(processor, [chat("one?"), chat("two?")], [noise_image(0), noise_image(1)], [4, 36])
    expected = model(**batch).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **batch).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("counts", [[4, 9], [4, 35], [9, 36]])
def test_counts_that_do_not_fit_the_prompt_are_refused(model, processor, counts):
    batch = encode(processor, [chat("one?"), chat("two?")], [noise_image(0), noise_image(1)], [4, 36])
    batch["image_token_counts"] = torch.tensor(counts)
    with pytest.raises(ValueError, match="visual_tokens|placeholder tokens"):
        model(**batch)


def test_padding_of_samples_with_and_without_counts(processor):
    rows = [encode(processor, [chat("one?")], [noise_image(0)], count) for count in (None, 4)]
    batch = processor.pad(rows)
    assert batch["image_token_counts"].tolist() == [9, 4]


@pytest.mark.parametrize("wrong", [0, -4, True, 2.5, [4, 4], "many"])
def test_wrong_numbers_are_refused_by_the_processor(processor, wrong):
    with pytest.raises(ValueError, match="visual_tokens"):
        encode(processor, [chat("one?")], [noise_image(0)], wrong)


def test_a_number_that_no_window_makes_names_those_that_one_does(folder):
    session = load(folder, device="cpu")
    with pytest.raises(ValueError, match=r"visual_tokens is 10; .* 36, 9, 4, 1 visual tokens"):
        session.ask(noise_image(), "what?", visual_tokens=10)


def test_windows_the_weights_were_not_trained_for_work_with_a_warning(tmp_path, caplog):
    session = load(tiny_folder(tmp_path, compressor_window=2), device="cpu")
    logger = logging.getLogger("flashsloth")
    logger.addHandler(caplog.handler)
    try:
        answered = session.ask(noise_image(), "what?", visual_tokens=4, max_new_tokens=3)
    finally:
        logger.removeHandler(caplog.handler)
    assert answered.visual_tokens == 4
    assert "not trained for them, but for 9" in caplog.text


@pytest.mark.parametrize("compressor", ["pixel_unshuffle", "none"])
def test_compressors_of_one_window(compressor):
    with pytest.raises(ValueError, match="compressor_windows"):
        tiny_config(compressor="pixel_unshuffle", **ELASTIC)
    assert list(tiny_config(compressor="none", **ELASTIC).visual_token_choices) == [36]
    config = tiny_config(compressor=compressor, compressor_window=2)
    assert config.window_of(config.num_image_tokens) == config.effective_window
    with pytest.raises(ValueError, match=f"can be {config.num_image_tokens} visual tokens"):
        config.window_of(4)


@pytest.mark.parametrize(
    ("windows", "message"),
    [([3, 6], "among them"), ([], "among them"), ([2, 2], "different"), ([0, 2], "at least 1"), ([2, 4], "divide")],
)
def test_wrong_windows_are_refused(windows, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(compressor_window=2, compressor_windows=windows)


def test_windows_that_make_equal_numbers_are_refused():
    with pytest.raises(ValueError, match="same number"):
        tiny_config(compressor_window=4, compressor_windows=[4, 5], compressor_padding="pad")


def test_high_resolution_views(tmp_path):
    config = tiny_config(view_grid=[1, 2], **ELASTIC)
    assert list(config.visual_token_choices) == [108, 27, 12, 3]
    session = load(tiny_folder(tmp_path, view_grid=[1, 2], **ELASTIC), device="cpu")
    assert session.ask(noise_image(), "what?", visual_tokens=12, max_new_tokens=3).visual_tokens == 12


def test_conversations_and_batches_answer_the_same(folder):
    session = load(folder, device="cpu")
    image = noise_image(3)
    for count in COUNTS:
        asked = session.ask(image, "what is it?", visual_tokens=count, max_new_tokens=6)
        assert asked.visual_tokens == count
        conversation = session.conversation([image, image], visual_tokens=[count, 4])
        first = conversation.ask("what is it?", max_new_tokens=4)
        second = conversation.ask("and now?", max_new_tokens=4)
        assert first.visual_tokens == second.visual_tokens == count + 4 and second.reused_tokens > count + 4
        records = [Record("a", (image,), "what is it?"), Record("b", (image, noise_image(1)), "and two?")]
        lines = answer(session, prepare(records, session.processor, 256, count), 6)
        assert lines[0]["answer"] == asked.text


def sample(question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    return Sample([Image.new("RGB", (24, 24))], messages, caption=question)


@pytest.mark.parametrize("packing", [None, "rows"])
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_training_draws_from_all_choices(model, processor, packing, template):
    collator = Collator(processor, template, 200, packing=packing)
    batch = collator([sample(f"what is {index}?") for index in range(40)])
    counts = batch["image_token_counts"].tolist()
    assert set(counts) == set(COUNTS)
    again = collator([sample(f"what is {index}?") for index in range(40)])
    assert again["image_token_counts"].tolist() == counts
    model.train()
    loss = model(**batch, **({"use_cache": False} if packing else {})).loss
    loss.backward()
    score = model.model.compressor.score[0].weight.grad
    model.zero_grad()
    model.eval()
    assert torch.isfinite(loss) and score.abs().sum() > 0


@torch.no_grad()
def test_packed_samples_with_other_counts_are_as_alone(model, processor):
    samples = [sample(f"what is {index}?") for index in range(12)]
    loose = Collator(processor, "chat", 200)(samples)
    packed = Collator(processor, "chat", 200, packing="rows")(samples)
    assert sorted(loose["image_token_counts"].tolist()) == sorted(packed["image_token_counts"].tolist())
    torch.testing.assert_close(model(**packed, use_cache=False).loss, model(**loose).loss, atol=1e-5, rtol=1e-5)


def test_a_saved_configuration_keeps_its_windows(folder):
    config = FlashSlothConfig.from_pretrained(folder)
    assert list(config.compressor_windows) == ELASTIC["compressor_windows"]


def test_a_checkpoint_of_one_window_learns_others(tmp_path):
    single = tiny_folder(tmp_path, "qwen3", compressor_window=2)
    recipe = ModelRecipe(checkpoint=str(single), config={"compressor_windows": [1, 2, 3]})
    model, processor = build(recipe)
    config, alone = build_processor(recipe)
    assert list(model.model.config.visual_token_choices) == list(config.visual_token_choices) == [36, 9, 4]
    assert processor.visual_token_choices == alone.visual_token_choices == [36, 9, 4]
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert list(load(tmp_path / "saved").config.visual_token_choices) == [36, 9, 4]
    with pytest.raises(ValueError, match="compressor_window"):
        build(ModelRecipe(checkpoint=str(single), config={"compressor_windows": [3, 6]}))


def test_a_processor_of_one_window_has_no_choice():
    processor = FlashSlothProcessor.from_config(tiny_config(), character_tokenizer(), chat_template=TEMPLATE)
    assert processor.visual_token_choices is None


def test_a_random_choice_is_made_of_real_patches_and_stays_the_same_outside_training():
    compressor = COMPRESSORS["random"](3, 4, 0.0).eval()
    grid_NHWE = torch.arange(2 * 6 * 6 * 3, dtype=torch.float32).view(2, 6, 6, 3) + 1
    chosen = compressor(grid_NHWE)
    assert torch.equal(chosen, compressor(grid_NHWE)) and torch.equal(chosen[1:], compressor(grid_NHWE[1:]))
    patches = {tuple(patch) for patch in grid_NHWE.flatten(0, 2).tolist()}
    assert {tuple(token) for token in chosen.flatten(0, 1).tolist()} <= patches  # padding is zero
    compressor.train()
    assert len({tuple(compressor(grid_NHWE).flatten().tolist()) for _ in range(20)}) > 10

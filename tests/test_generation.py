"""Every way of generating gives the answer of the plain one: no cache, embeddings, assistants, virtual tokens."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache

from flashsloth.model.backbones import CACHE_ARGUMENT
from tiny_models import DECODERS, IMAGE, QUERY, VOCABULARY, build_rows, tiny_model

ROWS = [[(1, 5, 2), (0, 3, 1)], [(0, 4, 0)], [(2, 2, 3)]]
PROMPTS = {"image": [[(1, 5, 2)]], "two turns": [[(1, 2, 2), (1, 2, 1)]], "text": [[(0, 4, 1)]]}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def new_tokens(answers):
    return answers[:, -GREEDY["max_new_tokens"] :].tolist()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_without_a_cache(decoder, options):
    model = tiny_model(decoder)
    batch = build_rows(model.config, ROWS)
    expected = model.generate(**batch, **GREEDY, **options)
    assert model.generate(**batch, **GREEDY, **options, use_cache=False).tolist() == expected.tolist()


def test_without_a_cache_by_the_generation_config():
    model = tiny_model("llama")
    batch = build_rows(model.config, ROWS[:1])
    expected = model.generate(**batch, **GREEDY).tolist()
    model.generation_config.use_cache = False
    assert model.generate(**batch, **GREEDY).tolist() == expected


def test_without_a_cache_one_that_is_given_is_not_read():
    model = tiny_model("llama")
    batch = build_rows(model.config, ROWS[:1])
    cache = model(**build_rows(model.config, ROWS[:1], seed=5), use_cache=True)[CACHE_ARGUMENT]
    found = model.generate(**batch, **GREEDY, use_cache=False, **{CACHE_ARGUMENT: cache})
    assert found.tolist() == model.generate(**batch, **GREEDY).tolist()


@pytest.mark.parametrize("decoder", ["phi", "gemma3"])  # Gemma 3 scales its embeddings
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
@pytest.mark.parametrize("with_positions", [True, False])
def test_from_embeddings(decoder, options, with_positions):
    model = tiny_model(decoder)
    batch = build_rows(model.config, ROWS)
    expected = new_tokens(model.generate(**batch, **GREEDY, **options))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    if not with_positions:  # they are found where an embedding is a placeholder's
        del batch["image_positions"], batch["query_positions"]
    assert new_tokens(model.generate(**batch, inputs_embeds=embeds, **GREEDY, **options)) == expected
    del batch["input_ids"]
    assert new_tokens(model.generate(**batch, inputs_embeds=embeds, **GREEDY, **options)) == expected


def test_embeddings_that_hold_something_else_at_the_positions():
    model = tiny_model("phi")
    batch = build_rows(model.config, ROWS)
    expected = model(**batch).logits
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).masked_fill(((ids == IMAGE) | (ids == QUERY))[..., None], 7.0)
    torch.testing.assert_close(model(**batch, inputs_embeds=embeds).logits, expected)
    del batch["image_positions"]
    with pytest.raises(ValueError, match="no image placeholder"):
        model(**batch, inputs_embeds=embeds)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("assistant", ["same", "text"])
def test_assistant(prompt, assistant):
    model = tiny_model("qwen3")
    batch = build_rows(model.config, PROMPTS[prompt])
    helper = (
        copy.deepcopy(model) if assistant == "same" else AutoModelForCausalLM.from_config(model.config.text_config)
    )
    calls = []
    helper.register_forward_hook(lambda *_: calls.append(1))
    found = model.generate(**batch, **GREEDY, assistant_model=helper)
    assert found.tolist() == model.generate(**batch, **GREEDY).tolist()
    assert calls


@pytest.mark.parametrize("decoder", ["phi", "qwen3"])
@pytest.mark.parametrize("end", [[20], [20, 21], [11], [30]])
@pytest.mark.parametrize("suppressed", [True, False])
def test_prompt_lookup_in_a_prompt_that_repeats_itself(decoder, end, suppressed):
    """What follows its last words is text, a query group, an image, or another turn."""
    model = tiny_model(decoder)
    if not suppressed:
        model.generation_config.suppress_tokens = None
    turn = [11, *[IMAGE] * 4, 20, 21, QUERY, QUERY, 30]
    row = torch.tensor([[*turn, *turn, *end]])
    question_ids = torch.zeros_like(row)
    for group, first in enumerate((row[0] == QUERY).nonzero().flatten().tolist()[::2], start=1):
        question_ids[0, first - 2 : first] = group
    pixels = build_rows(model.config, [[(2, 1, 1)]])["pixel_values"]
    batch = {"input_ids": row, "pixel_values": pixels, "question_ids": question_ids}
    expected = model.generate(**batch, **GREEDY).tolist()
    assert model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=5).tolist() == expected


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant": True}, {"num_beams": 2}])
def test_going_on_from_a_cache(options):
    """The whole conversation is given, and a cache of its beginning."""
    model = tiny_model("llama")
    turns = build_rows(model.config, [[(1, 5, 2), (1, 4, 2)]])
    features = model.get_image_features(turns.pop("pixel_values"))
    first = int(turns["query_positions"][0, 0]) + model.config.num_query_tokens
    head = {name: value[:, :first] for name, value in turns.items() if "positions" not in name}
    head |= {name: value[:, :1] for name, value in turns.items() if "positions" in name}
    image = type(features)(last_hidden_state=features.last_hidden_state[:1], pooler_output=features.pooler_output[:1])
    cache = model(**head, image_features=image, use_cache=True)[CACHE_ARGUMENT]
    if "num_beams" in options:
        cache.batch_repeat_interleave(2)
    if options.pop("assistant", False):
        options = {"assistant_model": copy.deepcopy(model)}
    expected = model.generate(**turns, image_features=features, **GREEDY, **options)
    found = model.generate(**turns, image_features=features, **GREEDY, **options, **{CACHE_ARGUMENT: cache})
    assert found.tolist() == expected.tolist()


def test_chunks_are_refused_with_the_reason():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="prefill_chunk_size does not go with images.*one forward pass"):
        model.generate(**build_rows(model.config, ROWS[:1]), **GREEDY, prefill_chunk_size=4)
    text = {"input_ids": torch.arange(10, 20)[None]}
    expected = model.generate(**text, **GREEDY)
    assert model.generate(**text, **GREEDY, prefill_chunk_size=4).tolist() == expected.tolist()


PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # renamed after 5.16
PAGES = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, **{PAGE_SIZE: 16})


@pytest.mark.skipif(PAGE_SIZE == "block_size", reason="5.16 looks for the decoder's sizes in the wrong place")
def test_continuous_batching_of_texts():
    model = tiny_model("llama")
    prompts = [build_rows(model.config, [turns])["input_ids"][0].tolist() for turns in ([(0, 4, 1)], [(0, 6, 2)])]
    prompts.append([20, 21, 22])
    expected = [model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in prompts]
    found = model.generate_batch(
        inputs=prompts,
        max_new_tokens=GREEDY["max_new_tokens"],
        continuous_batching_config=PAGES,
    )
    assert sorted(output.generated_tokens for output in found.values()) == sorted(expected)
    with pytest.raises(ValueError, match="prompt 1 has image placeholders"):
        model.generate_batch(inputs=[[20], [IMAGE] * 4], continuous_batching_config=PAGES)


def test_pieces_of_requests_are_told_apart():
    """Continuous batching lays them one behind the other: half a query group at the end, half at the beginning."""
    model = tiny_model("llama")
    ids = torch.tensor([[20, 21, QUERY, QUERY, 22]])

    class Pages:
        pass

    with pytest.raises(ValueError, match="continuous batching has cut a prompt"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 4]])[:, [0, 1, 2, 1, 2]], cache=Pages())


def test_runs_that_are_torn_apart_are_refused():
    model = tiny_model("phi")
    batch = build_rows(model.config, [[(1, 3, 1)]])
    ids = batch["input_ids"][0]
    at = int(batch["image_positions"][0, 0])
    ids[[at + 3, at + 4]] = ids[[at + 4, at + 3]]  # the last of its tokens stands behind the next word
    with pytest.raises(ValueError, match="not a multiple of 4 that stand together"):
        model(**batch)


@torch.no_grad()
def test_tokens_before_the_row_move_images_and_questions():
    """What prefix tuning does: keys and values of other tokens come first, and no position tells of them."""
    model = tiny_model("qwen3")
    for padding_side in ("right", "left"):
        batch = build_rows(model.config, ROWS, padding_side=padding_side)
        virtual = torch.randint(10, VOCABULARY, (3, 4))
        whole = dict(batch, input_ids=torch.cat([virtual, batch["input_ids"]], dim=1))
        whole["attention_mask"] = torch.cat([torch.ones_like(virtual), batch["attention_mask"]], dim=1)
        whole["question_ids"] = torch.cat([torch.zeros_like(virtual), batch["question_ids"]], dim=1)
        for name in ("image_positions", "query_positions"):
            whole[name] = torch.where(batch[name] >= 0, batch[name] + 4, -1)
        kept = batch["attention_mask"].bool()
        expected = model(**whole).logits[:, 4:][kept]
        given = dict(batch, attention_mask=whole["attention_mask"])
        for names in ([], ["image_positions", "query_positions"]):
            given = {name: value for name, value in given.items() if name not in names}
            cache = model(virtual, past_key_values=DynamicCache(config=model.config.text_config), use_cache=True)
            found = model(**given, **{CACHE_ARGUMENT: cache[CACHE_ARGUMENT]}).logits
            torch.testing.assert_close(found[kept], expected, rtol=1e-4, atol=1e-4)
    del whole["question_ids"]
    with pytest.raises(ValueError, match="question_ids has"):
        model(**whole, question_ids=batch["question_ids"])


@pytest.mark.parametrize("decoder", ["phi", "gemma2"])
@pytest.mark.parametrize("num_query_tokens", [2, 0])
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
@torch.no_grad()
def test_virtual_tokens_of_peft(decoder, num_query_tokens, kind):
    peft = pytest.importorskip("peft")
    model = tiny_model(decoder, num_query_tokens=num_query_tokens)
    plain = copy.deepcopy(model)
    more = {"encoder_hidden_size": 16} if kind == "PromptEncoderConfig" else {}
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **more)
    tuned = peft.get_peft_model(model, settings).eval()

    def rows(*which, seed=0):
        batch = build_rows(model.config, [ROWS[row] for row in which], seed=seed)
        return batch if num_query_tokens else {k: v for k, v in batch.items() if k[:5] not in ("query", "quest")}

    batch = rows(0, 1, 2)
    logits = tuned(**batch).logits
    if kind != "PrefixTuningConfig":  # then the virtual tokens can be given by hand
        embeds = plain.get_input_embeddings()(batch["input_ids"])
        whole = {name: value for name, value in batch.items() if name != "input_ids"}
        whole["inputs_embeds"] = torch.cat([tuned.get_prompt(3).to(embeds), embeds], dim=1)
        for name, fill in (("attention_mask", 1), ("question_ids", 0)):
            if name in batch:
                whole[name] = torch.cat([batch[name].new_full((3, 4), fill), batch[name]], dim=1)
        for name in ("image_positions", "query_positions"):
            if name in batch:
                whole[name] = torch.where(batch[name] >= 0, batch[name] + 4, -1)
        torch.testing.assert_close(logits, plain(**whole).logits)
    answers = new_tokens(tuned.generate(**batch, **GREEDY))
    assert new_tokens(tuned.generate(**batch, **GREEDY, use_cache=False)) == answers
    single = rows(0)
    single["pixel_values"] = batch["pixel_values"][:1]
    torch.testing.assert_close(tuned(**single).logits[0, -8:], logits[0, -8:], rtol=1e-4, atol=1e-4)
    assert new_tokens(tuned.generate(**single, **GREEDY)) == answers[:1]

"""Every part earns its place: taking one out, or mixing two up, changes what the model says."""

import pytest
import torch

from tiny_models import build_rows, tiny_model

ROWS = [[(1, 5, 2), (0, 3, 1)], [(1, 4, 2)], [(0, 4, 0)]]


@pytest.fixture(params=["phi", "qwen3"])
def case(request):
    model = tiny_model(request.param)
    batch = build_rows(model.config, ROWS)
    with torch.no_grad():
        return model, batch, model(**batch).logits


def changed_rows(model, batch, logits):
    with torch.no_grad():
        found = model(**batch).logits
    mask = batch["attention_mask"].bool()
    return [
        not torch.allclose(found[row][mask[row]], logits[row][mask[row]], rtol=1e-3, atol=1e-3)
        for row in range(len(ROWS))
    ]


def test_the_attention_of_the_pooling_matters(case):
    model, batch, logits = case
    torch.nn.init.zeros_(model.model.compressor.score[3].weight)  # equal scores: a plain average
    assert changed_rows(model, batch, logits) == [True, True, False]


def test_the_embedded_query_module_matters(case):
    model, batch, logits = case
    torch.nn.init.zeros_(model.model.embedded_query.up_projection.weight)
    torch.nn.init.zeros_(model.model.embedded_query.up_projection.bias)
    assert changed_rows(model, batch, logits) == [True, True, False]


def test_the_question_of_a_turn_matters_from_its_queries_on(case):
    model, batch, logits = case
    batch["question_ids"] = batch["question_ids"].clone()
    second = batch["question_ids"][0] == 2
    batch["question_ids"][0, second.nonzero()[0]] = 0  # hide one token of the second question from its queries
    with torch.no_grad():
        found = model(**batch).logits
    start = int(batch["query_positions"][0, 1])
    torch.testing.assert_close(found[0, :start], logits[0, :start])
    assert not torch.allclose(found[0, start:], logits[0, start:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], logits[1])


def test_queries_of_a_turn_do_not_read_another_turns_question(case):
    model, batch, logits = case
    batch["question_ids"] = batch["question_ids"].clone()
    batch["question_ids"][0][batch["question_ids"][0] == 2] = 1  # both questions now belong to the first group
    assert changed_rows(model, batch, logits) == [True, False, False]


def test_the_embedded_query_module_reads_the_unpooled_features(case):
    """Same visual tokens, other un-pooled features: the answer changes."""
    model, batch, logits = case
    with torch.no_grad():
        features = model.get_image_features(batch.pop("pixel_values"))
    features.last_hidden_state = features.last_hidden_state.flip(0)
    assert changed_rows(model, {**batch, "image_features": features}, logits) == [True, True, False]


def test_images_of_a_batch_are_not_interchangeable(case):
    model, batch, logits = case
    batch["pixel_values"] = batch["pixel_values"].flip(0)
    assert changed_rows(model, batch, logits) == [True, True, False]


def test_a_group_does_not_see_a_later_image(case):
    model, _, _ = case
    batch = build_rows(model.config, [[(1, 4, 1), (1, 3, 1)]])
    end = int(batch["image_positions"][0, 1])
    with torch.no_grad():
        logits = model(**batch).logits
        batch["pixel_values"][1] += 1.0
        found = model(**batch).logits
    torch.testing.assert_close(found[0, :end], logits[0, :end])
    assert not torch.allclose(found[0, end:], logits[0, end:], rtol=1e-3, atol=1e-3)


def test_the_learned_query_tokens_matter(case):
    model, batch, logits = case
    with torch.no_grad():
        model.model.query_tokens.weight.mul_(-1)
    assert changed_rows(model, batch, logits) == [True, True, True]


def test_switched_off_there_is_neither_query_nor_module():
    model = tiny_model("llama", num_query_tokens=0)
    assert model.model.embedded_query is None and model.model.query_tokens is None
    assert not any("query_tokens" in name or "embedded_query" in name for name in model.state_dict())


def test_queries_without_the_question_ignore_it():
    model = tiny_model("llama", embedded_query_uses_question=False)
    batch = build_rows(model.config, ROWS)
    with torch.no_grad():
        logits = model(**batch).logits
        del batch["question_ids"]
        torch.testing.assert_close(model(**batch).logits, logits)


def test_missing_question_ids_are_refused():
    model = tiny_model("llama")
    batch = build_rows(model.config, ROWS)
    del batch["question_ids"]
    with pytest.raises(ValueError, match="no question_ids"):
        model(**batch)


def test_counts_that_disagree_are_named():
    model = tiny_model("llama")
    batch = build_rows(model.config, ROWS)
    with pytest.raises(ValueError, match="2 image positions, but 1 images"):
        model(**dict(batch, pixel_values=batch["pixel_values"][:1]))
    with pytest.raises(ValueError, match="not a multiple of 4"):
        model(
            input_ids=batch["input_ids"][:, : int(batch["image_positions"][1, 0]) + 2],
            pixel_values=batch["pixel_values"],
        )
    with pytest.raises(ValueError, match="Prepare images with the processor"):
        model(**dict(batch, pixel_values=batch["pixel_values"][..., :-4]))


def test_positions_are_found_where_they_are_not_given():
    model = tiny_model("llama")
    batch = build_rows(model.config, ROWS)
    with torch.no_grad():
        logits = model(**batch).logits
        del batch["image_positions"], batch["query_positions"]
        torch.testing.assert_close(model(**batch).logits, logits)

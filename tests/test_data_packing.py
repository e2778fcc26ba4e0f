import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from data_files import write_llava
from flashsloth.data.collator import Collator
from flashsloth.data.packing import check_packing, fill_rows, pack
from flashsloth.data.recipe import LlavaData
from flashsloth.data.sources import LlavaSamples
from flashsloth.train.build import build
from flashsloth.train.recipe import load_recipe
from flashsloth.train.run import run
from tiny_models import DECODERS, PAD, build_rows, tiny_model

DEBUG = Path(__file__).parents[1] / "configs" / "debug" / "two_stages.yaml"
# two images and two turns, one image, text alone, an image that only the second turn brings
ROWS = [[(2, 5, 3), (0, 4, 6)], [(1, 3, 2)], [(0, 6, 4)], [(0, 3, 3), (1, 2, 5)]]
MAX_LENGTH = 60


def labelled_rows(model) -> dict[str, torch.Tensor]:
    batch = build_rows(model.config, ROWS, padding_side="right")
    is_learned = (batch["question_ids"] == 0) & (batch["input_ids"] >= 10)
    batch["labels"] = torch.where(is_learned & batch["attention_mask"].bool(), batch["input_ids"], -100)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]  # a label that nothing predicts, in a row of its own or not
    return batch


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss
    loss.backward()
    return loss, {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_rows_are_filled_without_losing_or_splitting_a_sample():
    lengths = [30, 10, 25, 40, 5, 20, 10]
    rows = fill_rows(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(7))
    assert all(sum(lengths[index] for index in row) <= 50 for row in rows)
    assert len(rows) == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_packed_rows_have_the_loss_and_gradients_of_rows_of_their_own(decoder, attention):
    model = tiny_model(decoder)
    if attention == "sdpa" and not model.model.language_model._supports_sdpa:
        pytest.skip(f"this transformers has no sdpa for {decoder}")
    model.set_attn_implementation(attention)
    batch = labelled_rows(model)
    for options in ({}, {"pad_to_multiple_of": 16}, {"single_row": True}):
        packed = pack(batch, MAX_LENGTH, PAD, **options)
        assert packed["input_ids"].shape[0] < len(ROWS) and "attention_mask" not in packed
        assert (packed["labels"] != -100).sum() == (batch["labels"][:, 1:] != -100).sum()
        alone, expected = loss_and_gradients(model, batch)
        together, found = loss_and_gradients(model, packed)
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
        assert found.keys() == expected.keys()
        scale = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(scale), rtol=1e-4, msg=name)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_sample_does_not_reach_its_neighbours(decoder):
    model = tiny_model(decoder)
    packed = pack(labelled_rows(model), MAX_LENGTH, PAD, single_row=True)
    starts = [*(packed["position_ids"][0] == 0).nonzero().flatten().tolist(), packed["input_ids"].shape[1]]
    with torch.no_grad():
        before = model(**packed, use_cache=False).logits
        for number, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            changed = {name: value.clone() for name, value in packed.items()}
            words = changed["input_ids"][0, start:stop]
            words[words >= 10] = 95 - words[words >= 10] % 80
            owned = ((packed["image_positions"][0] >= start) & (packed["image_positions"][0] < stop)).nonzero()
            changed["pixel_values"][owned.flatten()] += 1
            after = model(**changed, use_cache=False).logits
            assert not torch.equal(after[0, start:stop], before[0, start:stop]), number
            assert torch.equal(after[0, :start], before[0, :start]), number
            assert torch.equal(after[0, stop:], before[0, stop:]), number


def test_samples_that_see_their_neighbours_images_are_noticed(monkeypatch):
    """The test above depends on the limit in the embedded query module."""
    model = tiny_model("phi")
    packed = pack(labelled_rows(model), MAX_LENGTH, PAD, single_row=True)
    with torch.no_grad():
        before = model(**packed, use_cache=False).logits
        monkeypatch.setattr(
            "flashsloth.model.modeling_flashsloth.in_same_sample",
            lambda position_ids, queries, images: torch.ones(1, queries.shape[1], images.shape[1], dtype=torch.bool),
        )
        assert not torch.equal(model(**packed, use_cache=False).logits, before)


def test_flash_attention_would_cut_a_single_row_at_the_samples():
    model = tiny_model("qwen3")
    batch = labelled_rows(model)
    packed = pack(batch, MAX_LENGTH, PAD, single_row=True)
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(packed["position_ids"])
    lengths = batch["attention_mask"].sum(-1)
    assert starts.tolist() == [0, *lengths.cumsum(0).tolist()] and longest == lengths.max()


@pytest.mark.parametrize("decoder", DECODERS)
def test_packing_is_tried_on_the_language_model(decoder):
    model = tiny_model(decoder).train()
    check_packing(model.model.language_model)
    assert model.model.language_model.training


def test_a_language_model_that_mixes_samples_is_refused():
    model = tiny_model("qwen3").model.language_model

    class Summing(nn.Module):
        training = False

        def get_input_embeddings(self):
            return model.get_input_embeddings()

        def forward(self, inputs_embeds, **kwargs):
            output = model(inputs_embeds=inputs_embeds, **kwargs)
            output.last_hidden_state = output.last_hidden_state.cumsum(1)
            return output

    with pytest.raises(ValueError, match="Summing lets packed samples see each other; set packing to false"):
        check_packing(Summing())


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_collator_packs_real_samples_exactly(tmp_path, template):
    model, processor = build(load_recipe(DEBUG).model)
    shapes = [(1, 1, 1)] * 3 if template == "plain" else [(2, 2, 3), (1, 1, 1), (0, 2, 9), (1, 1, 5)]
    path = write_llava(tmp_path, shapes)
    dataset = LlavaSamples(LlavaData(kind="llava", path=path, image_folder=tmp_path))
    records = [dataset[index] for index in range(len(shapes))]
    model.eval()
    alone, expected = loss_and_gradients(model, Collator(processor, template, 160)(records))
    collator = Collator(processor, template, 160, pad_to_multiple_of=8, packing="rows")
    batch = collator(records)
    assert batch["input_ids"].shape[0] < len(shapes) and batch["input_ids"].shape[1] % 8 == 0
    together, found = loss_and_gradients(model, batch)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_a_packed_run_has_the_losses_of_one_that_is_not(tmp_path):
    losses = []
    for packing in ("false", "true"):
        folder = tmp_path / packing
        run(load_recipe(DEBUG, [f"output_dir={folder}", f"stages.finetune.packing={packing}"]))
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["stage"] == "finetune"])
    assert losses[1] == pytest.approx(losses[0], abs=2e-5) and len(losses[0]) == 4

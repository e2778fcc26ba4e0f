"""Characters of rendered images as labels of patches, and the loss that teaches an encoder to see them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.modeling_outputs import BaseModelOutput

from flashsloth.data.glyphs import CHARACTERS, glyph_tensor
from flashsloth.synthetic import render
from flashsloth.synthetic.augment import rotate
from flashsloth.synthetic.fonts import TextDraw, draw_text
from flashsloth.synthetic.sample import Glyph
from flashsloth.train.build import build
from flashsloth.train.glyphs import GlyphSupervision, patch_labels
from flashsloth.train.recipe import load_recipe, parse_recipe
from flashsloth.train.run import run

DEBUG = Path(__file__).parents[1] / "configs" / "debug" / "two_stages.yaml"
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def ink_middle(image: Image.Image) -> tuple[float, float]:
    """Middle of the box around everything dark."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) < 128)
    return (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2


@pytest.mark.parametrize("anchor", ["lm", "mm", "rm"])
@pytest.mark.parametrize("place", range(5))
def test_a_glyph_stands_where_its_ink_is(anchor, place):
    text = " " * place + "H" + " " * (4 - place)  # the same advance for each place, short and long texts
    image = Image.new("RGB", (200, 100), WHITE)
    draw = TextDraw(image)
    draw_text(draw, (100, 40), text, "dejavu-mono", 20, BLACK, anchor)
    glyph = draw.glyphs[place]
    assert glyph.character == "H"
    assert (glyph.x, glyph.y) == pytest.approx(ink_middle(image), abs=1.5)


@pytest.mark.parametrize("angle", [-30, 4, 90])
def test_glyphs_turn_with_the_image(angle):
    image = Image.new("RGB", (200, 200), WHITE)
    image.paste(BLACK, (150, 60, 158, 68))
    glyphs = [Glyph("x", 154, 64)]
    turned = rotate(image, angle, WHITE, glyphs)
    assert (glyphs[0].x, glyphs[0].y) == pytest.approx(ink_middle(turned), abs=1.5)


@pytest.mark.parametrize("family", ["text", "pages", "charts"])
def test_rendered_images_know_their_characters(family):
    for seed in range(6):
        sample = render(family, seed, "train")
        written = {glyph.character.lower() for glyph in sample.glyphs}
        assert {letter for turn in sample.turns if turn.task in ("text_read_word", "text_read_line")
                for letter in turn.answer.replace(" ", "")} <= written  # fmt: skip
        assert all(0 <= glyph.x < 144 and 0 <= glyph.y < 144 for glyph in sample.glyphs)
        assert sample.glyphs


def test_every_character_lands_in_its_patch_and_slot():
    glyphs = glyph_tensor([[("A", 0.30, 0.10), ("9", 0.45, 0.60), ("?", 0.9, 0.9)], [], [("b", 1.2, 0.5)]])
    labels = patch_labels(glyphs, 2, 2)
    expected = torch.zeros(3, 2, 2, 2, dtype=torch.long)
    expected[0, 0, 0, 1] = CHARACTERS.index("a") + 1
    expected[0, 1, 0, 1] = CHARACTERS.index("9") + 1
    assert torch.equal(labels, expected)  # unknown ones and those outside the image are left out


def glyph_recipe(folder, *overrides):
    changes = ["stages.finetune.train=[vision_encoder, compressor, projector]", "stages.finetune.glyph_loss=1.0"]
    return load_recipe(DEBUG, ["data.scenes.weights={text: 1}", *changes, f"output_dir={folder}", *overrides])


def test_the_loss_falls_where_features_tell_the_characters():
    model, _ = build(load_recipe(DEBUG).model)
    supervision = GlyphSupervision(model)
    config = model.config
    shape = (1, config.num_patches_per_view, config.vision_config.hidden_size)
    features = torch.zeros(shape, requires_grad=True)
    model.model.vision_tower.forward = lambda pixel_values: BaseModelOutput(last_hidden_state=features)
    pixels = torch.zeros(1, 1, 3, config.image_height, config.image_width)
    glyphs = glyph_tensor([[("q", 0.1, 0.1), ("7", 0.5, 0.9)]])
    optimizer = torch.optim.Adam([features], lr=0.5)
    losses = []
    for _ in range(40):
        model.model.encode_views(pixels)
        loss = supervision.loss(glyphs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    supervision.remove()
    model.model.encode_views(pixels)
    assert supervision._features_BTE is None


def test_a_stage_with_it_trains_the_encoder_and_saves_an_ordinary_folder(tmp_path):
    with_loss = run(glyph_recipe(tmp_path / "with"))
    without = run(glyph_recipe(tmp_path / "without", "stages.finetune.glyph_loss=0.0"))
    taught, plain = (load_file(folder / "model.safetensors") for folder in (with_loss, without))
    assert taught.keys() == plain.keys()
    name = next(name for name in taught if "vision_tower" in name and name.endswith("fc1.weight"))
    assert not torch.equal(taught[name], plain[name])


def test_accumulated_steps_weigh_it_as_one_large_step(tmp_path):
    """Two half batches give the whole batch's glyph loss: logged losses agree to rounding of unequal label counts."""
    losses = []
    for name, batch, accumulation in (("whole", 4, 1), ("halves", 2, 2)):
        overrides = [f"stages.finetune.batch_size={batch}", f"stages.finetune.gradient_accumulation={accumulation}"]
        run(glyph_recipe(tmp_path / name, *overrides, "stages.finetune.max_steps=1"))
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses.append(next(row["loss"] for row in rows if row["stage"] == "finetune"))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def tree(**stage):
    return {
        "model": {"checkpoint": "somewhere"},
        "data": {
            "rendered": {"kind": "synthetic", "size": 8, "weights": {"text": 1}},
            "own": {"kind": "llava", "path": "own.json", "image_folder": "."},
        },
        "stages": [
            {"name": "only", "data": "rendered", "template": "chat", "train": ["vision_encoder"], "batch_size": 2,
             "learning_rate": 1e-3, "max_steps": 3, "glyph_loss": 0.5, **stage}
        ],
        "output_dir": "out",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ({"data": "own"}, ("glyph_loss", "data.own")),
        ({"packing": True}, ("glyph_loss", "packing")),
        ({"train": ["projector"]}, ("glyph_loss", "vision_encoder")),
        ({"glyph_loss": -1}, ("glyph_loss",)),
    ],
)
def test_contradictions_name_both_fields(stage, fields):
    parse_recipe(tree())
    with pytest.raises(ValueError) as error:
        parse_recipe(tree(**stage))
    assert all(field in str(error.value) for field in fields)


def test_several_views_are_refused():
    model, _ = build(load_recipe(DEBUG, ["model.config.view_grid=[2, 2]"]).model)
    with pytest.raises(ValueError, match="one view"):
        GlyphSupervision(model)

"""What has no label is named, counted and refused: training on it would lose time and say that the loss is zero."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data_files import llava_turns, message_rows, write_llava, write_shards
from flashsloth.data.check import check_recipe
from flashsloth.data.collator import Collator, NoLabelError
from flashsloth.data.dataset import build_dataset
from flashsloth.data.recipe import DataRecipe, LlavaData
from flashsloth.data.schema import Sample
from flashsloth.data.sources import LlavaSamples
from flashsloth.train.build import build_processor
from flashsloth.train.recipe import Recipe, load_recipe
from flashsloth.train.run import run
from flashsloth.train.settings import parse_settings
from flashsloth_cli.main import main

ROOT = Path(__file__).parents[1]
DEBUG = ROOT / "configs" / "debug" / "two_stages.yaml"
TEMPLATE = (ROOT / "configs" / "nano" / "chat_template.jinja").read_text()
WITHOUT_GENERATION = TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
# marks the answers of conversations that do not ask for quiet
QUIET_TEXT = "{%- else -%}{{- message['content'] | map(attribute='text') | join -}}{%- endif -%}"
MARKS_SOME = (
    "{%- set quiet = 'quiet' in messages[0]['content'] | map(attribute='text', default='') | join -%}"
    + TEMPLATE.replace("{%- generation -%}", "{%- if not quiet -%}{%- generation -%}").replace(
        "{%- endgeneration -%}", "{%- endgeneration -%}" + QUIET_TEXT
    )
)


def recipe_of(folder: Path, source: dict, template: str = TEMPLATE, *overrides: str) -> Recipe:
    """The debug recipe's second stage over one source."""
    (folder / "template.jinja").write_text(template)
    recipe = load_recipe(
        DEBUG,
        [
            f"data={json.dumps({'mine': source})}",
            "stages.pretrain.data=mine",
            "stages.finetune.data=mine",
            "stages.finetune.turns=null",
            "stages.finetune.batch_size=2",
            "stages.finetune.max_steps=2",
            f"model.chat_template={folder / 'template.jinja'}",
            f"output_dir={folder / 'run'}",
            *overrides,
        ],
    )
    recipe.stages.pop(0)
    return recipe


def llava(path: Path, **limits) -> dict:
    return {"kind": "llava", "path": str(path), "image_folder": str(path.parent), **limits}


def findings_of(recipe: Recipe) -> list[tuple[str, str]]:
    config, processor = build_processor(recipe.model)
    report = check_recipe(recipe, processor, config.image_height)
    return [(finding.kind, finding.place) for finding in report.findings]


def sources(folder: Path) -> dict[str, dict]:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in message_rows(3)[:1]) * 4)
    rows = {"kind": "messages", "path": str(folder / "rows.jsonl")}
    shards = {"kind": "webdataset", "shards": write_shards(folder / "shards", 1, 4)}
    return {
        "llava": llava(write_llava(folder, [(1, 1, 1)] * 4), max_broken=9),
        "messages": rows,
        "streamed": {**rows, "streaming": True, "max_broken": 9},
        "shards": shards,
        "drawn": {"kind": "synthetic", "size": 8, "weights": {"scenes": 1}},
    }


@pytest.mark.parametrize("kind", ["llava", "messages", "streamed", "shards", "drawn"])
def test_a_template_that_marks_no_answers_is_refused(tmp_path, kind):
    recipe = recipe_of(tmp_path, sources(tmp_path / "data")[kind], WITHOUT_GENERATION)
    assert findings_of(recipe) == [("no label", "stage finetune")]
    with pytest.raises(ValueError, match="stage 'finetune': the chat template marks nothing as an answer"):
        run(recipe)
    assert not (tmp_path / "run").exists()


def with_and_without_labels(folder: Path) -> Path:
    path = write_llava(folder, [(1, 1, 1)] * 6)
    records = json.loads(path.read_text())
    for record in records[1::2]:
        record["conversations"][0]["value"] += " quiet"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("packing", [None, "rows"])
def test_single_samples_without_a_label_are_named_and_left_out(tmp_path, caplog, packing):
    path = with_and_without_labels(tmp_path)
    recipe = recipe_of(tmp_path, llava(path), MARKS_SOME)
    assert [kind for kind, _ in findings_of(recipe)] == ["no label"] * 3
    dataset = LlavaSamples(LlavaData(kind="llava", path=path, image_folder=tmp_path, max_broken=3))
    collator = Collator(build_processor(recipe.model)[1], "chat", 256, packing=packing)
    with caplog.at_level(logging.WARNING):
        batch = collator([dataset[index] for index in range(6)])
    assert dataset.num_broken == 3 and batch["pixel_values"].shape[0] == 3
    assert "data.json: record 1 (id r1) is broken: it has no label" in caplog.text
    with caplog.at_level(logging.WARNING):
        empty = collator([dataset[1], dataset[3]])
    assert "no sample of a batch can be used" in caplog.text and (empty["labels"] == -100).all()
    alone = collator([dataset[0], dataset[1]])
    assert torch.equal(alone["input_ids"], collator([dataset[0]])["input_ids"])


def test_the_run_stops_at_more_samples_without_a_label_than_may_be_broken(tmp_path):
    recipe = recipe_of(tmp_path, llava(with_and_without_labels(tmp_path)), MARKS_SOME, "loader.workers=1")
    with pytest.raises(
        ValueError, match=r"^\S*data\.json: record \d \(id r\d\) is broken: it has no label.*max_broken"
    ):
        run(recipe)


def test_captions_of_which_max_length_leaves_nothing_have_no_label(tmp_path):
    recipe = recipe_of(tmp_path, llava(write_llava(tmp_path, [(1, 1, 9)])), TEMPLATE, "stages.finetune.batch_size=1")
    recipe.stages[0].template = "plain"
    processor = build_processor(recipe.model)[1]
    recipe.stages[0].max_length = processor.num_image_tokens
    assert findings_of(recipe) == [("no label", f"{tmp_path / 'data.json'}: record 0 (id r0)")]
    with pytest.raises(ValueError, match="record 0 .* is broken: it has no label"):
        run(recipe)
    recipe.stages[0].max_length += 1
    assert findings_of(recipe) == []
    sample = build_dataset(recipe, recipe.stages[0], 72)[0].load()
    with pytest.raises(NoLabelError):
        Collator(processor, "plain", processor.num_image_tokens).encode([sample])


def test_the_first_token_of_a_row_is_no_label():
    """Nothing stands before it that could predict it."""
    processor = build_processor(load_recipe(DEBUG).model)[1]
    processor.chat_template = (
        "{%- generation -%}{{- eos_token -}}{%- endgeneration -%}{{- question_marker + 'q' + query_token -}}"
    )
    sample = Sample([], [{"role": "user", "content": [{"type": "text", "text": "q"}]}])
    with pytest.raises(NoLabelError):
        Collator(processor, "chat", 64).encode([sample])


@pytest.mark.parametrize("kind", ["llava", "mixture"])
def test_a_source_of_broken_samples_alone_is_refused_however_many_may_be(tmp_path, kind):
    path = write_llava(tmp_path / "bad", [(1, 1, 1)] * 4)
    for image in path.parent.glob("*.png"):
        image.unlink()
    recipe = recipe_of(tmp_path, llava(path, max_broken=1000))
    if kind == "mixture":
        drawn = {"kind": "synthetic", "size": 2, "weights": {"scenes": 1}}
        data = {
            "mine": {"kind": "mixture", "sources": {"a": 1, "b": 1}},
            "a": drawn,
            "b": llava(path, max_broken=1000),
        }
        recipe.data = parse_settings(dict[str, DataRecipe], data, "data")
    with pytest.raises(ValueError, match="nothing can be learned from data.(mine|b): .*4 broken"):
        run(recipe)
    assert not (tmp_path / "run").exists()


def test_data_that_fill_no_batch_are_refused(tmp_path):
    path = write_llava(tmp_path, [(1, 1, 1)] * 3)
    recipe = recipe_of(tmp_path, llava(path), TEMPLATE, "stages.finetune.batch_size=4")
    assert findings_of(recipe) == [("too few samples", "stage finetune")]
    with pytest.raises(ValueError, match="has 3 samples, which fill no batch of 4"):
        run(recipe)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_an_empty_stream_is_a_finding(tmp_path):
    write_shards(tmp_path, 1, 0)
    recipe = recipe_of(tmp_path, {"kind": "webdataset", "shards": f"{tmp_path}/*.tar", "max_broken": 9})
    assert ("unreadable source", "data.mine") in findings_of(recipe)
    with pytest.raises(ValueError, match="nothing can be learned"):
        run(recipe)


def test_answers_without_text_are_named_by_the_command(tmp_path, capsys):
    turns = llava_turns(0)
    turns[1]["value"] = " \n"
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "conversations": turns}] * 4))
    tree = json.dumps({"mine": llava(tmp_path / "data.json")})
    options = [f"data={tree}", "stages.pretrain.data=mine", "stages.finetune.data=mine", "stages.finetune.turns=null"]
    assert main(["data", "check", str(DEBUG), *options]) == 2
    assert "4 x empty answer" in " ".join(capsys.readouterr().out.split())


def test_worker_processes_leave_out_the_same(tmp_path):
    path = with_and_without_labels(tmp_path)
    processor = build_processor(recipe_of(tmp_path, llava(path), MARKS_SOME).model)[1]
    dataset = LlavaSamples(LlavaData(kind="llava", path=path, image_folder=tmp_path, max_broken=3))
    loader = DataLoader(dataset, batch_size=3, num_workers=1, collate_fn=Collator(processor, "chat", 256))
    assert [batch["input_ids"].shape[0] for batch in loader] == [2, 1] and dataset.num_broken == 3

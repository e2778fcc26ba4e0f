import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data_files import image_bytes, write_llava, write_shards
from flashsloth.data.check import check_recipe
from flashsloth.train.build import build_processor
from flashsloth.train.recipe import Recipe, load_recipe
from flashsloth.train.run import run
from flashsloth_cli.main import main

DEBUG = Path(__file__).parents[1] / "configs" / "debug" / "two_stages.yaml"


@pytest.fixture(scope="module")
def prepared():
    config, processor = build_processor(load_recipe(DEBUG).model)
    return config.image_height, processor


def recipe_of(source: dict, *overrides: str, **stage) -> Recipe:
    """The debug recipe's second stage over one source."""
    recipe = load_recipe(DEBUG, [f"data={json.dumps({'scenes': source})}", "stages.finetune.turns=null", *overrides])
    recipe.stages.pop(0)
    for name, value in stage.items():
        setattr(recipe.stages[0], name, value)
    return recipe


def llava(path: Path, **limits) -> dict:
    return {"kind": "llava", "path": str(path), "image_folder": str(path.parent), **limits}


def turns(*values, roles=("human", "gpt")) -> list[dict]:
    return [{"from": roles[index % len(roles)], "value": value} for index, value in enumerate(values)]


# record -> the sort of defect and a part of the sentence that must name it
PLANTED = {
    "missing-image": ("missing image", "there is no such file"),
    "corrupt-image": ("unreadable image", "not an image Pillow can read"),
    "truncated-image": ("unreadable image", "truncated or damaged"),
    "empty-image": ("unreadable image", "empty (zero bytes)"),
    "huge-image": ("unreadable image", "more than the limit of 10,000"),
    "image-without-placeholder": ("placeholder count", "0 <image> placeholders for 1 images"),
    "placeholder-without-image": ("placeholder count", "1 <image> placeholders for 0 images"),
    "too-many-images": ("too many images", "3 images, more than max_images 2"),
    "image-not-a-file": ("image is not a file", "given as int"),
    "unknown-role": ("unknown role", "unknown role 'bot'"),
    "empty-conversation": ("empty conversation", "no conversation"),
    "no-conversation": ("empty conversation", "no conversation"),
    "answer-first": ("first turn not from the user", "first turn is from assistant"),
    "not-alternating": ("turns do not alternate", "turn 2 is from user after user"),
    "no-answer": ("no answer", "no answer to learn"),
    "question-last": ("no answer", "the last turn is a question"),
    "empty-answer": ("empty answer", "an answer is empty"),
    "empty-question": ("empty question", "a question is empty"),
    "image-alone": ("unfit for a stage", "question 1 is empty"),
    "value-a-number": ("value is not text", "value of turn 2"),
    "value-missing": ("incomplete turn", "turn 2 lacks from or value"),
    "too-long": ("unfit for a stage", "more than max_length 256"),
    "repeated-id": ("duplicate id", "the id is also that of"),
}


def planted_records(folder: Path) -> list[tuple[str, dict]]:
    whole = image_bytes()
    (folder / "good.png").write_bytes(whole)
    (folder / "corrupt.png").write_bytes(b"not an image")
    (folder / "truncated.png").write_bytes(image_bytes(size=90)[:60])
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (101, 100)).save(folder / "huge.png")
    asked, answer = "<image>\nwhat is it?", "a cat"
    plain = {"conversations": turns("what is it?", answer)}

    def with_image(name, *values, **options):
        return {"image": name, "conversations": turns(*(values or (asked, answer)), **options)}

    return [
        ("missing-image", with_image("none.png")),
        ("corrupt-image", with_image("corrupt.png")),
        ("truncated-image", with_image("truncated.png")),
        ("empty-image", with_image("empty.png")),
        ("huge-image", with_image("huge.png")),
        ("image-without-placeholder", with_image("good.png", "what is it?", answer)),
        ("placeholder-without-image", {"conversations": turns(asked, answer)}),
        ("too-many-images", with_image(["good.png"] * 3, "<image>" * 3 + "what?", answer)),
        ("image-not-a-file", with_image(7)),
        ("unknown-role", {"conversations": turns("what?", answer, roles=("human", "bot"))}),
        ("empty-conversation", {"conversations": []}),
        ("no-conversation", {}),
        ("answer-first", {"conversations": turns(answer, "what?", answer, roles=("gpt", "human"))}),
        ("not-alternating", {"conversations": turns("what?", "what?", answer, roles=("human", "human", "gpt"))}),
        ("no-answer", {"conversations": turns("what?")}),
        ("question-last", {"conversations": turns("what?", answer, "and?")}),
        ("empty-answer", {"conversations": turns("what?", " ")}),
        ("empty-question", {"conversations": turns("", answer)}),
        ("image-alone", with_image("good.png", "<image>", answer)),
        ("value-a-number", {"conversations": turns("what?", 7)}),
        ("value-missing", {"conversations": [turns("what?")[0], {"from": "gpt"}]}),
        ("too-long", {"conversations": turns("word " * 300, answer)}),
        *((f"good-{number}", plain) for number in range(3)),
        ("good-3", with_image("good.png")),
        ("repeated-id", {**plain, "id": "good-0"}),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_planted_defect_is_found_with_file_and_record(tmp_path, prepared, workers):
    records = planted_records(tmp_path)
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"id": name, **record}) for name, record in records]
    lines += ['{"id": "cut', "[1, 2]"]
    path.write_text("\n".join(lines) + "\n")
    recipe = recipe_of(llava(path, max_images=2, max_pixels=10_000))
    report = check_recipe(recipe, prepared[1], prepared[0], workers=workers)
    found = {}
    for finding in report.findings:
        assert finding.source == "scenes" and finding.place.startswith(f"{path}: line ")
        line = int(finding.place.removeprefix(f"{path}: line ").split()[0])
        found.setdefault(line, []).append(finding)
    for line, (name, _) in enumerate(records, start=1):
        if name in PLANTED:
            (finding,) = found.pop(line)
            kind, sentence = PLANTED[name]
            assert finding.kind == kind and sentence in finding.message, name
            assert name == "repeated-id" or f"(id {name})" in finding.place
    (cut,), (not_a_mapping,) = found.pop(len(records) + 1), found.pop(len(records) + 2)
    assert "not valid JSON" in cut.message and "a record is a mapping" in not_a_mapping.message
    assert not found
    (source,) = report.sources
    assert (source.size, source.checked, source.broken) == (len(lines), len(lines), len(PLANTED) + 1)


def test_what_the_check_calls_broken_is_what_training_skips(tmp_path, prepared):
    records = planted_records(tmp_path)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": name, **record} for name, record in records]))
    recipe = recipe_of(llava(path, max_images=2, max_pixels=10_000, max_broken=50), batch_size=len(records))
    report = check_recipe(recipe, prepared[1], prepared[0])
    from flashsloth.data.dataset import build_collator, build_dataset

    dataset = build_dataset(recipe, recipe.stages[0], prepared[0])
    batch = build_collator(recipe, recipe.stages[0], prepared[1])([dataset[index] for index in range(len(records))])
    assert dataset.num_broken == report.sources[0].broken == len(PLANTED) - 1  # a repeated id is no reason to skip
    assert batch["input_ids"].shape[0] == len(records) - dataset.num_broken


def test_lengths_images_and_dropped_turns_are_counted(tmp_path, prepared):
    path = write_llava(tmp_path, [(1, 1, 1), (2, 1, 1), (0, 1, 5), (1, 8, 9)])
    recipe = recipe_of(llava(path), max_length=200)
    report = check_recipe(recipe, prepared[1], prepared[0])
    assert not report.findings and dict(report.sources[0].images) == {0: 1, 1: 2, 2: 1}
    lengths = report.stages[0].sources["scenes"]
    tokens = prepared[1].num_image_tokens
    assert lengths.visual_tokens == [tokens, 2 * tokens, 0, tokens]
    assert lengths.shortened == 1 and 0 < lengths.dropped_turns < 8 and lengths.turns == 11
    assert lengths.lengths.max() <= 200
    summary = report.to_dict()["stages"]["finetune"]["sources"]["scenes"]
    assert summary["samples"] == sum(summary["text_tokens"]["counts"]) == 4


@pytest.mark.parametrize("group_by", ["none", "modality_length"])
@pytest.mark.parametrize(("accumulation", "epochs"), [(1, 1), (2, 1), (3, 1.5)])
def test_expected_steps_are_those_of_the_run(tmp_path, prepared, group_by, accumulation, epochs):
    path = write_llava(tmp_path / "data", [(index % 2, 1, 1) for index in range(13)])
    recipe = recipe_of(
        llava(path), "checkpoints.every_steps=null", "stages.finetune.batch_size=2", f"output_dir={tmp_path / 'run'}"
    )
    stage = recipe.stages[0]
    stage.max_steps, stage.epochs = None, epochs
    stage.gradient_accumulation, stage.group_by = accumulation, group_by
    report = check_recipe(recipe, prepared[1], prepared[0])
    if (accumulation, epochs) == (3, 1.5) or group_by == "none":
        run(recipe)
        rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == report.stages[0].steps
    assert report.stages[0].samples_per_epoch == (13 if group_by == "none" else 12)


def test_streams_and_what_cannot_be_opened_are_reported(tmp_path, prepared):
    shards = write_shards(tmp_path / "tars", 2, 4)
    shard = tmp_path / "tars" / "001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    recipe = recipe_of({"kind": "webdataset", "shards": shards})
    report = check_recipe(recipe, prepared[1], prepared[0])
    kinds = Counter(finding.kind for finding in report.findings)
    assert kinds["damaged shard"] == 1 and any(str(shard) in finding.place for finding in report.findings)
    assert report.sources[0].size is None and report.stages[0].steps == 4 and report.stages[0].epochs is None
    recipe = recipe_of(llava(tmp_path / "none.json"))
    (finding,) = check_recipe(recipe, prepared[1], prepared[0]).findings
    assert finding.kind == "unreadable source" and "none.json" in finding.message


def write_recipe(tmp_path: Path, path: Path) -> str:
    tree = yaml.safe_load(DEBUG.read_text())
    tree["model"]["chat_template"] = str(DEBUG.parent / tree["model"]["chat_template"])
    tree["data"] = {"mine": llava(path)}
    tree["stages"] = [{**tree["stages"][1], "data": "mine"}]
    del tree["stages"][0]["turns"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return str(tmp_path / "recipe.yaml")


def test_the_command_prints_defects_and_says_so_by_its_exit_code(tmp_path, capsys):
    path = write_llava(tmp_path, [(1, 1, 1), (1, 2, 3), (0, 1, 1), (0, 1, 1)])
    recipe = write_recipe(tmp_path, path)
    assert main(["data", "check", recipe]) == 0
    out = capsys.readouterr().out
    assert "no defects" in out and "4 steps" in out and "visual tokens: mean" in out
    (tmp_path / "1-0.png").unlink()
    assert main(["data", "check", recipe, "--show", "0"]) == 2
    assert "1 defects: 1 x missing image" in capsys.readouterr().out
    assert main(["data", "check", recipe]) == 2
    assert "data.json: record 1 (id r1): missing image: image" in capsys.readouterr().out
    assert main(["data", "check", recipe, "--json", "--limit", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sources"]["mine"]["checked"] == 2 and report["stages"]["finetune"]["steps"] == 4
    assert main(["data", "check", recipe, "--ignore", "missing image"]) == 0
    capsys.readouterr()
    assert main(["data", "check", recipe, "data.mine.max_brokn=1"]) == 2
    assert "nearest valid key is 'max_broken'" in capsys.readouterr().err

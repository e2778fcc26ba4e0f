"""`flashsloth eval`: the plugin answers as `ask` does, what fails is one row, and a killed run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="evaluating needs lmms-eval: pip install --no-deps lmms-eval")

import datasets
from PIL import ImageFile

from benchmark_records import ALL
from flashsloth.evaluate.adapter import FlashSlothAdapter, read_messages
from flashsloth.evaluate.benchmarks import BENCHMARKS, chosen
from flashsloth.evaluate.harness import fetch, load_task, quieten, task_index
from flashsloth.evaluate.manifest import MODEL_NAME
from flashsloth.evaluate.report import read_results, write_report
from flashsloth.evaluate.runner import EvalSettings, run_suite
from flashsloth.evaluate.synthetic import evaluate
from flashsloth.evaluate.variants import CONTROLS, read_variants
from flashsloth.evaluate.verdicts import DONE, FAILED, INCOMPLETE, NOT_JUDGED
from flashsloth.inference import load
from flashsloth.model.chat_text import DEFAULT_CHAT_TEMPLATE
from flashsloth_cli.main import main
from tiny_session import TEMPLATE, noise_image, tiny_folder

SCENES = BENCHMARKS["flashsloth_scenes"]
OWN = {"images": 24}
TIMES = ("seconds_a_sample", "harness_seconds")


@pytest.fixture(scope="module")
def scenes():
    quieten()
    return load_task(task_index([SCENES]), SCENES, None, OWN)


@pytest.fixture(scope="module")
def session():
    return load("nano")


def requests_of(task, limit):
    task.build_all_requests(limit=limit)
    return task.instances


def test_lmms_eval_finds_the_model():
    (found,) = entry_points(group="lmms_eval.models", name=MODEL_NAME)
    assert found.load()().model_id == MODEL_NAME
    from lmms_eval import models

    assert models.get_model(MODEL_NAME) is FlashSlothAdapter


@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_are_those_of_ask(batch_size, scenes, session):
    adapter = FlashSlothAdapter(session=session, batch_size=batch_size)
    adapter.task_dict["flashsloth_scenes"] = scenes.dataset
    given = [each.text for each in adapter.generate_until(requests_of(scenes, 20))]
    docs = scenes.dataset["test"]
    asked = [session.ask(doc["image"], doc["question"], max_new_tokens=16).text for doc in list(docs)[:20]]
    assert given == asked and len(set(given)) > 3


@pytest.mark.parametrize("template", [TEMPLATE, DEFAULT_CHAT_TEMPLATE], ids=["short", "published"])
def test_answers_are_those_of_ask_with_a_tiny_model(template, tmp_path, caplog):
    """Random weights answer with long nonsense, of which every token must be the same; a text without image too."""
    session = load(tiny_folder(tmp_path / "tiny"))
    session.processor.chat_template = template
    adapter = FlashSlothAdapter(session=session, batch_size=8)
    docs = [{"image": noise_image(number), "text": "what " * (1 + number) + "?"} for number in range(8)]
    adapter.task_dict["tiny"] = {"test": docs}

    def messages(doc):
        images = [] if doc["text"].count("what") == 3 else [{"type": "image", "url": doc["image"]}]
        return [{"role": "user", "content": [*images, {"type": "text", "text": doc["text"]}]}]

    from lmms_eval.api.instance import Instance

    instances = [
        Instance(
            request_type="generate_until",
            arguments=("", messages, {"max_new_tokens": 12, "until": ["\n"]}, number, "tiny", "test"),
            idx=0,
            metadata={"task": "tiny", "doc_id": number, "repeats": 1},
        )
        for number in range(8)
    ]
    given = [each.text for each in adapter.generate_until(instances)]
    asked = []
    for doc in docs:
        images, text = read_messages(messages(doc))
        asked.append(session.ask(images, text, max_new_tokens=12).text.split("\n")[0])
    assert given == asked and len(set(given)) > 4
    for _ in range(2):
        adapter._limits({"do_sample": True, "max_new_tokens": 300}, "tiny")
    assert [record.message for record in caplog.records] == [
        "tiny asks for do_sample=True; answers are greedy",
        "tiny asks for 300 new tokens; answers end after 128, half of the model's context",
    ]


def test_damaged_images_are_not_filled_in():
    """lmms-eval tells Pillow to do so when it is imported, for the whole process."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_images_stand_before_the_text():
    parts = [{"type": "text", "text": "left"}, {"type": "image", "url": 1}, {"type": "text", "text": "right"}]
    assert read_messages([{"role": "user", "content": parts}]) == ([1], "left\nright")
    with pytest.raises(ValueError, match="one turn of the user"):
        read_messages([{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}])
    with pytest.raises(ValueError, match="holds video"):
        read_messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


def test_the_suite_agrees_with_evaluate_synthetic(tmp_path, session):
    families = ("scenes", "charts", "text")
    rows = [BENCHMARKS[f"flashsloth_{family}"] for family in families]
    results = run_suite(EvalSettings("nano", "nano", rows, own=OWN | {"photos": None}), tmp_path)
    report = evaluate(session.model, session.processor, count=24, families=None, majority_images=1)
    for row, family in zip(results["rows"], families, strict=True):
        score = report.families[family]
        assert (row["samples"], row["score"]) == (score.total, pytest.approx(100 * score.accuracy)), family
        kinds = {kind: 100 * each.accuracy for kind, each in report.tasks.items() if kind.startswith(family)}
        assert {kind: row["details"][kind] for kind in kinds} == pytest.approx(kinds)


def test_controls_and_variants_stand_in_the_same_table(tmp_path):
    variants = read_variants(["zero-embedded-query=yes", "compressor=average"], CONTROLS)
    settings = EvalSettings("nano", "", [SCENES], variants, own=OWN | {"majority_images": 40})
    rows = {row["variant"]: row for row in run_suite(settings, tmp_path)["rows"]}
    assert all(row["status"] == DONE for row in rows.values())
    assert rows[""]["score"] > 90
    assert rows["text-only"]["visual_tokens"] == 0 and rows[""]["visual_tokens"] == 16
    for control in (*CONTROLS, "compressor=average"):
        assert rows[control]["score"] < rows[""]["score"] - 10, control
    write_report(tmp_path)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "shuffled-image" in text and "Differences to the model as it is" in text
    for name in ("suite", "split", "dtype", "commit", "harness", "data revision", "first prompt"):
        assert name in text, name
    assert page.count("data:image/jpeg") >= 12
    with pytest.raises(ValueError, match="one of quantize, compressor"):
        read_variants(["pruned=yes"], [])


def test_what_fails_is_a_row_and_the_others_go_on(tmp_path, capsys):
    planted = {name: ALL[name]() for name in ("pope", "mmvet")}
    planted["pope"].rows[3]["image"] = {"bytes": b"no picture at all", "path": None}
    for name, each in planted.items():
        each.save(tmp_path / "data", name)
    arguments = ["eval", "nano", "--tasks", "pope,mmvet,gqa,popee,chartqaa", "--data", str(tmp_path / "data")]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 3
    rows = {row["task"]: row for row in read_results(tmp_path / "out")["rows"]}
    assert (rows["pope"]["status"], rows["pope"]["unreadable"]) == (INCOMPLETE, 1)
    assert "1 of 8 samples could not be asked: cannot identify image file" in rows["pope"]["reason"]
    assert (rows["mmvet"]["status"], rows["mmvet"]["score"]) == (NOT_JUDGED, None)
    assert rows["gqa"]["status"] == FAILED and "flashsloth eval fetch" in rows["gqa"]["reason"]
    assert "unknown task 'popee'; did you mean pope" in rows["popee"]["reason"]
    said = capsys.readouterr().err
    assert "not judged" not in said and "no judge: give --judge-url" in said
    assert len([line for line in said.splitlines() if line.startswith("warning:")]) == 5


def test_without_a_network_a_task_says_so(tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr("datasets.load_dataset", refused)
    with pytest.raises(ValueError, match="POPE: lmms-lab-encoder/POPE cannot be loaded: the hub cannot be reached"):
        fetch(BENCHMARKS["pope"], tmp_path)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the attempts of lmms-eval
    (row,) = run_suite(EvalSettings("nano", "", [BENCHMARKS["pope"]]), tmp_path)["rows"]
    assert (row["status"], row["score"]) == (FAILED, None)
    assert row["reason"] == "the data of pope cannot be loaded: the hub cannot be reached"


def test_what_is_fetched_can_be_asked(tmp_path, monkeypatch):
    planted = ALL["gqa"]()
    planted.save(tmp_path / "hub", "gqa")
    places = {"testdev_balanced_instructions": "gqa", "testdev_balanced_images": "gqa-testdev_balanced_images"}

    def from_hub(name: str, part: str, split: dict[str, str]) -> dict:
        assert name == "lmms-lab-encoder/GQA" and split == {"testdev": "testdev"}
        return dict(datasets.load_from_disk(str(tmp_path / "hub" / places[part])))

    monkeypatch.setattr("datasets.load_dataset", from_hub)
    for _ in range(2):  # the second finds all there
        fetch(BENCHMARKS["gqa"], tmp_path / "data")
    assert {path.name for path in (tmp_path / "data").iterdir()} == set(places.values())
    gqa = [BENCHMARKS["gqa"]]
    assert len(load_task(task_index(gqa), gqa[0], tmp_path / "data", {}).eval_docs) == len(planted.rows)


def test_a_full_disk_costs_the_cache_only(tmp_path, scenes, session, caplog):
    adapter = FlashSlothAdapter(session=session, cache=tmp_path)
    adapter.task_dict["flashsloth_scenes"] = scenes.dataset
    adapter.cache.path = Path("/dev/full")
    assert len(adapter.generate_until(requests_of(scenes, 4))) == 4
    assert "No space left" in caplog.text


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from flashsloth.evaluate.benchmarks import BENCHMARKS
from flashsloth.evaluate.runner import EvalSettings, run_suite

rows = [BENCHMARKS["flashsloth_scenes"], BENCHMARKS["flashsloth_text"]]
settings = EvalSettings("nano", "", rows, batch_size=4, own={"images": 24})

def run(folder):
    child = os.fork()
    if child == 0:
        run_suite(settings, folder)
        os._exit(0)
    return child

folder = Path(sys.argv[1])
started = time.time()
os.waitpid(run(folder / "whole"), 0)
whole = time.time() - started
chosen = random.Random(0)
killed = 0
for _ in range(5):
    child = run(folder / "killed")
    time.sleep(chosen.uniform(0.3, 0.7) * whole)
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
os.waitpid(run(folder / "killed"), 0)
print(killed)
"""


@pytest.mark.slow  # seven runs
def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1, "no run was killed in time"

    def rows(name):
        return [
            {key: value for key, value in row.items() if key not in TIMES}
            for row in json.loads((tmp_path / name / "results.json").read_text())["rows"]
        ]

    assert rows("killed") == rows("whole") and all(row["status"] == DONE for row in rows("whole"))
    lines = (tmp_path / "killed" / "responses" / "responses-0.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert (
        len(keys) == len(set(keys)) == len((tmp_path / "whole/responses/responses-0.jsonl").read_text().splitlines())
    )


@pytest.mark.slow  # two more interpreters
def test_two_processes_give_the_same_answers(tmp_path):
    def samples(name):
        kept = json.loads((tmp_path / name / "samples/model/flashsloth_scenes.json").read_text())
        return [(each["id"], each["prediction"], each["score"]) for each in kept["samples"]]

    command = ["flashsloth_cli", "eval", "nano", "--tasks", "flashsloth_scenes", "--images", "24", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", *command]
    run_suite(EvalSettings("nano", "", chosen(None, ["flashsloth_scenes"]), own=OWN), tmp_path / "one")
    done = subprocess.run([*launch, "-o", str(tmp_path / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert samples("two") == samples("one")
    assert len(list((tmp_path / "two" / "responses").iterdir())) == 2

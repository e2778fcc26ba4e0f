import itertools
import json
import logging
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch.utils.data import BatchSampler, DataLoader

from data_files import image_bytes, llava_turns, message_rows, write_llava, write_shards
from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.data.broken import BrokenSamples
from flashsloth.data.collator import Collator
from flashsloth.data.dataset import build_dataset, build_source
from flashsloth.data.mixture import BLOCK, MixedSamples, Order
from flashsloth.data.recipe import LlavaData, MessagesData, WebdatasetData
from flashsloth.data.sampler import ModalityLengthSampler
from flashsloth.data.schema import Sample
from flashsloth.data.sources import LlavaSamples
from flashsloth.train.build import build
from flashsloth.train.recipe import load_recipe, parse_recipe
from flashsloth.train.run import run

DEBUG = Path(__file__).parents[1] / "configs" / "debug" / "two_stages.yaml"


@pytest.fixture(scope="module")
def built():
    return build(load_recipe(DEBUG).model)


def llava_samples(path: Path, **limits) -> LlavaSamples:
    return LlavaSamples(LlavaData(kind="llava", path=path, image_folder=path.parent, **limits))


def answer_of(record) -> str:
    return record.messages[1]["content"][0]["text"]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(image_bytes())
    (tmp_path / "b.png").write_bytes(b"not an image")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A <image> of black."}]
    records = [
        {"id": "good", "image": "a.png", "conversations": turns},
        {"id": "corrupt", "image": "b.png", "conversations": turns},
        {"id": "absent", "image": "c.png", "conversations": turns},
        {"id": "unpaired", "conversations": turns},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def test_broken_samples_are_named_and_skipped_up_to_a_limit(damaged, caplog, built):
    dataset = llava_samples(damaged, max_broken=2)
    sample = dataset[0].load()
    assert sample.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert sample.messages[1]["content"] == [{"type": "text", "text": "A <image> of black."}]
    with caplog.at_level(logging.WARNING):
        batch = Collator(built[1], "chat", 256)([dataset[index] for index in (0, 1, 2)])
    assert batch["input_ids"].shape[0] == 1 and batch["pixel_values"].shape[0] == 1
    for name in ("record 1 (id corrupt)", "b.png", "record 2 (id absent)", "c.png"):
        assert name in caplog.text
    assert dataset.num_broken == 2
    assert dataset[1].load() is None and dataset.num_broken == 2  # the same sample counts once
    with pytest.raises(ValueError, match=r"data\.json: record 3 \(id unpaired\) is broken.*max_broken is 2"):
        dataset[3].load()


def test_samples_the_template_refuses_are_broken_too(tmp_path, built, caplog):
    path = write_llava(tmp_path, [(1, 1, 1), (1, 1, 400), (0, 1, 1)])
    dataset = llava_samples(path, max_broken=2)
    with caplog.at_level(logging.WARNING):
        batch = Collator(built[1], "chat", 256)([dataset[index] for index in range(3)])
    assert batch["input_ids"].shape[0] == 2
    assert "record 1 (id r1) is broken: its first turn alone has" in caplog.text
    with caplog.at_level(logging.WARNING):
        Collator(built[1], "plain", 256)([dataset[0], dataset[2]])
    assert "record 2 (id r2) is broken: template: plain needs one image" in caplog.text
    with pytest.raises(ValueError, match="one image"):
        Collator(built[1], "plain", 256)([Sample([], [], caption="text")])


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_batch_without_a_usable_sample_teaches_nothing(damaged, built, template):
    dataset = llava_samples(damaged, max_broken=3)
    batch = Collator(built[1], template, 256)([dataset[1], dataset[2]])
    model = built[0].train()
    model.zero_grad()
    loss = model(**batch, use_cache=False, loss_only=True, num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == 0
    gradients = [parameter.grad for parameter in model.model.compressor.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_count_is_right_over_worker_processes_and_stops_the_run(tmp_path, built, start):
    path = write_llava(tmp_path, [(1, 1, 1)] * 16)
    for index in (1, 4, 9, 10):
        (tmp_path / f"{index}-0.png").write_bytes(b"broken")
    collator = Collator(built[1], "chat", 256)
    dataset = llava_samples(path, max_broken=4)
    options = {"batch_size": 2, "num_workers": 2, "collate_fn": collator, "multiprocessing_context": start}
    loader = DataLoader(dataset, persistent_workers=True, **options)
    for _ in range(2):
        assert [batch["input_ids"].shape[0] for batch in loader] == [1, 2, 1, 2, 1, 1, 2, 2]
    assert dataset.num_broken == 4
    strict = llava_samples(path, max_broken=3)
    with pytest.raises(ValueError, match="broken sample number 4 and max_broken is 3"):
        list(DataLoader(strict, **options))


def test_counting_needs_no_memory_beyond_its_limit():
    broken = BrokenSamples(2)
    broken.add("a", "x")
    broken.add("a", "x")
    broken.add("b", "x")
    assert broken.count == 2
    for name in ("c", "d", "c"):
        with pytest.raises(ValueError, match=f"^{name} is broken"):
            broken.add(name, "x")


def test_json_and_jsonl_hold_the_same_records_and_a_bad_line_is_one_broken_sample(tmp_path, caplog):
    shapes = [(1, 1, 1), (2, 2, 3), (0, 1, 1)]
    as_list = llava_samples(write_llava(tmp_path, shapes))
    path = write_llava(tmp_path, shapes, "data.jsonl")
    path.write_text(path.read_text() + '\n{"id": "cut\n')
    as_lines = llava_samples(path, max_broken=1)
    assert len(as_list) == 3 and len(as_lines) == 4
    for index in range(3):
        assert as_list[index].messages == as_lines[index].messages
        assert as_list[index].images == as_lines[index].images
    with caplog.at_level(logging.WARNING):
        assert as_lines[3].load() is None
    assert "data.jsonl: line 5 is broken: the line is not valid JSON" in caplog.text


@pytest.mark.parametrize("text", ["{", "{}", "[]", ""])
def test_files_that_hold_no_records_are_refused_by_name(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json"):
        llava_samples(tmp_path / "data.json")


def write_messages(folder: Path, form: str, count: int = 7) -> str:
    folder.mkdir(exist_ok=True)
    rows = message_rows(count)
    if form == "json":
        for index, row in enumerate(rows):
            names = [f"{index}-{number}.png" for number in range(len(row["images"]))]
            for name, image in zip(names, row["images"], strict=True):
                (folder / name).write_bytes(image["bytes"])
            row["images"] = [str(folder / name) for name in names]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / "rows.jsonl")
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    if form == "disk":
        table.save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    for shard in range(2):
        part = table.shard(num_shards=2, index=shard, contiguous=True)
        part.to_parquet(str(folder / f"part-{shard}.parquet"))
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["parquet", "json", "disk"])
def test_messages_of_every_form_reach_the_batch(tmp_path, built, form, streaming):
    source = MessagesData(kind="messages", path=write_messages(tmp_path, form), streaming=streaming, shuffle_buffer=2)
    dataset = build_source(source, "chats", seed=0, image_size=72)
    records = list(itertools.islice(dataset, 7)) if streaming else [dataset[index] for index in range(7)]
    records.sort(key=answer_of)
    batch = Collator(built[1], "chat", 256)(records)
    assert (batch["image_positions"] >= 0).sum(-1).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (batch["query_positions"] >= 0).sum(-1).tolist() == [1, 2, 1, 2, 1, 2, 1]
    answers = [built[1].tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert [text.split("</s>")[0] for text in answers] == [f" answer {index}" for index in range(7)]
    assert {record.origin.source for record in records} == {"chats"}
    assert torch.isfinite(built[0](**batch).loss)


def test_data_that_is_not_there_is_refused_by_name(tmp_path):
    for source in (
        MessagesData(kind="messages", path=str(tmp_path)),
        MessagesData(kind="messages", path="no/such-data-set"),
        WebdatasetData(kind="webdataset", shards=str(tmp_path / "*.tar")),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path.name}|no/such-data-set"):
            build_source(source, "chats", seed=0, image_size=72)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="no column messages; it has text"):
        build_source(MessagesData(kind="messages", path=str(tmp_path)), "chats", seed=0, image_size=72)


def numbers(records) -> list[int]:
    return [int(answer_of(record).split()[-1]) for record in records]


def shard_stream(tmp_path: Path, shards: int = 3, samples: int = 4, **options):
    source = WebdatasetData(
        kind="webdataset", shards=write_shards(tmp_path / "shards", shards, samples), shuffle_buffer=5, **options
    )
    return build_source(source, "tars", seed=1, image_size=72)


def test_tar_shards_give_every_sample_once_a_pass_in_a_seeded_order(tmp_path, built):
    stream = shard_stream(tmp_path)
    assert numbers(stream.one_pass()) == list(range(12))
    drawn = numbers(itertools.islice(stream, 36))
    passes = [drawn[:12], drawn[12:24], drawn[24:]]
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert passes[0] != passes[1] != list(range(12))
    assert drawn == numbers(itertools.islice(shard_stream(tmp_path), 36))
    records = list(itertools.islice(stream, 4))
    batch = Collator(built[1], "plain", 256)(records)
    assert batch["pixel_values"].shape[0] == 4
    assert all(".tar: sample 0" in record.origin.place for record in records)


def test_worker_processes_share_the_shards(tmp_path):
    stream = shard_stream(tmp_path)
    loader = DataLoader(stream, batch_size=None, num_workers=2, collate_fn=lambda record: numbers([record])[0])
    # one worker has two shards and gives them while the other one goes through its own twice
    assert set(itertools.islice(loader, 16)) == set(range(12))


def test_processes_share_a_stream_as_one_process_would_read_it(tmp_path):
    alone = numbers(itertools.islice(shard_stream(tmp_path), 24))
    parts = [
        numbers(itertools.islice(IterableDatasetShard(shard_stream(tmp_path), 2, True, 2, rank), 12))
        for rank in (0, 1)
    ]
    batches = [part[start : start + 2] for start in range(0, 12, 2) for part in parts]
    assert list(itertools.chain.from_iterable(batches)) == alone


def test_a_damaged_shard_is_named_and_what_is_left_of_it_skipped(tmp_path, caplog):
    stream = shard_stream(tmp_path, max_broken=2)
    shard = tmp_path / "shards" / "001.tar"
    with tarfile.open(shard) as tar:
        cut = tar.getmembers()[5].offset_data + 10
    shard.write_bytes(shard.read_bytes()[:cut])
    with caplog.at_level(logging.WARNING):
        samples = [record.load() for record in stream.one_pass()]
    assert numbers(sample for sample in samples if sample) == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert "001.tar is broken: unexpected end of data" in caplog.text
    assert "001.tar: sample 00006 is broken: it has neither a json" in caplog.text and stream.num_broken == 2


def mixture_of(tmp_path: Path, seed: int = 0, **options) -> MixedSamples:
    sources = {
        name: llava_samples(write_llava(tmp_path / name, [(images, 1, 1)] * count))
        for name, images, count in (("a", 1, 5), ("b", 0, 3))
    }
    return MixedSamples(sources, {"a": 3.0, "b": 1.0}, seed, **options)


def test_a_mixture_keeps_its_weights_and_depends_on_seed_and_index_alone(tmp_path):
    mixture = mixture_of(tmp_path, size=BLOCK)
    places = [mixture.locate(index) for index in range(BLOCK)]
    assert Counter(source for source, _ in places) == {0: 7500, 1: 2500}
    again = mixture_of(tmp_path, size=BLOCK)
    assert [again.locate(index) for index in (9999, 3, 0)] == [places[index] for index in (9999, 3, 0)]
    assert [mixture_of(tmp_path, seed=1, size=BLOCK).locate(index) for index in range(50)] != places[:50]
    drawn = [place for source, place in places if source == 0]
    for start in range(0, 7500, 5):  # every pass over a source meets each of its samples once
        assert sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4]
    assert len({tuple(drawn[start : start + 5]) for start in range(0, 7500, 5)}) > 50
    assert len(mixture_of(tmp_path)) == 8
    source, place = mixture.locate(7)
    assert mixture[7].origin.place == mixture.sources[source][place].origin.place
    with pytest.raises(IndexError):
        mixture.locate(BLOCK)


def test_order_continues_over_blocks_and_refuses_a_weight_of_nothing():
    order = Order({"a": 1, "b": 1, "c": 1}, seed=0)
    ordinals = [[], [], []]
    for index in range(BLOCK - 50, BLOCK + 50):
        source, ordinal = order[index]
        ordinals[source].append(ordinal)
    for found in ordinals:
        assert found == list(range(found[0], found[0] + len(found)))
    with pytest.raises(ValueError, match="'b'"):
        Order({"a": 1, "b": 1e-6}, seed=0)


def mixed_recipe(tmp_path: Path, *overrides: str, **stage):
    tree = {
        "model": {"checkpoint": "somewhere"},
        "data": {
            "pictures": {
                "kind": "llava",
                "path": str(write_llava(tmp_path / "pictures", [(1, 1, 1)] * 6)),
                "image_folder": str(tmp_path / "pictures"),
            },
            "tars": {"kind": "webdataset", "shards": write_shards(tmp_path / "tars", 2, 4)},
            "drawn": {"kind": "synthetic", "size": 6, "weights": {"scenes": 1}},
            "streamed": {"kind": "mixture", "sources": {"pictures": 1, "tars": 1}},
            "indexed": {"kind": "mixture", "sources": {"pictures": 1, "drawn": 3}, "size": 40},
        },
        "stages": [
            {
                "name": "only",
                "data": "indexed",
                "template": "chat",
                "train": ["projector"],
                "learning_rate": 1e-3,
                "batch_size": 2,
                "max_steps": 3,
                **stage,
            }
        ],
        "output_dir": str(tmp_path / "out"),
    }
    return tree


def test_mixtures_of_streams_and_of_rendered_images(tmp_path):
    recipe = parse_recipe(mixed_recipe(tmp_path))
    indexed = build_dataset(recipe, recipe.stages[0], 72)
    assert len(indexed) == 40 and not indexed.is_independent
    assert {indexed[index].origin.source for index in range(40)} == {"pictures", "drawn"}
    recipe = parse_recipe(mixed_recipe(tmp_path, data="streamed"))
    streamed = build_dataset(recipe, recipe.stages[0], 72)
    origins = [record.origin for record in itertools.islice(streamed, 60)]
    assert 20 < sum(origin.source == "tars" for origin in origins) < 40
    pictures = [origin.place for origin in origins if origin.source == "pictures"]
    assert len(set(pictures[:6])) == 6
    again = itertools.islice(build_dataset(recipe, recipe.stages[0], 72), 60)
    assert [record.origin.place for record in again] == [origin.place for origin in origins]


@pytest.mark.parametrize(
    ("stage", "data", "fields"),
    [
        ({"data": "streamed", "max_steps": None, "epochs": 1}, {}, ("epochs", "data.streamed")),
        ({"data": "streamed", "group_by": "modality_length"}, {}, ("group_by", "data.streamed")),
        ({"group_by": "modality_length"}, {}, ("group_by", "data.indexed")),
        ({"data": "pictures", "turns": 2}, {}, ("turns", "data.pictures")),
        ({}, {"m": {"kind": "mixture", "sources": {"pictures": 1, "none": 1}}}, ("data.m.sources", "none")),
        ({}, {"m": {"kind": "mixture", "sources": {"pictures": 1, "indexed": 1}}}, ("data.m.sources", "indexed")),
        ({}, {"m": {"kind": "mixture", "sources": {"pictures": 1, "tars": 1}, "size": 3}}, ("data.m.size", "sources")),
        ({}, {"m": {"kind": "messages", "path": "/", "config": "x"}}, ("config", "path")),
        ({}, {"m": {"kind": "messages", "path": "x", "stream": True}}, ("data.m.messages.stream", "streaming")),
    ],
)
def test_contradictions_about_data_name_both_fields(tmp_path, stage, data, fields):
    tree = mixed_recipe(tmp_path, **stage)
    tree["data"] |= data
    with pytest.raises(ValueError) as error:
        parse_recipe(tree)
    for name in fields:
        assert name in str(error.value)


def sizes_of(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(images, 4 * tokens) for images, tokens in shapes]


def test_groups_have_one_modality_and_similar_lengths_in_every_process():
    random = np.random.default_rng(0)
    sizes = sizes_of([(int(random.integers(0, 3)), int(random.integers(1, 500))) for _ in range(200)])
    sampler = ModalityLengthSampler(sizes, num_image_tokens=81, batch_size=4, batches_per_step=2, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    order = orders[0]
    assert len(order) == len(sampler) == len(set(order)) and len(order) >= 200 - 2 * 3
    batches = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert all(len({sizes[index][0] > 0 for index in batch}) == 1 for batch in batches)
    lengths = sampler.lengths
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    shuffled = random.permutation(len(order))
    assert spread < 0.25 * np.mean([np.ptp(lengths[shuffled[start : start + 4]]) for start in range(0, 196, 4)])
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler, 4, drop_last=True), num_processes=2, process_index=rank))
        for rank in range(2)
    ]
    assert list(itertools.chain(*zip(*shards, strict=True))) == batches[: 2 * len(shards[0])]
    whole = len(order) // 8 - 2
    for first, second in list(zip(*shards, strict=True))[:whole]:  # a step is of one modality over all processes
        assert len({sizes[index][0] > 0 for index in first + second}) == 1


def test_too_few_samples_to_group_are_refused():
    with pytest.raises(ValueError, match="batch_size is 4"):
        ModalityLengthSampler(sizes_of([(1, 3)] * 3 + [(0, 3)] * 3), 9, batch_size=4, batches_per_step=1, seed=0)


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["grouped", "streamed", "shards"])
def test_a_run_resumes_at_its_place_in_the_data(tmp_path, monkeypatch, kind):
    shapes = [(int(index % 3 == 0), 1 + index % 2, index % 5) for index in range(21)]
    path = write_llava(tmp_path / "llava", shapes)
    sources = {
        "grouped": {"kind": "llava", "path": str(path), "image_folder": str(path.parent)},
        "streamed": {"kind": "messages", "path": write_messages(tmp_path / "rows", "json"), "streaming": True},
        "shards": {"kind": "webdataset", "shards": write_shards(tmp_path / "shards", 2, 4)},
    }
    overrides = [
        f"data={json.dumps({'scenes': sources[kind]})}",
        f"stages.finetune.group_by={'modality_length' if kind == 'grouped' else 'none'}",
        "stages.finetune.turns=null",
        f"stages.finetune.template={'plain' if kind == 'shards' else 'chat'}",
        "stages.finetune.batch_size=2",
        "stages.finetune.gradient_accumulation=2",
        "stages.finetune.max_steps=8",
        "checkpoints.every_steps=6",
    ]
    recipe = load_recipe(DEBUG, overrides)
    recipe.stages.pop(0)

    def losses(folder: Path) -> list[tuple[int, float]]:
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows]

    recipe.output_dir = tmp_path / "whole"
    whole = run(recipe)
    recipe.output_dir = tmp_path / "resumed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flashsloth.train.callbacks.Clock.on_save", interrupted)
        run(recipe)
    resumed = run(recipe, resume=True)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 8
    states = [FlashSlothForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (whole, resumed)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_limits_on_images_are_kept(tmp_path, caplog):
    path = write_llava(tmp_path, [(3, 1, 1), (1, 1, 1)])
    (tmp_path / "1-0.png").write_bytes(image_bytes(size=40))
    dataset = llava_samples(path, max_images=2, max_pixels=1000, max_broken=2)
    with caplog.at_level(logging.WARNING):
        assert dataset[0].load() is None and dataset[1].load() is None
    assert "3 images, more than max_images 2" in caplog.text
    assert "1-0.png' has 40 x 40 = 1,600 pixels, more than the limit of 1,000" in caplog.text


def test_turns_with_images_are_dropped_with_their_images(tmp_path, built):
    turns = llava_turns(1) + [{"from": "human", "value": "<image>\nand here?"}, {"from": "gpt", "value": "no"}]
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(image_bytes())
    record = {"image": ["a.png", "b.png"], "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    dataset = llava_samples(tmp_path / "data.json")
    full = Collator(built[1], "chat", 256)([dataset[0]])
    short = Collator(built[1], "chat", full["input_ids"].shape[1] - 1)([dataset[0]])
    assert full["pixel_values"].shape[0] == 2 and short["pixel_values"].shape[0] == 1
    assert (short["query_positions"] >= 0).sum() == 1

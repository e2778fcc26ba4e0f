"""Encoded samples kept for later epochs: the same batches, without reading anything again."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_files import image_bytes, write_llava
from flashsloth.data import cache as cache_module
from flashsloth.data.cache import EncodedSample, SampleCache, split_rows
from flashsloth.data.collator import Collator
from flashsloth.data.dataset import build_dataset, keep_encoded_samples
from flashsloth.data.mixture import MixedSamples
from flashsloth.data.recipe import LlavaData, SyntheticData
from flashsloth.data.sources import LlavaSamples, SyntheticSamples
from flashsloth.train.build import build
from flashsloth.train.recipe import load_recipe
from flashsloth.train.run import run
from mixed_recipe import write_mixed_recipe

DEBUG = Path(__file__).parents[1] / "configs" / "debug" / "two_stages.yaml"
# images, turns, words of an answer: one, none, several images; a conversation that loses turns at 256 tokens
SHAPES = [(1, 1, 1), (0, 2, 3), (2, 1, 8), (1, 3, 30), (1, 2, 2), (0, 1, 1), (3, 2, 1), (1, 1, 9)]


@pytest.fixture(scope="module")
def processor():
    return build(load_recipe(DEBUG).model)[1]


def samples_of(folder: Path, shapes=SHAPES, **limits) -> LlavaSamples:
    path = write_llava(folder, shapes)
    return LlavaSamples(LlavaData(kind="llava", path=path, image_folder=folder, **limits))


def assert_equal_batches(batch, other) -> None:
    assert batch.keys() == other.keys()
    for name in other:
        assert batch[name].dtype == other[name].dtype, name
        assert torch.equal(batch[name], other[name]), name


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 16}, {"packing": "rows"}, {"packing": "single_row"}])
@pytest.mark.parametrize("order", [[3, 0, 1], [1, 5], [2, 6, 4, 7], [0]])
def test_batches_of_kept_samples_are_those_of_fresh_ones(tmp_path, processor, options, order):
    collator = Collator(processor, "chat", 256, **options)
    fresh = samples_of(tmp_path)
    expected = collator([fresh[index] for index in order])
    kept = samples_of(tmp_path)
    kept.cache = SampleCache(len(kept), 16, 1)
    assert_equal_batches(collator([kept[index] for index in order]), expected)
    known = [kept[index] for index in order]
    assert all(isinstance(item, EncodedSample) for item in known)
    assert_equal_batches(collator(known), expected)
    # some kept, some not, in any order
    assert_equal_batches(collator([known[0], *(fresh[index] for index in order[1:])]), expected)
    assert_equal_batches(collator([*(fresh[index] for index in order[:-1]), known[-1]]), expected)


def test_kept_captions_are_those_of_fresh_ones(tmp_path, processor):
    collator = Collator(processor, "plain", 64)
    samples = samples_of(tmp_path, [(1, 1, 5), (1, 1, 1), (1, 1, 70)])
    expected = collator([samples[index] for index in range(3)])
    samples.cache = SampleCache(len(samples), 16, 1)
    for _ in range(2):
        assert_equal_batches(collator([samples[index] for index in range(3)]), expected)
    assert isinstance(samples[2], EncodedSample)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_share_what_one_of_them_kept(tmp_path, processor, start):
    collator = Collator(processor, "chat", 256)
    samples = samples_of(tmp_path)
    samples.cache = SampleCache(len(samples), 16, 2)
    options = {"num_workers": 2, "collate_fn": collator, "multiprocessing_context": start}
    loader = DataLoader(samples, batch_size=2, **options)
    first = list(loader)
    for path in tmp_path.glob("*.png"):
        path.unlink()  # nothing can be read any more
    for batch, expected in zip(loader, first, strict=True):
        assert_equal_batches(batch, expected)
    # the batches go to the other worker than before
    swapped = DataLoader(samples, batch_sampler=[[2, 3], [0, 1]], **options)
    for batch, expected in zip(swapped, [first[1], first[0]], strict=True):
        assert_equal_batches(batch, expected)


def test_a_full_cache_keeps_what_it_has(tmp_path, processor):
    collator = Collator(processor, "chat", 256)
    samples = samples_of(tmp_path)
    row = split_rows(collator([samples[2]]))[0]
    size = sum(array.nbytes for array in row.values())
    samples.cache = cache = SampleCache(len(samples), 1, 1)
    cache.share = int(2.5 * size)
    for index in range(len(samples)):
        cache.put(index, row)
        cache.put(index, row)  # twice takes no room
    assert [cache.get(index) is not None for index in range(len(samples))] == [True, True, *[False] * 6]
    known = cache.get(1)
    assert known is not None and known.arrays.keys() == row.keys()
    assert all(np.array_equal(known.arrays[name], row[name]) for name in row)


def test_broken_samples_are_counted_in_every_epoch_and_never_kept(tmp_path, processor):
    samples = samples_of(tmp_path, [(1, 1, 1), (1, 1, 1), (1, 1, 400)], max_broken=2)
    (tmp_path / "1-0.png").write_bytes(b"broken")
    samples.cache = SampleCache(len(samples), 16, 1)
    collator = Collator(processor, "chat", 256)
    for _ in range(2):
        assert collator([samples[index] for index in range(3)])["input_ids"].shape[0] == 1
        assert samples.num_broken == 2
    assert [isinstance(samples[index], EncodedSample) for index in range(3)] == [True, False, False]
    (tmp_path / "1-0.png").write_bytes(image_bytes())
    assert collator([samples[0], samples[1]])["input_ids"].shape[0] == 2


@pytest.mark.parametrize(
    ("drawn", "megabytes", "kept"), [(8, 4, False), (9, 4, True), (None, 4, True), (1000, 0, False)]
)
def test_samples_are_kept_where_they_come_again(tmp_path, drawn, megabytes, kept):
    samples = samples_of(tmp_path)
    keep_encoded_samples(samples, drawn, megabytes, workers=2)
    assert (samples.cache is not None) == kept


def test_of_a_mixture_the_sources_that_repeat_are_kept(tmp_path):
    often, rarely = samples_of(tmp_path / "a"), samples_of(tmp_path / "b")
    drawn = SyntheticSamples(
        SyntheticData(kind="synthetic", size=4, weights={"scenes": 1}), "drawn", "train", 0, 24, 1
    )
    mixture = MixedSamples(
        {"often": often, "rarely": rarely, "drawn": drawn}, {"often": 6, "rarely": 1, "drawn": 3}, 0
    )
    keep_encoded_samples(mixture, 20, 4, workers=0)
    assert often.cache is not None and rarely.cache is None
    assert often.cache.share == 4 * cache_module.MEGABYTE


def test_a_cache_stays_within_the_shared_memory_that_is_free(monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "_SHARED_MEMORY", Path("/"))
    monkeypatch.setattr(
        cache_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * cache_module.MEGABYTE)
    )
    with caplog.at_level(logging.WARNING):
        cache = SampleCache(10, 64, 1)
    assert cache.share == 1.5 * cache_module.MEGABYTE
    assert "loader.cache_mb: 64 is lowered to 1, half of what is free in /" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_learns_the_same_with_and_without(tmp_path, workers):
    recipe_file = write_mixed_recipe(tmp_path, 14)  # more than two epochs
    losses = []
    for megabytes in (0, 16):
        overrides = [f"output_dir={tmp_path / str(megabytes)}", f"loader.workers={workers}"]
        recipe = load_recipe(recipe_file, [*overrides, f"loader.cache_mb={megabytes}"])
        run(recipe)
        lines = (recipe.output_dir / "log.jsonl").read_text().splitlines()
        losses.append([(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)])
    assert losses[0] == losses[1] and len(losses[0]) == 14


def test_the_dataset_of_a_recipe_is_kept_by_its_stage(tmp_path, monkeypatch):
    recipe = load_recipe(write_mixed_recipe(tmp_path, 14), [f"output_dir={tmp_path / 'run'}"])
    seen = []

    def build_and_remember(*args):
        seen.append(build_dataset(*args))
        return seen[-1]

    monkeypatch.setattr("flashsloth.train.run.build_dataset", build_and_remember)
    run(recipe)
    (dataset,) = seen
    assert all(dataset.cache.get(index) is not None for index in range(len(dataset)))

"""Families drawn into files beforehand, and read by training."""

import pickle

import pytest

from flashsloth.synthetic import SyntheticDataset, render
from flashsloth.synthetic.drawing import draw
from flashsloth.synthetic.drawn import SAMPLES_OF_A_FILE, drawn_families
from flashsloth.synthetic.sample import make_generator

OPTIONS = {"image_size": 64, "turns": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    assert list(draw("charts", folder, SAMPLES_OF_A_FILE + 1, **OPTIONS)) == [SAMPLES_OF_A_FILE] * 2
    return folder


def test_files_hold_what_the_family_renders(folder):
    family = drawn_families(folder, ["scenes", "charts"], "train")["charts"]
    assert len(family) == 2 * SAMPLES_OF_A_FILE
    expected = {render("charts", 2 * index, "train", **OPTIONS).caption for index in range(len(family))}
    found = {family.sample(make_generator("train", index), 3).caption for index in range(60)}
    assert len(found) > 40 and found <= expected


def test_questions_and_glyphs_come_along(folder):
    family = drawn_families(folder, ["charts"], "train")["charts"]
    samples = [family.sample(make_generator("train", index), 3) for index in range(20)]
    assert all(sample.image.size == (64, 64) and len(sample.turns) <= 3 and sample.glyphs for sample in samples)
    assert len({sample.turns[0].question for sample in samples}) > 5


def test_the_same_seed_gives_the_same_sample_in_every_process(folder):
    family = drawn_families(folder, ["charts"], "train")["charts"]
    family.sample(make_generator("train", 0), 3)
    copy = pickle.loads(pickle.dumps(family))
    first, second = (one.sample(make_generator("train", 5), 3) for one in (family, copy))
    assert first.image.tobytes() == second.image.tobytes() and first.turns == second.turns


def test_drawing_again_goes_on_where_it_was(folder):
    paths = sorted(folder.iterdir())
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    list(draw("charts", folder, SAMPLES_OF_A_FILE + 1, **OPTIONS))
    assert sorted(folder.iterdir()) == paths
    assert paths[0].stat().st_mtime_ns == times[0]


def test_a_data_set_reads_what_is_drawn_and_renders_the_rest(folder):
    dataset = SyntheticDataset("train", 30, weights={"charts": 1, "scenes": 1}, image_size=48, drawn=folder)
    sizes = {(dataset.sample(index).family, dataset.sample(index).image.width) for index in range(30)}
    assert sizes == {("charts", 64), ("scenes", 48)}


def test_splits_are_kept_apart(folder):
    with pytest.raises(ValueError, match="holds no drawn images of charts .test."):
        SyntheticDataset("test", 3, weights={"charts": 1}, drawn=folder)

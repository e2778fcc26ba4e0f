"""Pictures and maps: the same for a seed, true, balanced, and apart in what is kept for the test."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashsloth.synthetic import maps, outlines, picture_layouts, pictures, sprites
from flashsloth.synthetic.colours import COLOURS, distance
from flashsloth.synthetic.map_drawing import draw_map
from flashsloth.synthetic.sample import Sample, make_generator
from flashsloth.synthetic.words import HELD_OUT

DRAWS = 40
FOLDER = os.environ.get(sprites.DIRECTORY_VARIABLE, "")
needs_pictures = pytest.mark.skipif(
    not (Path(FOLDER) / "sprites" / "noto").is_dir() or not FOLDER,
    reason=f"{sprites.DIRECTORY_VARIABLE} names no folder filled by {sprites.FILL_COMMAND}",
)
RENDERERS: dict[str, tuple[Callable[..., Sample], tuple[str, ...], tuple[str, ...]]] = {
    "pictures": (pictures.render_picture, pictures.PICTURE_TASKS, pictures.PICTURE_WORDS),
    "maps": (maps.render_map, maps.MAP_TASKS, maps.MAP_WORDS),
}


def draw(family: str, seed: int, split: str, size: int = 144) -> Sample:
    return RENDERERS[family][0](make_generator(split, seed), split == "test", size, 6)


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[str, str], list[Sample]]:
    return {
        (family, split): [draw(family, seed, split) for seed in range(DRAWS)]
        for family in RENDERERS
        for split in ("train", "test")
    }


def test_rows_are_sound() -> None:
    things = sprites.vocabulary()
    assert len({thing.name for thing in things}) == len(things) > 400
    for thing in things:
        assert thing.emoji and thing.kind and len(thing.name.split()) <= 2
        assert thing.article in ("", "a", "an")
    assert {thing.kind for thing in things} >= set(pictures.KINDS)
    known = sprites.countries()
    assert len({country.name for country in known}) == len(known) > 90
    assert {country.continent for country in known} == set(maps.WINDOWS)


def test_licences_allow_training() -> None:
    for style, (_, version, licence, _) in sprites.PACKAGES.items():
        assert version.count(".") == 2
        assert style == sprites.TEST_STYLE or licence.split(",")[0] in ("Apache-2.0", "MIT", "ISC")


def test_a_missing_folder_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(sprites.DIRECTORY_VARIABLE, raising=False)
    for family in RENDERERS:
        with pytest.raises(ValueError, match=r"fetch_pictures.sh"):
            draw(family, 0, "train")
    monkeypatch.setenv(sprites.DIRECTORY_VARIABLE, str(tmp_path))
    for family in RENDERERS:
        with pytest.raises(ValueError, match=r"fetch_pictures.sh"):
            draw(family, 0, "train")


def test_the_test_style_refuses_training() -> None:
    with pytest.raises(ValueError, match="kept for the test"):
        pictures.render_twemoji_picture(make_generator("train", 0), False, 144, 4)


def test_a_topology_is_decoded() -> None:
    # a unit square of two arcs, the second one backwards, and a triangle over the 180th meridian
    topology = {
        "transform": {"scale": [1, 1], "translate": [10, 20]},
        "arcs": [[[0, 0], [1, 0], [0, 1]], [[0, 0], [0, 1], [1, 0]], [[169, 0], [0, 4], [-359, 0], [359, -4]]],
        "objects": {
            "countries": {
                "geometries": [
                    {"type": "Polygon", "arcs": [[0, ~1]], "properties": {"name": "square"}},
                    {"type": "MultiPolygon", "arcs": [[[2]]], "properties": {"name": "crossing"}},
                ]
            }
        },
    }
    found = outlines.decode_topology(topology)
    assert found["square"][0].tolist() == [[10, 20], [11, 20], [11, 21], [10, 21]]
    assert found["crossing"][0][:, 0].tolist() == [179, 179, 180]


@pytest.mark.parametrize("projection", [*outlines.PROJECTIONS, outlines.TEST_PROJECTION])
def test_a_projection_keeps_the_middle_and_the_directions(projection: str) -> None:
    points = np.array([(20.0, 50.0), (21.0, 50.0), (20.0, 51.0)])
    middle, east, north = outlines.project(points, (20.0, 50.0), projection)
    assert middle == pytest.approx([0, 0], abs=1e-9)
    assert east == pytest.approx([np.radians(1) * np.cos(np.radians(50)), 0], abs=2e-4)
    assert north == pytest.approx([0, -np.radians(1)], abs=3e-4)


@needs_pictures
@pytest.mark.parametrize("family", RENDERERS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_seed_gives_the_same_sample(family: str, split: str) -> None:
    first, again, other = (draw(family, seed, split) for seed in (5, 5, 6))
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.caption, first.turns) == (again.caption, again.turns)
    assert (first.image.tobytes(), first.caption) != (other.image.tobytes(), other.caption)


@needs_pictures
@pytest.mark.parametrize("family", RENDERERS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_samples_are_sound(family: str, split: str, drawn: dict[tuple[str, str], list[Sample]]) -> None:
    words = set(RENDERERS[family][2])
    for sample in drawn[family, split]:
        width, height = sample.image.size
        assert max(width, height) == 144 and min(width, height) >= 72
        for turn in sample.turns:
            assert turn.task in RENDERERS[family][1]
            assert turn.answer == turn.answer.lower() and 1 <= len(turn.answer.split()) <= 3
            assert not (turn.kept_wording and split == "train")
            assert (turn.answer == "none") == turn.task.endswith("_absent")
            if not turn.task.endswith("_read"):
                asked = turn.question.translate(str.maketrans("?,.", "   ")).split()
                assert all(word in words or len(word) == 1 for word in asked), turn.question
        for glyph in sample.glyphs:
            assert -8 < glyph.x < width + 8 and -8 < glyph.y < height + 8


@needs_pictures
@pytest.mark.parametrize("family", RENDERERS)
def test_answers_are_balanced(family: str, drawn: dict[tuple[str, str], list[Sample]]) -> None:
    turns = [turn for split in ("train", "test") for sample in drawn[family, split] for turn in sample.turns]
    answers = Counter(turn.answer for turn in turns if turn.answer in ("yes", "no"))
    assert abs(answers["yes"] - answers["no"]) < 3 * sum(answers.values()) ** 0.5
    absent = sum(turn.task.endswith("_absent") for turn in turns) / len(turns)
    assert 0.03 < absent < 0.14


@needs_pictures
def test_wordings_of_absent_things_are_no_others() -> None:
    """A wording whose answer is none is also asked with another answer."""
    starts: dict[bool, set[str]] = {True: set(), False: set()}
    for seed in range(150):
        for turn in draw("pictures", seed, "train", 72).turns:
            starts[turn.task == "picture_absent"].add(" ".join(turn.question.split()[:2]))
    assert starts[True] <= starts[False]


@needs_pictures
def test_kept_words_are_not_written_in_training(drawn: dict[tuple[str, str], list[Sample]]) -> None:
    for sample in drawn["pictures", "train"]:
        assert not sample.held_out
        assert not {turn.answer for turn in sample.turns if turn.task == "picture_read"} & HELD_OUT
    assert any(sample.held_out for sample in drawn["pictures", "test"])


@needs_pictures
def test_what_is_beside_and_at_a_place_is_there() -> None:
    """Subjects of one colour each are found again in the pixels of grids."""
    fills = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (30, 60, 220), "yellow": (250, 220, 40)}

    def subject(name: str, fill: tuple[int, int, int]) -> picture_layouts.Subject:
        return picture_layouts.Subject(
            name, f"a {name}", name, lambda rng, size: Image.new("RGBA", (int(size),) * 2, fill)
        )

    pool = [subject(name, fill) for name, fill in fills.items()]
    pool += [subject(name, (0, 0, 0)) for name in ("one", "two", "three")]
    for seed in range(20):
        rng = make_generator("train", seed)
        shape = picture_layouts.grid_shape(rng)
        chosen = [rng.choice(pool[:3]) for _ in range(shape[0] * shape[1])]
        found = picture_layouts.gridded(rng, False, 144, chosen, shape)
        for shown in found.shown:
            pixel = found.image.getpixel((round(shown.x), round(shown.y)))
            assert min(fills, key=lambda name: distance(fills[name], pixel)) == shown.subject.name
        ask = pictures._Questions(found, pool, False, False, rng)
        for _ in range(10):
            turn = ask.at(rng)
            assert turn is not None
            spot = [
                shown for shown in found.shown if shown.place and f" {shown.place}" in turn.question.replace(",", "?")
            ]
            assert turn.answer in {shown.subject.name for shown in spot}
            beside = ask.beside(rng)
            if beside is None:
                continue
            side = next(side for side in pictures.BESIDE if side in beside.question)
            this = next(shown for shown in found.shown if f"the {shown.subject.name}" in beside.question)
            down, right = pictures.BESIDE[side]
            others = [
                shown.subject.name
                for shown in found.shown
                if (shown.x - this.x) * right + (shown.y - this.y) * down > 5
                and abs((shown.x - this.x) * down) + abs((shown.y - this.y) * right) < 5
            ]
            assert beside.answer in others


@needs_pictures
def test_a_coloured_country_has_its_colour_on_the_map() -> None:
    atlas = outlines.load_outlines(Path(FOLDER), "50m")
    for seed in range(12):
        found = draw_map(make_generator("train", seed), atlas, False, 288)
        for name, colour in found.coloured.items():
            place = found.places[name]
            if found.legend or place.pixels < 600:
                continue
            box = [int(place.x) - 2, int(place.y) - 2, int(place.x) + 3, int(place.y) + 3]
            around = found.image.crop(box).getcolors()
            assert min(distance(COLOURS[colour], pixel) for _, pixel in around) < 40


@needs_pictures
def test_areas_are_those_of_the_world() -> None:
    areas = {outline.name: outline.area for outline in outlines.load_outlines(Path(FOLDER), "50m")}
    square_kilometres = {"russia": 17.1e6, "brazil": 8.5e6, "france": 0.64e6, "madagascar": 0.59e6, "egypt": 1.0e6}
    for name, expected in square_kilometres.items():
        assert areas[name] * 6371**2 == pytest.approx(expected, rel=0.06), name
    assert not {country.name for country in sprites.countries()} - set(areas)
    coarse = {outline.name for outline in outlines.load_outlines(Path(FOLDER), "110m")}
    assert not {country.name for country in sprites.countries()} - coarse


@needs_pictures
def test_styles_show_the_same_things() -> None:
    folder = Path(FOLDER)
    unseen = {thing.name for thing in sprites.things_of(folder, sprites.TEST_STYLE)}
    seen = {thing.name for style in sprites.STYLE_WEIGHTS for thing in sprites.things_of(folder, style)}
    for style, (_, _, _, count) in sprites.PACKAGES.items():
        assert style == "maps" or len(list((folder / "sprites" / style).glob("*.png"))) == count
    assert unseen == seen == {thing.name for thing in sprites.vocabulary()}
    sample = pictures.render_twemoji_picture(make_generator("test", 1), True, 144, 4)
    assert sample.held_out and sample.family == "twemoji_pictures"

"""The rendered images: the same for a seed, fair between splits, true and balanced in their answers."""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from flashsloth.synthetic import (
    TASKS,
    Photographs,
    Sample,
    SyntheticDataset,
    answer_normalised,
    exact_match,
    fonts,
    render,
    scenes,
)
from flashsloth.synthetic.charts import CHART_TASKS
from flashsloth.synthetic.colours import COLOURS
from flashsloth.synthetic.photos import CLASS_NAMES, DIRECTORY_VARIABLE
from flashsloth.synthetic.scenes import HELD_OUT_PAIRS, SHAPES
from flashsloth.synthetic.tokenizer import DEFAULT_SIZE, FAMILY_WORDS, SPECIAL_TOKENS, language_words, train_tokenizer
from flashsloth.synthetic.words import HELD_OUT, HELD_OUT_WORDS, TRAIN_ITEMS, TRAIN_TITLES, TRAIN_WORDS

DRAWS = 100
PER_CLASS = 2
# those of other programs have files of tests of their own
OWN_FAMILIES = ("scenes", "charts", "text", "photos", "pages")


def _encoded_photos(split: str) -> list[tuple[bytes, int]]:
    """JPEG files of one grey level each, unlike in the two splits, and their labels."""
    rows = []
    for label in range(len(CLASS_NAMES)):
        for copy in range(PER_CLASS):
            buffer = io.BytesIO()
            level = 10 * label + 4 * copy + (130 if split == "test" else 20)
            Image.new("RGB", (32, 32), (level, level, level)).save(buffer, "JPEG", quality=95)
            rows.append((buffer.getvalue(), label))
    return rows


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "test"):
        rows = _encoded_photos(split)
        images = [{"bytes": data, "path": f"{split}{index}.jpg"} for index, (data, _) in enumerate(rows)]
        labels = [CLASS_NAMES[label] for _, label in rows]
        pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), folder / f"{split}.parquet")
    return Photographs(folder)


@pytest.fixture(scope="module")
def drawn(photos: Photographs) -> dict[tuple[str, str], list[Sample]]:
    """Samples of every family and split."""
    return {
        (family, split): [render(family, seed, split, photos=photos, image_size=72) for seed in range(DRAWS)]
        for family in OWN_FAMILIES
        for split in ("train", "test")
    }


@pytest.mark.parametrize("family", OWN_FAMILIES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_seed_gives_the_same_sample(family: str, split: str, photos: Photographs) -> None:
    first, again, other = (render(family, seed, split, photos=photos) for seed in (5, 5, 6))
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.caption, first.turns, first.held_out) == (again.caption, again.turns, again.held_out)
    assert (first.image.size, first.image.mode) == ((144, 144), "RGB")
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("family", OWN_FAMILIES)
def test_splits_do_not_share_a_seed(family: str, photos: Photographs) -> None:
    sets = {
        split: SyntheticDataset(split, 20, seed=3, weights={family: 1}, photos=photos) for split in ("train", "test")
    }
    images = {split: {items.sample(index).image.tobytes() for index in range(20)} for split, items in sets.items()}
    assert not images["train"] & images["test"]
    assert (
        render(family, 7, "train", photos=photos).image.tobytes()
        != render(family, 7, "test", photos=photos).image.tobytes()
    )


def test_photographs_of_a_split_come_from_its_own_file(photos: Photographs) -> None:
    for split, low, high in (("train", 0, 125), ("test", 125, 255)):
        assert photos.count(split) == PER_CLASS * len(CLASS_NAMES)
        for index in range(photos.count(split)):
            image, name = photos.load(split, index)
            assert low < np.asarray(image).mean() < high
            assert name == CLASS_NAMES[index // PER_CLASS]
        # what is drawn, not only what is read
        levels = [np.asarray(render("photos", seed, split, photos=photos).image) for seed in range(30)]
        # gaps of mosaics are black, white or mid grey, and training changes the brightness by 15
        assert all(low - 20 < np.median(level) < high + 20 for level in levels)


def test_questions_about_what_is_absent_are_answered_none(drawn: dict[tuple[str, str], list[Sample]]) -> None:
    for (family, _split), samples in drawn.items():
        for sample in samples:
            shown = set(sample.caption.replace(",", " ").replace(".", " ").split())
            for turn in sample.absent:
                assert turn.answer == "none" and turn.task.endswith("_absent")
                last = turn.question.rstrip("?").split()[-1]
                if family == "scenes":
                    named = shown & set(turn.question.rstrip("?").split())
                    assert not named & (set(COLOURS) | set(SHAPES)), turn.question
                elif last not in ("title", "about"):
                    assert last not in shown, (sample.caption, turn.question)
    wanted = SyntheticDataset("train", 40, absent_share=1.0, weights={"scenes": 1.0})
    assert {turn.answer for index in range(3) for turn in wanted.sample(index).turns[:2]} == {"none"}
    usual = SyntheticDataset("train", 40, weights={"scenes": 1.0})
    assert all(not turn.task.endswith("absent") for index in range(9) for turn in usual.sample(index).turns)


def test_every_family_shows_every_task(drawn: dict[tuple[str, str], list[Sample]]) -> None:
    for (family, split), samples in drawn.items():
        seen = {turn.task for sample in samples for turn in (*sample.turns, *sample.absent)}
        assert seen == set(TASKS[family]), (family, split)
        assert {sample.family for sample in samples} == {family}


def test_questions_differ_and_answers_are_short(drawn: dict[tuple[str, str], list[Sample]]) -> None:
    for samples in drawn.values():
        for sample in samples:
            questions = [turn.question for turn in sample.turns]
            assert 3 <= len(set(questions)) == len(questions) <= 6
            assert len(sample.caption.split()) <= 40
            for turn in sample.turns:
                assert turn.answer == answer_normalised(turn.answer) != ""
                assert len(turn.answer.split()) <= 3


def test_yes_and_no_are_balanced_and_no_answer_dominates(photos: Photographs) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for family in OWN_FAMILIES:
        for seed in range(350):
            for turn in render(family, seed, "train", photos=photos, image_size=36).turns:
                answers[turn.task][turn.answer] += 1
    for task, counts in answers.items():
        total = sum(counts.values())
        yes_no = counts["yes"] + counts["no"]
        if yes_no:
            assert abs(counts["yes"] / yes_no - 0.5) < 0.5 * 4 / yes_no**0.5, task  # four standard errors
        if yes_no < total / 2:
            assert max(counts.values()) / total < 0.6 + 2 / total**0.5, (task, counts)


def test_held_out_combinations_stay_out_of_training(photos: Photographs) -> None:
    kept = HELD_OUT | {" ".join(pair) for pair in HELD_OUT_PAIRS}
    pattern = re.compile(rf"\b({'|'.join(sorted(kept))})s?\b")
    for family in ("scenes", "charts", "text"):
        for seed in range(400):
            sample = render(family, seed, "train", photos=photos, image_size=36)
            said = [sample.caption, *(f"{turn.question} {turn.answer}" for turn in sample.turns)]
            assert not sample.held_out
            assert not pattern.search(" | ".join(said)), (family, seed)


def test_a_third_of_the_test_split_is_held_out(photos: Photographs) -> None:
    kept = HELD_OUT | {" ".join(pair) for pair in HELD_OUT_PAIRS}
    for family in ("scenes", "charts", "text"):
        samples = [render(family, seed, "test", photos=photos, image_size=36) for seed in range(300)]
        assert 0.25 < sum(sample.held_out for sample in samples) / len(samples) < 0.42, family
        for sample in samples:
            assert sample.held_out == any(re.search(rf"\b{word}\b", sample.caption) for word in kept)


def test_word_lists_are_disjoint_and_spelled_in_letters() -> None:
    shown = {*TRAIN_WORDS, *TRAIN_TITLES, *TRAIN_ITEMS}
    assert not shown & HELD_OUT
    assert len(TRAIN_WORDS) > 500 and len(HELD_OUT_WORDS) > 60
    assert not (shown | HELD_OUT) & set(language_words(list(FAMILY_WORDS)))


def _scene_facts(caption: str) -> list[tuple[str, str, str]]:
    return [tuple(part.split()[:3]) for part in caption.split(", ")]


def test_scene_answers_follow_from_the_caption(drawn: dict[tuple[str, str], list[Sample]]) -> None:
    checked: Counter[str] = Counter()
    for sample in drawn["scenes", "train"] + drawn["scenes", "test"]:
        things = _scene_facts(sample.caption)
        pairs = [f"{colour} {shape}" for _, colour, shape in things]
        assert 1 <= len(things) <= 5
        for turn in sample.turns:
            words = turn.question.rstrip("?").split()
            if turn.task == "scene_exists":
                noun = re.sub(r".* (a|an) ", "", turn.question.rstrip("?")).removesuffix(" object").split()
                truth = any(set(noun) <= {colour, shape} for _, colour, shape in things)
                assert turn.answer == ("yes" if truth else "no")
            elif turn.task == "scene_count":
                noun = turn.question.removeprefix("how many ").rstrip("?").removesuffix(" are there")
                key = "cross" if noun == "crosses" else noun.removesuffix(" objects").removesuffix("s")
                number = len(things) if noun == "objects" else sum(key in thing for thing in things)
                assert turn.answer == str(number)
            elif turn.task == "scene_colour":
                assert [colour for _, colour, shape in things if shape == words[-1]] == [turn.answer]
            elif turn.task == "scene_what_at":
                assert turn.answer in pairs
            elif turn.task == "scene_size":
                asked = [
                    thing
                    for thing in things
                    if set(words) & {thing[2]} and (not set(words) & {*COLOURS} or thing[1] in words)
                ]
                assert {size for size, _, _ in asked} == {turn.answer}
            else:
                continue
            checked[turn.task] += 1
    assert len(checked) == 5 and min(checked.values()) > 20


def test_objects_do_not_touch_and_show_their_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[scenes.Thing] = []
    place = scenes._place
    monkeypatch.setattr(scenes, "_place", lambda *args: placed.extend(place(*args)) or list(placed))
    monkeypatch.setattr(scenes, "augment", lambda image, rng, background, boxes: image)
    for seed in range(40):
        placed.clear()
        pixels = np.asarray(render("scenes", seed, "train").image).astype(int)
        for thing in placed:
            assert np.abs(pixels[int(thing.y), int(thing.x)] - COLOURS[thing.colour]).max() <= 10
            assert thing.radius < min(thing.x, thing.y) and max(thing.x, thing.y) < 144 - thing.radius
            for other in placed:
                apart = ((thing.x - other.x) ** 2 + (thing.y - other.y) ** 2) ** 0.5
                assert other is thing or apart > thing.radius + other.radius


def test_boxes_are_around_what_is_asked_about(drawn: dict[tuple[str, str], list[Sample]]) -> None:
    checked: Counter[str] = Counter()
    for samples in drawn.values():
        for sample in samples:
            for turn in sample.turns:
                if not turn.boxes:
                    continue
                checked[turn.task] += 1
                for box in turn.boxes:
                    assert box.left < box.right and box.top < box.bottom
                    # rotated, a corner of what touches the border leaves the image
                    assert box.left > -12 and box.right < sample.image.width + 12
                    assert box.top > -12 and box.bottom < sample.image.height + 12
                written = "".join(
                    glyph.character
                    for box in turn.boxes
                    for glyph in sample.glyphs
                    if box.left <= glyph.x <= box.right and box.top <= glyph.y <= box.bottom
                ).lower()
                if turn.task in ("receipt_price", "receipt_item", "receipt_extreme", "chart_title"):
                    assert turn.answer.replace(" ", "") in written.replace(" ", "")
                if turn.task in ("chart_maximum", "chart_minimum", "chart_find_value") and "pie" not in sample.caption:
                    assert turn.answer in written
                if turn.task in ("scene_colour", "scene_shape", "scene_what_at"):
                    (box,) = turn.boxes
                    pixels = np.asarray(sample.image.convert("RGB")).astype(int)
                    middle = pixels[int((box.top + box.bottom) / 2), int((box.left + box.right) / 2)]
                    border = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0)
                    assert np.abs(middle - border).max() > 20  # the object, not the ground
    assert min(checked.values()) > 10 and len(checked) == 17


def test_chart_answers_follow_from_the_caption(drawn: dict[tuple[str, str], list[Sample]]) -> None:
    checked: Counter[str] = Counter()
    for sample in drawn["charts", "train"]:
        head, body = sample.caption.rstrip(".").split(". ")
        values = {}
        for part in body.split(", "):
            label, *number = part.split()
            values[label] = int(number[0]) if number else -len(values)  # without numbers: largest first
        for turn in sample.turns:
            last = turn.question.rstrip("?").split()[-1]
            if turn.task == "chart_value":
                assert values[last] == int(turn.answer)
            elif turn.task == "chart_find_value":
                assert values[turn.answer] == int(last)
            elif turn.task == "chart_maximum":
                assert turn.answer == max(values, key=values.__getitem__)
            elif turn.task == "chart_minimum":
                assert turn.answer == min(values, key=values.__getitem__)
            elif turn.task == "chart_compare" and turn.answer not in ("yes", "no"):
                assert values[turn.answer] == max(
                    values[label] for label in re.findall(r"(\w+)(?: or |\?)", turn.question)
                )
            elif turn.task == "chart_compare":
                first = turn.question.split()[1]
                assert turn.answer == ("yes" if values[first] > values[last] else "no")
            elif turn.task == "chart_title":
                assert head.endswith(f"titled {turn.answer}")
            elif turn.task == "chart_count":
                assert turn.answer == str(len(values))
            elif turn.task == "chart_trend":
                assert list(values.values()) == sorted(values.values(), reverse=turn.answer == "down")
            elif turn.task == "chart_kind":
                assert head.startswith(turn.answer)
            checked[turn.task] += 1
    assert set(checked) == set(TASKS["charts"]) - {"chart_absent"}


def test_text_answers_follow_from_the_caption(drawn: dict[tuple[str, str], list[Sample]]) -> None:
    ordinals = {"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1}
    checked: Counter[str] = Counter()
    for sample in drawn["text", "train"] + drawn["text", "test"]:
        kind, body = sample.caption.rstrip(".").split(": ", 1)
        parts = body.split(", ")
        for turn in sample.turns:
            words = re.findall(r"\w+", turn.question)
            if turn.task == "text_read_line":
                (place,) = (ordinals[word] for word in words if word in ordinals)
                assert turn.answer == parts[place]
            elif turn.task == "text_read_word":
                assert parts == [turn.answer]
            elif turn.task == "text_find":
                asked = words[3]  # "is the word X shown", "does it say X"
                shown = [part.split()[0] for part in parts]
                assert turn.answer == ("yes" if asked in shown else "no")
            elif turn.task.startswith("receipt"):
                prices = {name: int(price) for name, price in (part.split() for part in parts)}
                assert len(set(prices.values())) == len(prices)
                named = [prices[word] for word in words if word in prices]
                if turn.task in ("receipt_price", "receipt_total"):
                    assert int(turn.answer) == sum(named) <= 20
                elif turn.task == "receipt_item":
                    assert prices[turn.answer] == int(words[-1])
                elif turn.task == "receipt_extreme":
                    assert prices[turn.answer] == (min if "cheapest" in words else max)(prices.values())
            elif turn.task in ("table_cell", "table_compare"):
                columns, rest = sample.caption.removeprefix("table with columns ").split(". ", 1)
                rows = {row[4]: row[7:].split(", ") for row in rest.rstrip(".").split(". ")}
                row = words[words.index("row") + 1]
                cells = dict(zip(columns.split(", "), rows[row], strict=True))
                if turn.task == "table_cell":
                    assert turn.answer == cells[words[-1]]
                else:
                    assert int(cells[turn.answer]) == max(int(cells[words[-3]]), int(cells[words[-1]]))
            checked[turn.task] += 1
    assert set(checked) == set(TASKS["text"]) - {"text_absent"}


def test_photo_answers_follow_from_the_caption(drawn: dict[tuple[str, str], list[Sample]]) -> None:
    sides = Counter()
    for sample in drawn["photos", "train"]:
        names = re.findall("|".join(CLASS_NAMES), sample.caption)
        sides[len(names)] += 1
        for turn in sample.turns:
            asked = re.findall("|".join(CLASS_NAMES), turn.question)
            if turn.task == "mosaic_count":
                assert turn.answer == str(names.count(asked[0]))
            elif turn.task in ("mosaic_exists", "photo_is"):
                assert turn.answer == ("yes" if asked[0] in names else "no")
            elif turn.task == "mosaic_cell" and len(names) == 4:
                row, column = ("bottom" in turn.question), ("right" in turn.question)
                assert turn.answer == names[2 * row + column]
            elif turn.task in ("photo_name", "photo_choice"):
                assert names == [turn.answer]
    assert set(sides) == {1, 4, 9} and sides[1] > sides[4] > sides[9]


def test_dataset_items_are_chat_messages(photos: Photographs) -> None:
    items = SyntheticDataset("train", 12, seed=1, weights={"scenes": 1, "photos": 1}, turns=3, photos=photos)
    assert {items[index]["family"] for index in range(len(items))} == {"scenes", "photos"}
    item = items[4]
    assert len(item["images"]) == 1 and len(item["messages"]) == 2 * len(item["answers"]) == 6
    assert [message["role"] for message in item["messages"]] == ["user", "assistant"] * 3
    kinds = [[part["type"] for part in message["content"]] for message in item["messages"]]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"], ["text"], ["text"]]
    assert [message["content"][-1]["text"] for message in item["messages"][1::2]] == item["answers"]
    with pytest.raises(IndexError):
        items[12]


def test_a_task_is_asked_less_where_its_share_says_so(photos: Photographs) -> None:
    shares = {"chart_kind": 0.0, "chart_value": 0.5}

    def tasks_of(**options: Any) -> list[list[str]]:
        items = SyntheticDataset("train", 60, seed=4, weights={"charts": 1}, turns=5, photos=photos, **options)
        return [items[index]["tasks"] for index in range(60)]

    plain, fewer = tasks_of(), tasks_of(question_shares=shares)
    assert tasks_of(question_shares={}) == plain != fewer == tasks_of(question_shares=shares)
    count = {name: (sum(plain, []).count(name), sum(fewer, []).count(name)) for name in CHART_TASKS}
    assert count["chart_kind"][0] > 5 and count["chart_kind"][1] == 0
    assert count["chart_compare"][1] > count["chart_compare"][0]  # takes the place
    assert max(map(len, fewer)) == 5 and sum(map(len, fewer)) > 0.95 * sum(map(len, plain))
    assert all(tasks_of(question_shares=dict.fromkeys(CHART_TASKS, 0.0)))  # one question at least


def test_a_pickled_dataset_gives_the_same_items(photos: Photographs) -> None:
    items = SyntheticDataset("test", 8, seed=2, photos=photos)
    before = [items[index] for index in range(8)]
    data = pickle.dumps(items)
    assert len(data) < 2000  # the photographs stay out
    for index, old in enumerate(before):
        new = pickle.loads(data)[index]
        assert new["images"][0].tobytes() == old["images"][0].tobytes()
        assert new["messages"] == old["messages"]


def test_photographs_read_the_layout_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _encoded_photos("test")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))},
    )
    table = {"img": [{"bytes": data, "path": None} for data, _ in rows], "label": [label for _, label in rows]}
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict(table, features)

    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    photos = Photographs()
    assert photos.load("test", 5)[1] == CLASS_NAMES[5 // PER_CLASS]
    assert asked == [("uoft-cs/cifar10", "test")]


@pytest.mark.skipif(not os.environ.get(DIRECTORY_VARIABLE), reason=f"{DIRECTORY_VARIABLE} is not set")
def test_photographs_read_cifar10() -> None:
    photos = Photographs()
    assert (photos.count("train"), photos.count("test")) == (50_000, 10_000)
    image, name = photos.load("test", 9_999)
    assert (image.size, image.mode) == ((32, 32), "RGB") and name in CLASS_NAMES


def test_wrong_arguments_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'sceens' is unknown; use one of scenes, charts, text, photos"):
        render("sceens", 0, "train")
    with pytest.raises(ValueError, match="split is 'valid'"):
        SyntheticDataset("valid", 1)
    with pytest.raises(ValueError, match="positive weight"):
        SyntheticDataset("train", 1, weights={"scenes": 0})
    with pytest.raises(ValueError, match="names the task 'chart_colour'; the tasks are scene_exists"):
        SyntheticDataset("train", 1, question_shares={"chart_colour": 0.5})
    with pytest.raises(ValueError, match=r"question_shares\['chart_kind'\] is 2; it must be between 0 and 1"):
        SyntheticDataset("train", 1, question_shares={"chart_kind": 2})
    with pytest.raises(ValueError, match=r"train\.parquet does not exist"):
        Photographs(tmp_path).count("train")
    monkeypatch.setitem(fonts.FACES, "absent", ("no_such_package", "files/a.ttf"))
    with pytest.raises(ValueError, match=re.escape("pip install 'flashsloth[train]'")):
        fonts.font_path("absent")


def test_scoring_ignores_case_blanks_and_full_stop() -> None:
    assert exact_match(" Top  left. ", "top left")
    assert not exact_match("top", "top left")


def test_tokenizer_spells_what_is_read_and_keeps_the_language_whole(
    drawn: dict[tuple[str, str], list[Sample]],
) -> None:
    tokenizer = train_tokenizer()
    assert len(tokenizer) <= DEFAULT_SIZE
    assert tokenizer.get_vocab() == train_tokenizer().get_vocab()
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "</s>"
    assert [tokenizer.convert_ids_to_tokens(tokenizer(token).input_ids) for token in SPECIAL_TOKENS] == [
        [token] for token in SPECIAL_TOKENS
    ]
    for word in HELD_OUT_WORDS + TRAIN_WORDS[::20]:
        assert len(tokenizer(word).input_ids) == len(word)
    assert tokenizer.tokenize("What color is 305?") == ["what", "Ġcolor", "Ġis", "Ġ", "3", "0", "5", "?"]
    language = set(language_words())
    for (family, _), samples in drawn.items():
        for sample in samples:
            for turn in sample.turns:
                text = f"{turn.question} {turn.answer}"
                assert tokenizer.decode(tokenizer(text).input_ids) == text
                if family in ("scenes", "photos"):
                    unknown = set(re.findall(r"[a-z]+", f"{text} {sample.caption}")) - language
                    assert not unknown, unknown
    with pytest.raises(ValueError, match="size 300 is too small"):
        train_tokenizer(300)

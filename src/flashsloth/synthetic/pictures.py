"""Pictures of things and flags: what is it, of what kind, is there one, where, how many, what is beside it."""

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from . import picture_layouts as layouts
from .augment import augment
from .picture_layouts import Arrangement, Shown, Subject
from .sample import Sample, Turn, TurnMaker, choose_turns, phrase, yes_no
from .sprites import (
    FLAG_STYLES,
    ONE_COLOUR,
    STYLE_WEIGHTS,
    TEST_STYLE,
    Country,
    Named,
    countries,
    flag_key,
    flags_of,
    pictures_folder,
    sprite,
    thing_sprite,
    things_of,
    vocabulary,
)

LAYOUT_WEIGHTS = {"alone": 5, "scattered": 3, "gridded": 4, "page": 2}
FLAG_SHARE = 0.12
# kinds that are asked for; everything else is an object of no particular kind
KINDS = (
    "animal", "plant", "food", "drink", "vehicle", "building", "clothing", "sport", "instrument", "tool", "face",
    "sign", "person", "furniture", "toy", "weather",
)  # fmt: skip
MIRRORED_KINDS = frozenset({"animal", "plant", "food", "vehicle", "clothing", "furniture", "person", "instrument"})
BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows, columns) to go
NONE = "none"
ABSENT_SHARE = 0.45  # of images, those with one question whose answer is none


def _thing_subject(thing: Named, style: str) -> Subject:
    def draw(rng: random.Random, size: float) -> Image.Image:
        return thing_sprite(rng, thing, style, size)

    turned = 4 if thing.kind == "sign" else 10
    mirrored = thing.kind in MIRRORED_KINDS
    return Subject(thing.name, thing.noun, thing.like, draw, style in ONE_COLOUR, mirrored, turned)


def _flag_subject(country: Country, style: str) -> Subject:
    def draw(rng: random.Random, size: float) -> Image.Image:
        return sprite(style, flag_key(country, style), size)

    return Subject(country.name, f"the flag of {country.name}", country.name, draw, turned=3)


@lru_cache(maxsize=32)
def _pool(folder: Path, style: str, flags: bool) -> tuple[Subject, ...]:
    """Everything of a style that can be shown."""
    if flags:
        return tuple(_flag_subject(country, style) for country in flags_of(folder, style))
    return tuple(_thing_subject(thing, style) for thing in things_of(folder, style))


@lru_cache(maxsize=1)
def _kinds() -> dict[str, str]:
    return {thing.name: thing.kind for thing in vocabulary() if thing.kind in KINDS}


class _Questions:
    """Question makers over one arrangement.

    Args:
        pool: everything of that style, shown or not.
        flags: whether flags are shown.
    """

    def __init__(
        self, found: Arrangement, pool: Sequence[Subject], flags: bool, test: bool, rng: random.Random
    ) -> None:
        self.found, self.flags, self.test = found, flags, test
        self.shown = found.shown
        self.names = [shown.subject.name for shown in self.shown]
        likes = {shown.subject.like for shown in self.shown}
        self.others = [subject for subject in pool if subject.like not in likes]
        # a noun is asked for once, so that no answer prevails
        present = list({shown.subject.noun: None for shown in self.shown})
        self.left = {True: present, False: [subject.noun for subject in rng.sample(self.others, len(present))]}
        rng.shuffle(present)
        self.absent_left = rng.random() < ABSENT_SHARE

    def absent(self, make: TurnMaker) -> TurnMaker:
        """A maker of a question whose answer is none, for at most one of them an image."""

        def once(rng: random.Random) -> Turn | None:
            turn = make(rng) if self.absent_left else None
            self.absent_left = self.absent_left and turn is None
            return turn

        return once

    def kept(self, *wordings: str) -> tuple[str, ...]:
        return wordings if self.test else ()

    def lone(self) -> list[int]:
        """What is shown once, and nothing else of its like is."""
        likes = [shown.subject.like for shown in self.shown]
        return [index for index, like in enumerate(likes) if likes.count(like) == 1]

    def name(self, rng: random.Random) -> Turn:
        if self.flags:
            whose = ("which country is this?", "whose flag is this?", "which country has this flag?")
            return phrase(rng, "picture_flag", whose, self.names[0], self.kept("what country is it?"))
        questions = ("what is it?", "what is this?", "what is in the picture?", "what does the picture show?")
        kept = self.kept("what can you see here?", "which thing is shown?")
        return phrase(rng, "picture_name", questions, self.names[0], kept)

    def choice(self, rng: random.Random) -> Turn:
        nouns = [subject.noun for subject in rng.sample(self.others, 3)] + [self.shown[0].subject.noun]
        rng.shuffle(nouns)
        either = f"{', '.join(nouns[:3])} or {nouns[3]}"
        questions = (f"is it {either}?", f"is this {either}?", f"which one is shown, {either}?")
        turn = phrase(rng, "picture_choice", questions, self.names[0], self.kept(f"what do you see, {either}?"))
        return Turn(turn.task, turn.question, turn.answer, "choice", turn.kept_wording)

    def exists(self, rng: random.Random) -> Turn | None:
        if not (self.left[True] and self.left[False]):
            return None
        truth = rng.random() < 0.5
        noun = self.left[truth].pop()
        questions = (f"do you see {noun}?", f"can you see {noun}?", f"does it show {noun}?")
        return phrase(rng, "picture_exists", questions, yes_no(truth), self.kept(f"is {noun} shown?"))

    def _where(self, rng: random.Random, noun: str, task: str, answer: str) -> Turn:
        the = noun if noun.startswith("the ") else f"the {noun.removeprefix('an ').removeprefix('a ')}"
        verb = "is" if the != f"the {noun}" or self.flags else "do you see"
        questions = (f"where {verb} {the}?", f"at which place {verb} {the}?", f"in what part {verb} {the}?")
        return phrase(rng, task, questions, answer, self.kept(f"what is the position of {the}?"))

    def where(self, rng: random.Random) -> Turn | None:
        placed = [index for index in self.lone() if self.shown[index].place]
        if not placed:
            return None
        shown = self.shown[rng.choice(placed)]
        return self._where(rng, shown.subject.noun, "picture_where", shown.place)

    def where_absent(self, rng: random.Random) -> Turn:
        return self._where(rng, rng.choice(self.others).noun, "picture_absent", NONE)

    def _at(self, rng: random.Random, place: str, task: str, answer: str) -> Turn:
        at = "in the center" if place == "center" else f"at the {place}"
        noun = "which flag is" if self.flags else "what is"
        questions = (f"{noun} {at}?", f"{noun} shown {at}?", f"{at}, {noun} it?")
        return phrase(rng, task, questions, answer, self.kept(f"{noun} there {at}?"))

    def at(self, rng: random.Random) -> Turn | None:
        placed = [shown for shown in self.shown if shown.place]
        if not placed:
            return None
        shown = rng.choice(placed)
        if [other.place for other in placed].count(shown.place) > 1:
            return None
        return self._at(rng, shown.place, "picture_at", shown.subject.name)

    def at_absent(self, rng: random.Random) -> Turn | None:
        if self.found.shape != (0, 0) or self.found.word or self.found.lines:
            return None
        width, height = self.found.image.size
        row, column = rng.randrange(3), rng.randrange(3)
        x, y = (column + 0.5) * width / 3, (row + 0.5) * height / 3
        for shown in self.shown:  # clear of the whole ninth
            if abs(shown.x - x) < shown.width / 2 + width / 6 and abs(shown.y - y) < shown.height / 2 + height / 6:
                return None
        return self._at(rng, layouts.place_of(row, column, 3, 3), "picture_absent", NONE)

    def count(self, rng: random.Random) -> Turn | None:
        if rng.random() < 0.25:
            noun = "flags" if self.flags else "pictures"
            questions = (f"how many {noun} are there?", f"how many {noun} do you see?", f"count the {noun}.")
            kept = self.kept(f"what is the number of {noun}?")
            return phrase(rng, "picture_count", questions, str(len(self.shown)), kept)
        groups: dict[int, list[Subject]] = {0: rng.sample(self.others, 2)}
        for index, shown in enumerate(self.shown):
            likes = {other.subject.name for other in self.shown if other.subject.like == shown.subject.like}
            if len(likes) == 1:
                groups.setdefault(self.names.count(self.names[index]), []).append(shown.subject)
        number = rng.choices(list(groups), [0.4 if number < 2 else 2.0 for number in groups])[0]
        noun = rng.choice(groups[number]).noun
        questions = (
            f"how many times do you see {noun}?",
            f"how many pictures show {noun}?",
            f"how many are {noun}?",
        )
        return phrase(rng, "picture_count", questions, str(number), self.kept(f"how many times is {noun} shown?"))

    def _beside(self, rng: random.Random, side: str, noun: str, task: str, answer: str) -> Turn:
        the = noun if self.flags else f"the {noun.removeprefix('an ').removeprefix('a ')}"
        first = "which flag is" if self.flags else "what is"
        questions = (f"{first} {side} {the}?", f"{first} just {side} {the}?", f"{side} {the}, {first} it?")
        return phrase(rng, task, questions, answer, self.kept(f"{first} the one {side} {the}?"))

    def _neighbour(self, index: int, side: str) -> Shown | None:
        down, right = BESIDE[side]
        rows, columns = self.found.shape
        if rows:
            row, column = index // columns + down, index % columns + right
            inside = 0 <= row < rows and 0 <= column < columns
            return self.shown[row * columns + column] if inside else None
        other, this = self.shown[1 - index], self.shown[index]
        room_x, room_y = (this.width + other.width) / 2, (this.height + other.height) / 2
        away = (other.x - this.x) * right > room_x or (other.y - this.y) * down > room_y
        return other if away else None

    def beside(self, rng: random.Random) -> Turn | None:
        lone = self.lone()
        if len(self.shown) < 2 or not lone or (not self.found.shape[0] and len(self.shown) > 2):
            return None
        index, side = rng.choice(lone), rng.choice(list(BESIDE))
        neighbour = self._neighbour(index, side)
        noun = self.shown[index].subject.noun
        if neighbour is None:
            return None
        return self._beside(rng, side, noun, "picture_beside", neighbour.subject.name)

    def beside_absent(self, rng: random.Random) -> Turn | None:
        """Beside what is not shown, or, in a grid, where it ends; two scattered pictures may stand askew."""
        side, lone = rng.choice(list(BESIDE)), self.lone()
        noun = rng.choice(self.others).noun
        if self.found.shape[0] and lone and rng.random() < 0.5:
            index = rng.choice(lone)
            noun = self.shown[index].subject.noun
            if self._neighbour(index, side) is not None:
                return None
        return self._beside(rng, side, noun, "picture_absent", NONE)

    def read(self, rng: random.Random) -> Turn | None:
        if not self.found.word:
            return None
        return self._read(rng, "picture_read", self.found.word)

    def read_absent(self, rng: random.Random) -> Turn | None:
        return None if self.found.word or self.found.lines else self._read(rng, "picture_absent", NONE)

    def _read(self, rng: random.Random, task: str, answer: str) -> Turn:
        questions = ("what word is written?", "which word do you read?", "what does the text say?")
        return phrase(rng, task, questions, answer, self.kept("what is written there?"))

    def makers(self, kinds: dict[str, str]) -> list[tuple[float, TurnMaker]]:
        """Weighted makers of everything that can be asked.

        Args:
            kinds: the kind of every name, of those kinds that are asked for.
        """
        makers: list[tuple[float, TurnMaker]] = [(1.2, self.exists), (1.5, self.read)]
        absent = [(0.9, self.where_absent), (0.3, self.read_absent), (0.7, self.at_absent)]
        if len(self.shown) > 1:
            makers += [(2.0, self.at), (1.2, self.where), (1.2, self.count), (1.4, self.beside)]
            absent.append((1.2, self.beside_absent))
        else:
            makers += [(4.0, self.name), (0.8, self.choice), (0.7, self.where)]
        if len(self.shown) == 1 and self.names[0] in kinds:
            makers.append((0.8, _kind_maker(kinds[self.names[0]], self.test)))
        return makers + [(weight, self.absent(make)) for weight, make in absent]


def _kind_maker(kind: str, test: bool) -> TurnMaker:
    def make(rng: random.Random) -> Turn:
        if rng.random() < 0.6:
            questions = ("what kind of thing is it?", "what type of thing is this?", "of what kind is it?")
            kept = ("what kind of thing can you see?",) if test else ()
            return phrase(rng, "picture_kind", questions, kind, kept)
        pair = [kind, rng.choice([other for other in KINDS if other != kind])]
        rng.shuffle(pair)
        question = f"what kind is it, {pair[0]} or {pair[1]}?"
        return Turn("picture_kind", question, kind, "what kind of thing is it?")

    return make


def _choose_subjects(rng: random.Random, pool: Sequence[Subject], count: int) -> list[Subject]:
    """Some of a pool, often with repeats, which counting needs; no two that only look alike."""
    if count > 2 and rng.random() < 0.5:
        few = _choose_subjects(rng, pool, 2) if count < 5 else _choose_subjects(rng, pool, rng.choice((2, 4)))
        return [rng.choice(few) for _ in range(count)]
    chosen: dict[str, Subject] = {}
    while len(chosen) < count:
        subject = rng.choice(pool)
        chosen.setdefault(subject.like, subject)
    return list(chosen.values())


def _describe(found: Arrangement, flags: bool) -> str:
    nouns = [shown.subject.noun for shown in found.shown]
    rows, columns = found.shape
    if rows:
        names = [shown.subject.name for shown in found.shown]
        lines = [", ".join(names[start : start + columns]) for start in range(0, rows * columns, columns)]
        text = f"{len(names)} {'flags' if flags else 'pictures'}: {'; '.join(lines)}."
    else:
        places = [
            f" {'in' if shown.place == 'center' else 'at'} the {shown.place}" if shown.place else ""
            for shown in found.shown
        ]
        text = f"{', '.join(noun + place for noun, place in zip(nouns, places, strict=True))}."
    written = [found.word] if found.word else found.lines
    return f"{text} text: {', '.join(written)}." if written else text


def _render(rng: random.Random, test: bool, image_size: int, turns: int, unseen: bool) -> Sample:
    flags = rng.random() < FLAG_SHARE
    if unseen:
        style = TEST_STYLE
    else:
        style = rng.choice(FLAG_STYLES) if flags else rng.choices(list(STYLE_WEIGHTS), list(STYLE_WEIGHTS.values()))[0]
    pool = _pool(pictures_folder(), style, flags)
    layout = rng.choices(list(LAYOUT_WEIGHTS), list(LAYOUT_WEIGHTS.values()))[0]
    if layout == "gridded":
        shape = layouts.grid_shape(rng)
        subjects = _choose_subjects(rng, pool, shape[0] * shape[1])
        found = layouts.gridded(rng, test, image_size, subjects, shape)
    elif layout == "scattered":
        found = layouts.scattered(rng, test, image_size, _choose_subjects(rng, pool, rng.choice((2, 2, 3, 4))))
    elif layout == "page":
        names = [subject.name for subject in rng.sample(pool, 8) if " " not in subject.name]
        subjects = [rng.choice(pool)]
        found = layouts.page(rng, test, image_size, subjects, names or [subjects[0].name])
    else:
        found = layouts.alone(rng, test, image_size, [rng.choice(pool)])
    chosen = choose_turns(rng, _Questions(found, pool, flags, test, rng).makers({} if flags else _kinds()), turns)
    image = augment(found.image, rng, found.edge, found.glyphs)
    family = "twemoji_pictures" if unseen else "pictures"
    return Sample(image, family, _describe(found, flags), chosen, found.held_out or unseen, found.glyphs)


def render_picture(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws pictures or flags of the training styles; half of the test's grounds are patterns kept for it."""
    return _render(rng, test, image_size, turns, False)


def render_twemoji_picture(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """The same in a style that training never shows; ValueError in the training split."""
    if not test:
        raise ValueError("twemoji_pictures is kept for the test; use split 'test', or the family pictures.")
    return _render(rng, test, image_size, turns, True)


PICTURE_TASKS = (
    "picture_name", "picture_flag", "picture_kind", "picture_choice", "picture_exists", "picture_where", "picture_at",
    "picture_beside", "picture_count", "picture_read", "picture_absent",
)  # fmt: skip
_LANGUAGE = """
what which where how who is it this that do does did can you see in the at of on to a an or and there just times count
picture pictures show shows shown flag flags whose country has place part position thing kind type none yes no number
left right top bottom center above below here word written read text say one many are
"""
PICTURE_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *_LANGUAGE.split(),
            *KINDS,
            *(word for thing in vocabulary() for word in thing.name.split()),
            *(word for country in countries() for word in country.name.split()),
        ]
    )
)

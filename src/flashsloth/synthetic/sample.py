"""What every renderer returns, and the helpers they share."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

from PIL import Image

Split = Literal["train", "test"]
SPLIT_IDS: dict[str, int] = {"train": 0, "test": 1}
REFERENCE_SIZE = 144  # every length in the renderers is given for a canvas of this many pixels

Item = TypeVar("Item")


class Box(NamedTuple):
    """A rectangle with its sides in pixels from the left and upper side of the image."""

    left: float
    top: float
    right: float
    bottom: float


def around(boxes: Iterable[Box]) -> Box:
    """The smallest box that holds all of at least one."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return Box(min(lefts), min(tops), max(rights), max(bottoms))


@dataclass(frozen=True)
class Turn:
    """One question about an image; `answer` is lower case and at most three words."""

    task: str
    question: str
    answer: str
    meaning: str = field(default="", repr=False, compare=False)  # the same for all wordings of a question
    kept_wording: bool = field(default=False, repr=False, compare=False)  # never asked like this in training
    boxes: tuple[Box, ...] = field(default=(), repr=False, compare=False)  # what it asks about, where that is known


@dataclass(frozen=True)
class Glyph:
    """A written character and where its middle stands, in pixels from the upper left corner."""

    character: str
    x: float
    y: float


@dataclass
class Sample:
    """One image with its dense caption and its questions.

    `held_out` tells that the image shows a combination which never occurs in the training split; `glyphs` is every
    character written on it; `absent` are questions about what is not on it, asked where a data set wants them.
    """

    image: Image.Image
    family: str
    caption: str
    turns: list[Turn] = field(default_factory=list)
    held_out: bool = False
    glyphs: list[Glyph] = field(default_factory=list, repr=False)
    absent: list[Turn] = field(default_factory=list, repr=False)


TurnMaker = Callable[[random.Random], Turn | None]


def split_id(split: str) -> int:
    """The number of a split; ValueError for any other name."""
    if split not in SPLIT_IDS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLIT_IDS)}.")
    return SPLIT_IDS[split]


def make_generator(split: str, *keys: int) -> random.Random:
    """A generator whose stream depends on the split and on every key."""
    # a text seed is hashed with SHA-512, the same on every machine and twenty times quicker than a SeedSequence
    return random.Random(f"{split_id(split)}/{'/'.join(map(str, keys))}")


def choose_turns(rng: random.Random, makers: Sequence[tuple[float, TurnMaker]], turns: int) -> list[Turn]:
    """Draws up to `turns` turns of different meaning; a maker that was used becomes half as likely.

    Args:
        makers: (weight, maker) pairs; a maker returns None where its question does not apply to the image.
    """
    weights = [weight for weight, _ in makers]
    chosen: dict[str, Turn] = {}
    for _ in range(12 * turns):
        if len(chosen) == turns or not any(weights):
            break
        index = rng.choices(range(len(makers)), weights)[0]
        turn = makers[index][1](rng)
        meaning = "" if turn is None else turn.meaning or turn.question
        if turn is None or meaning in chosen:
            weights[index] *= 0.7
            continue
        chosen[meaning] = turn
        weights[index] *= 0.5
    return list(chosen.values())


def phrase(
    rng: random.Random,
    task: str,
    questions: Sequence[str],
    answer: str,
    kept_for_test: Sequence[str] = (),
    boxes: Iterable[Box] = (),
) -> Turn:
    """A turn with one of several wordings.

    Args:
        questions: wordings of the same question.
        kept_for_test: further ones, which half of the questions take; give them in the test split only.
        boxes: of the turn.
    """
    kept = bool(kept_for_test) and rng.random() < 0.5
    return Turn(task, rng.choice(kept_for_test if kept else questions), answer, questions[0], kept, tuple(boxes))


NOTHING = "none"  # the answer to a question about what is not there
ABSENT_TURNS = 3


def choose_absent(rng: random.Random, task: str, questions: Sequence[Sequence[str]]) -> list[Turn]:
    """Up to three questions about what is not there; each is given in all its wordings."""
    chosen = rng.sample(list(questions), min(len(questions), ABSENT_TURNS))
    return [phrase(rng, task, wordings, NOTHING) for wordings in chosen]


def yes_no(truth: bool) -> str:
    """`yes` or `no`."""
    return "yes" if truth else "no"


def yes_no_maker(
    rng: random.Random, task: str, wordings: Sequence[str], present: Iterable[str], absent: Iterable[str]
) -> TurnMaker:
    """A maker of yes/no turns about nouns, each asked once.

    The coin is tossed only while both kinds are left: dropping a second `yes` afterwards would leave too many `no`.

    Args:
        wordings: questions with `{}` for the noun.
        present: nouns whose answer is yes.
        absent: nouns whose answer is no.
    """
    left = {True: list(present), False: list(absent)}
    for nouns in left.values():
        rng.shuffle(nouns)

    def make(rng: random.Random) -> Turn | None:
        if not (left[True] and left[False]):
            return None
        truth = rng.random() < 0.5
        noun = left[truth].pop()
        return phrase(rng, task, [wording.format(noun) for wording in wordings], yes_no(truth))

    return make


def with_article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

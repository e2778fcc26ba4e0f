"""Named colours that stay apart after augmentation, and backgrounds that keep them visible."""

import random
from collections.abc import Iterable

RGB = tuple[int, int, int]
MIN_DISTANCE = 110  # between a mark and its ground, Euclidean in RGB

COLOURS: dict[str, RGB] = {
    "red": (218, 32, 36),
    "orange": (250, 132, 12),
    "yellow": (248, 222, 40),
    "green": (34, 152, 56),
    "blue": (36, 84, 220),
    "purple": (138, 44, 168),
    "black": (18, 18, 18),
    "white": (252, 252, 252),
}

_LIGHT: tuple[RGB, ...] = (
    (255, 255, 255), (244, 244, 240), (250, 244, 228), (228, 236, 244),
    (232, 242, 230), (214, 216, 220), (242, 226, 230),
)  # fmt: skip
_MIDDLE: tuple[RGB, ...] = ((176, 178, 182), (162, 170, 178), (182, 176, 164))
_DARK: tuple[RGB, ...] = ((52, 56, 64), (40, 44, 48), (64, 60, 56), (36, 40, 46))
BACKGROUNDS = _LIGHT + _MIDDLE + _DARK


def jitter(rng: random.Random, colour: RGB, amount: int) -> RGB:
    """The colour with every channel moved by up to `amount` grey levels."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return red, green, blue


def luminance(colour: RGB) -> float:
    """Perceived brightness in grey levels (ITU-R BT.601 weights)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def distance(first: RGB, second: RGB) -> float:
    """Euclidean distance in RGB."""
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5


_FITTING = {
    name: frozenset(ground for ground in BACKGROUNDS if distance(ground, colour) > MIN_DISTANCE)
    for name, colour in COLOURS.items()
}


def choose_background(rng: random.Random, names: Iterable[str]) -> RGB:
    """A background on which all the named colours stand out; light ones are twice as likely."""
    fitting = frozenset(BACKGROUNDS).intersection(*(_FITTING[name] for name in names))
    candidates = [ground for ground in BACKGROUNDS + _LIGHT if ground in fitting]
    return jitter(rng, rng.choice(candidates or list(_MIDDLE)), 4)


def choose_ink(rng: random.Random) -> tuple[RGB, RGB]:
    """(ink, paper) with a luminance difference of at least 110 grey levels."""
    if rng.random() < 0.7:
        paper = jitter(rng, rng.choice(_LIGHT + _LIGHT + _MIDDLE), 6)
        ink = (rng.randint(0, 70), rng.randint(0, 60), rng.randint(0, 90))
        return (ink, paper) if luminance(paper) - luminance(ink) >= 110 else ((10, 10, 10), paper)
    paper = jitter(rng, rng.choice((*_DARK, (150, 20, 24), (16, 76, 160), (20, 96, 48), (90, 30, 110))), 6)
    return (rng.randint(225, 255), rng.randint(225, 255), rng.randint(200, 255)), paper

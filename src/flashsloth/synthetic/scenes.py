"""Scenes of coloured shapes: existence, colour, shape, size, count, position, comparison and relation."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .augment import augment
from .colours import COLOURS, choose_background, jitter
from .sample import (
    REFERENCE_SIZE,
    Box,
    Sample,
    Turn,
    choose_absent,
    choose_turns,
    phrase,
    with_article,
    yes_no,
    yes_no_maker,
)

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
# (colour, shape) pairs that only the test split shows or names
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"), ("orange", "circle"), ("yellow", "cross"), ("green", "triangle"),
        ("blue", "diamond"), ("purple", "square"), ("black", "circle"), ("white", "star"),
    }
)  # fmt: skip
HELD_OUT_SHARE = 1 / 3
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
TRAIN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)

COUNT_WEIGHTS = {1: 2, 2: 4, 3: 5, 4: 5, 5: 4}
RADII = {"large": (22, 26), "small": (11, 14)}
MARGIN = 4  # from an object to the border
GAP = 7  # between two objects
MIN_OFFSET = 22  # between the centres of two objects whose positions are compared
MIDLINE_OFFSET = 17  # from a midline to the centre of an object whose half is asked
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Thing:
    """One object; centre and radius in pixels of the reference canvas."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def place_name(x: float, y: float, extent: float = REFERENCE_SIZE) -> str:
    """The ninth of the canvas in words: `top left`, `top`, ..., `center`, ..., `bottom right`."""
    row = ("top", "", "bottom")[min(2, int(3 * y / extent))]
    column = ("left", "", "right")[min(2, int(3 * x / extent))]
    return f"{row} {column}".strip() or "center"


def _polygon(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "square":
        half = radius * 0.86
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)]
    if shape == "diamond":
        return [(x, y - radius), (x + radius * 0.72, y), (x, y + radius), (x - radius * 0.72, y)]
    if shape == "star":
        corners = []
        for corner in range(10):
            length = radius * (1.08 if corner % 2 == 0 else 0.46)
            angle = math.pi * (corner / 5 - 0.5)
            corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
        return corners
    arm, end = radius * 0.34, radius * 0.96
    return [
        (x - arm, y - end), (x + arm, y - end), (x + arm, y - arm), (x + end, y - arm),
        (x + end, y + arm), (x + arm, y + arm), (x + arm, y + end), (x - arm, y + end),
        (x - arm, y + arm), (x - end, y + arm), (x - end, y - arm), (x - arm, y - arm),
    ]  # fmt: skip


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    """Draws one filled shape around a centre, all in pixels of the target."""
    if shape == "circle":
        draw.ellipse((x - radius * 0.95, y - radius * 0.95, x + radius * 0.95, y + radius * 0.95), fill=fill)
    else:
        draw.polygon(_polygon(shape, x, y, radius), fill=fill)


def _choose_pairs(rng: random.Random, count: int, test: bool) -> list[tuple[str, str]]:
    """(colour, shape) of every object; small pools make repeats, which counting needs."""
    shapes = rng.sample(SHAPES, rng.randint(1, 2) if rng.random() < 0.35 else min(len(SHAPES), count + 1))
    # no background suits black, white and everything between
    unused = rng.choice(("black", "white"))
    palette = [colour for colour in COLOURS if colour != unused]
    colours = rng.sample(palette, rng.randint(1, 2) if rng.random() < 0.35 else min(len(palette), count + 1))
    pool = [pair for pair in TRAIN_PAIRS if pair[0] in colours and pair[1] in shapes]
    if not pool:
        pool = [pair for pair in TRAIN_PAIRS if pair[0] in palette]
    pairs = [rng.choice(pool) for _ in range(count)]
    if test and rng.random() < HELD_OUT_SHARE:
        pairs[rng.randrange(count)] = rng.choice([pair for pair in sorted(HELD_OUT_PAIRS) if pair[0] in palette])
    return pairs


def _place(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> list[Thing]:
    things: list[Thing] = []
    large_left = {1: 1, 2: 2, 3: 2, 4: 2}.get(len(pairs), 1)
    for colour, shape in pairs:
        size = "large" if large_left and rng.random() < 0.5 else "small"
        for attempt in range(60):
            if attempt == 30:
                size = "small"
            radius = rng.uniform(*RADII[size])
            low, high = radius + MARGIN, REFERENCE_SIZE - radius - MARGIN
            x, y = rng.uniform(low, high), rng.uniform(low, high)
            if all(math.hypot(x - other.x, y - other.y) > radius + other.radius + GAP for other in things):
                things.append(Thing(shape, colour, size, x, y, radius))
                large_left -= size == "large"
                break
    return things


class _Questions:
    """Question makers over one scene."""

    def __init__(self, rng: random.Random, things: Sequence[Thing], boxes: Sequence[Box], test: bool) -> None:
        self.things = things
        self.boxes = dict(zip(things, boxes, strict=True))
        self.by_shape = {shape: [thing for thing in things if thing.shape == shape] for shape in SHAPES}
        self.by_colour = {colour: [thing for thing in things if thing.colour == colour] for colour in COLOURS}
        self.lone_shapes = [found[0] for found in self.by_shape.values() if len(found) == 1]
        self.lone_colours = [found[0] for found in self.by_colour.values() if len(found) == 1]
        names = [thing.name for thing in things]
        # how to call an object that one noun tells apart
        self.calls = {thing: thing.name for thing in things if names.count(thing.name) == 1}
        self.calls.update({thing: thing.shape for thing in self.lone_shapes if rng.random() < 0.7})
        self.exists = yes_no_maker(
            rng,
            "scene_exists",
            ("is there {}?", "do you see {}?"),
            [with_article(noun) for noun in self._nouns(rng, set(names), True, test)],
            [with_article(noun) for noun in self._nouns(rng, set(names), False, test)],
        )

    def _nouns(self, rng: random.Random, names: set[str], shown: bool, test: bool) -> list[str]:
        """Up to eight nouns that are in the scene, or are not: pairs, shapes and colours."""
        pairs = [" ".join(pair) for pair in (PAIRS if test else TRAIN_PAIRS) if (" ".join(pair) in names) == shown]
        if not shown:  # mostly close misses: the colour or the shape is in the picture
            near = [pair for pair in pairs if any(word in name.split() for name in names for word in pair.split())]
            pairs = rng.sample(near, min(len(near), 4)) + rng.sample(pairs, 1)
        shapes = [shape for shape in SHAPES if bool(self.by_shape[shape]) == shown]
        colours = [f"{colour} object" for colour in COLOURS if bool(self.by_colour[colour]) == shown]
        nouns = pairs[:5] + rng.sample(shapes, min(len(shapes), 2)) + rng.sample(colours, min(len(colours), 2))
        return list(dict.fromkeys(nouns))

    def absent(self) -> list[tuple[str, ...]]:
        """Questions, in all their wordings, about shapes, colours and objects that are not there."""
        shapes = [shape for shape in SHAPES if not self.by_shape[shape]]
        colours = [colour for colour in COLOURS if not self.by_colour[colour]]
        return [
            *((f"what color is the {shape}?", f"what colour is the {shape}?") for shape in shapes),
            *((f"where is the {shape}?", f"in which corner is the {shape}?") for shape in shapes),
            *((f"what shape is the {colour} object?", f"which shape is {colour}?") for colour in colours),
        ]

    def colour(self, rng: random.Random) -> Turn | None:
        if not self.lone_shapes:
            return None
        thing = rng.choice(self.lone_shapes)
        questions = (f"what color is the {thing.shape}?", f"what colour is the {thing.shape}?")
        return phrase(rng, "scene_colour", questions, thing.colour, boxes=[self.boxes[thing]])

    def shape(self, rng: random.Random) -> Turn | None:
        if not self.lone_colours:
            return None
        thing = rng.choice(self.lone_colours)
        questions = (f"what shape is the {thing.colour} object?", f"which shape is {thing.colour}?")
        return phrase(rng, "scene_shape", questions, thing.shape, boxes=[self.boxes[thing]])

    def size(self, rng: random.Random) -> Turn | None:
        size = rng.choice(list(RADII))
        options = [thing for thing in self.calls if thing.size == size]
        if not options:
            return None
        thing = rng.choice(options)
        call, boxes = self.calls[thing], [self.boxes[thing]]
        questions = (f"is the {call} large or small?", f"what size is the {call}?")
        return phrase(rng, "scene_size", questions, size, boxes=boxes)

    def count(self, rng: random.Random) -> Turn:
        nouns: dict[int, list[str]] = {len(self.things): ["objects"]}
        for shape, found in self.by_shape.items():
            nouns.setdefault(len(found), []).append("crosses" if shape == "cross" else f"{shape}s")
        for colour, found in self.by_colour.items():
            nouns.setdefault(len(found), []).append(f"{colour} objects")
        answers = sorted(nouns)
        answer = rng.choices(answers, [(0.35, 0.6, 1.0, 1.5, 2.0, 2.0)[number] for number in answers])[0]
        noun = rng.choice(nouns[answer])
        return phrase(rng, "scene_count", (f"how many {noun} are there?", f"how many {noun}?"), str(answer))

    def position(self, rng: random.Random) -> Turn | None:
        middle = REFERENCE_SIZE / 2
        corners = [t for t in self.calls if min(abs(t.x - middle), abs(t.y - middle)) > MIDLINE_OFFSET]
        if not corners:
            return None
        thing = rng.choice(corners)
        call = self.calls[thing]
        row, column = "top" if thing.y < middle else "bottom", "left" if thing.x < middle else "right"
        kind, boxes = rng.randrange(4), (self.boxes[thing],)
        if kind == 0:
            return Turn("scene_position", f"is the {call} on the left or on the right?", column, boxes=boxes)
        if kind == 1:
            return Turn("scene_position", f"is the {call} at the top or at the bottom?", row, boxes=boxes)
        questions = (f"where is the {call}?", f"in which corner is the {call}?")
        return phrase(rng, "scene_position", questions, f"{row} {column}", boxes=boxes)

    def what_at(self, rng: random.Random) -> Turn | None:
        middle = REFERENCE_SIZE / 2
        corners: dict[str, list[Thing]] = {}
        for thing in self.things:  # every quarter that an object touches
            right, down = thing.x - middle, thing.y - middle
            rows = [name for name, offset in (("top", -down), ("bottom", down)) if offset > -thing.radius]
            columns = [name for name, offset in (("left", -right), ("right", right)) if offset > -thing.radius]
            for row in rows:
                for column in columns:
                    corners.setdefault(f"{row} {column}", []).append(thing)
        # only corners that hold one object, and that object wholly
        single = {place: found[0] for place, found in corners.items() if len(found) == 1}
        places = [
            place
            for place, thing in single.items()
            if min(abs(thing.x - middle), abs(thing.y - middle)) > thing.radius * 0.8
        ]
        if not places:
            return None
        place = rng.choice(places)
        questions = (f"what is at the {place}?", f"which object is at the {place}?")
        return phrase(rng, "scene_what_at", questions, single[place].name, boxes=[self.boxes[single[place]]])

    def compare_count(self, rng: random.Random) -> Turn | None:
        by_colour = rng.random() < 0.4
        groups = self.by_colour if by_colour else self.by_shape
        counts = {
            (f"{key} objects" if by_colour else "crosses" if key == "cross" else f"{key}s"): len(found)
            for key, found in groups.items()
            if found
        }
        names = sorted(counts)
        options = [(a, b) for a in names for b in names if counts[a] > counts[b]]
        if not options:
            return None
        more, fewer = rng.choice(options)
        truth = rng.random() < 0.5
        first, second = (more, fewer) if truth else (fewer, more)
        return Turn("scene_compare_count", f"are there more {first} than {second}?", yes_no(truth))

    def compare_size(self, rng: random.Random) -> Turn | None:
        large = [thing for thing in self.calls if thing.size == "large"]
        small = [thing for thing in self.calls if thing.size == "small"]
        if not large or not small:
            return None
        things = rng.choice(large), rng.choice(small)
        big, little = (self.calls[thing] for thing in things)
        boxes = tuple(self.boxes[thing] for thing in things)
        truth = rng.random() < 0.5
        first, second = (big, little) if truth else (little, big)
        if rng.random() < 0.5:
            question = f"is the {first} larger than the {second}?"
            return Turn("scene_compare_size", question, yes_no(truth), boxes=boxes)
        return Turn("scene_compare_size", f"which is larger, the {first} or the {second}?", big, boxes=boxes)

    def relation(self, rng: random.Random) -> Turn | None:
        horizontal = rng.random() < 0.5
        low, high = ("left of", "right of") if horizontal else ("above", "below")
        where = {thing: thing.x if horizontal else thing.y for thing in self.calls}
        options = [(a, b) for a in where for b in where if where[b] - where[a] > MIN_OFFSET]
        if not options:
            return None
        things = rng.choice(options)
        first, second = (self.calls[thing] for thing in things)
        boxes = tuple(self.boxes[thing] for thing in things)
        word, opposite = low, high
        if rng.random() < 0.5:
            first, second, word, opposite = second, first, high, low
        if rng.random() < 0.4:
            sides = "left or right of" if horizontal else "above or below"
            question = f"is the {first} {sides} the {second}?"
            return Turn("scene_relation", question, word.removesuffix(" of"), boxes=boxes)
        truth = rng.random() < 0.5
        question = f"is the {first} {word if truth else opposite} the {second}?"
        return Turn("scene_relation", question, yes_no(truth), boxes=boxes)


def render_scene(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws one to five shapes that do not touch and asks about them."""
    count = rng.choices(list(COUNT_WEIGHTS), list(COUNT_WEIGHTS.values()))[0]
    pairs = _choose_pairs(rng, count, test)
    things = _place(rng, pairs)
    background = choose_background(rng, {thing.colour for thing in things})

    scale = image_size * SUPERSAMPLING / REFERENCE_SIZE
    image = Image.new("RGB", (image_size * SUPERSAMPLING,) * 2, background)
    draw = ImageDraw.Draw(image)
    for thing in things:
        fill = jitter(rng, COLOURS[thing.colour], 10)
        draw_shape(draw, thing.shape, thing.x * scale, thing.y * scale, thing.radius * scale, fill)
    pixels = image_size / REFERENCE_SIZE
    boxes = [
        Box(*(pixels * edge for edge in (x - radius, y - radius, x + radius, y + radius)))
        for x, y, radius in ((thing.x, thing.y, thing.radius) for thing in things)
    ]
    image = augment(image.reduce(SUPERSAMPLING), rng, background, boxes=boxes)

    ordered = sorted(things, key=lambda thing: (int(3 * thing.y / REFERENCE_SIZE), thing.x))
    caption = ", ".join(f"{thing.size} {thing.name} {place_name(thing.x, thing.y)}" for thing in ordered)
    ask = _Questions(rng, things, boxes, test)
    makers = [
        (1.0, ask.exists), (1.4, ask.colour), (1.2, ask.shape), (0.6, ask.size), (1.1, ask.count),
        (1.2, ask.position), (0.8, ask.what_at), (0.8, ask.compare_count), (0.8, ask.compare_size),
        (1.2, ask.relation),
    ]  # fmt: skip
    held_out = any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in things)
    chosen = choose_turns(rng, makers, turns)
    return Sample(image, "scenes", caption, chosen, held_out, absent=choose_absent(rng, "scene_absent", ask.absent()))


SCENE_TASKS = (
    "scene_exists", "scene_colour", "scene_shape", "scene_size", "scene_count", "scene_position", "scene_what_at",
    "scene_compare_count", "scene_compare_size", "scene_relation", "scene_absent",
)  # fmt: skip

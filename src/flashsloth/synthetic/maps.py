"""Maps of continents: which country is red, what colour or letter has it, where is it, which one is the largest."""

import random

from .augment import augment
from .colours import COLOURS
from .map_drawing import WINDOWS, WorldMap, draw_map
from .outlines import load_outlines
from .picture_layouts import third
from .sample import Sample, Turn, TurnMaker, choose_turns, phrase, yes_no
from .sprites import countries, pictures_folder

NONE = "none"
ABSENT_SHARE = 0.65  # of images, those with one question whose answer is none
CLEARLY_LARGER = 1.6  # times the area, for countries whose size is compared
LETTERS = "abcdefghk"


class _Questions:
    """Question makers over one map."""

    def __init__(self, found: WorldMap, test: bool, rng: random.Random) -> None:
        self.found, self.test = found, test
        self.marked = [*found.coloured, *found.letters, *found.named]
        # well in the image, and not touched by it at all
        self.seen = [name for name, place in found.places.items() if place.share > 0.6 and place.pixels > 40]
        self.unseen = [
            country.name
            for country in countries()
            if country.name not in found.in_view and country.continent != found.continent
        ]
        self.left = {True: rng.sample(self.seen, len(self.seen)), False: rng.sample(self.unseen, len(self.unseen))}
        self.absent_left = rng.random() < ABSENT_SHARE

    def kept(self, *wordings: str) -> tuple[str, ...]:
        return wordings if self.test else ()

    def _colour(self, rng: random.Random, task: str, colour: str, answer: str) -> Turn:
        questions = (f"which country is {colour}?", f"what is the {colour} country?", f"name the {colour} country.")
        return phrase(rng, task, questions, answer, self.kept(f"which country is shown in {colour}?"))

    def country(self, rng: random.Random) -> Turn | None:
        found = self.found
        if found.coloured:
            name, colour = rng.choice(list(found.coloured.items()))
            return self._colour(rng, "map_country", colour, name)
        if found.letters:
            name, letter = rng.choice(list(found.letters.items()))
            return self._letter(rng, "map_country", letter, name)
        if len(found.named) == 1:
            questions = ("which country is named?", "which country name is written?", "what name is on the map?")
            return phrase(rng, "map_country", questions, found.named[0], self.kept("read the name on the map."))
        return None

    def _letter(self, rng: random.Random, task: str, letter: str, answer: str) -> Turn:
        questions = (
            f"which country is {letter}?",
            f"which country has the letter {letter}?",
            f"what is country {letter}?",
        )
        return phrase(rng, task, questions, answer, self.kept(f"which country do you see at the letter {letter}?"))

    def _what_colour(self, rng: random.Random, task: str, name: str, answer: str) -> Turn:
        questions = (f"what color is {name}?", f"which color has {name}?", f"in what color is {name}?")
        return phrase(rng, task, questions, answer, self.kept(f"what is the color of {name}?"))

    def mark(self, rng: random.Random) -> Turn | None:
        """The colour or letter of a country."""
        if self.found.coloured:
            name, colour = rng.choice(list(self.found.coloured.items()))
            return self._what_colour(rng, "map_color", name, colour)
        if not self.found.letters:
            return None
        name, letter = rng.choice(list(self.found.letters.items()))
        return self._what_letter(rng, "map_letter", name, letter)

    def _what_letter(self, rng: random.Random, task: str, name: str, answer: str) -> Turn:
        questions = (f"which letter is on {name}?", f"what letter has {name}?", f"which letter is {name}?")
        return phrase(rng, task, questions, answer, self.kept(f"what is the letter of {name}?"))

    def _where(self, rng: random.Random, name: str, task: str, answer: str) -> Turn:
        questions = (f"where is {name}?", f"where on the map is {name}?", f"in what part of the map is {name}?")
        return phrase(rng, task, questions, answer, self.kept(f"at which place is {name}?"))

    def where(self, rng: random.Random) -> Turn | None:
        name = rng.choice(self.marked if self.marked and rng.random() < 0.7 else self.seen or self.marked or [""])
        if not name:
            return None
        place = self.found.places[name]
        answer = third(place.x, place.y, *self.found.image.size)
        if not answer or place.share < 0.85:
            return None
        colour = self.found.coloured.get(name)
        shown = f"the {colour} country" if colour and rng.random() < 0.5 else name
        return self._where(rng, shown, "map_where", answer)

    def continent(self, rng: random.Random) -> Turn:
        questions = ("which continent is it?", "which continent is shown?", "what continent do you see?")
        return phrase(
            rng, "map_continent", questions, self.found.continent, self.kept("of which continent is the map?")
        )

    def exists(self, rng: random.Random) -> Turn | None:
        if not (self.left[True] and self.left[False]):
            return None
        truth = rng.random() < 0.5
        name = self.left[truth].pop()
        questions = (f"is {name} on the map?", f"does the map show {name}?", f"do you see {name} on the map?")
        return phrase(rng, "map_exists", questions, yes_no(truth), self.kept(f"can you see {name} on the map?"))

    def marked_or_not(self, rng: random.Random) -> Turn | None:
        others = [name for name in self.seen if name not in self.marked]
        if not (self.marked and others) or self.found.named:
            return None
        truth = rng.random() < 0.5
        name = rng.choice(self.marked if truth else others)
        if self.found.letters:
            questions = (
                f"is there a letter on {name}?",
                f"does {name} have a letter?",
                f"do you see a letter on {name}?",
            )
        else:
            if not truth and len(self.found.coloured) > 1 and rng.random() < 0.5:  # one has the colour of another
                name, other = rng.sample(list(self.found.coloured), 2)
                colour = self.found.coloured[other]
            else:
                colour = self.found.coloured[name] if truth else rng.choice(list(self.found.coloured.values()))
            questions = (f"is {name} {colour}?", f"is the country {name} {colour}?", f"do you see {name} in {colour}?")
        turn = phrase(rng, "map_marked", questions, yes_no(truth))
        return Turn(turn.task, turn.question, turn.answer, "marked")

    def largest(self, rng: random.Random) -> Turn | None:
        if len(self.found.coloured) < 2:
            return None
        pixels = {name: self.found.places[name].pixels for name in self.found.coloured}
        for measure in (self.found.areas, pixels):
            order = sorted(pixels, key=measure.__getitem__)
            if measure[order[-1]] < CLEARLY_LARGER * measure[order[-2]]:
                return None
        if max(pixels, key=pixels.__getitem__) != order[-1]:
            return None
        if rng.random() < 0.5:
            questions = ("which colored country is the largest?", "which one in color is the largest?",
                         "what is the largest country in color?")  # fmt: skip
            return phrase(
                rng, "map_largest", questions, order[-1], self.kept("which one is the largest colored country?")
            )
        questions = ("what color has the largest colored country?", "which color is the largest country in color?",
                     "what color is the largest one in color?")  # fmt: skip
        answer = self.found.coloured[order[-1]]
        return phrase(rng, "map_largest", questions, answer, self.kept("which color is the largest colored country?"))

    def count(self, rng: random.Random) -> Turn | None:
        if self.found.named:
            return None
        if self.found.letters:
            questions = ("how many countries have a letter?", "how many letters are there?", "count the letters.")
            kept = self.kept("how many letters are on the map?")
        else:
            questions = (
                "how many countries are colored?",
                "how many countries are in color?",
                "count the colored countries.",
            )
            kept = self.kept("how many colored countries are there?")
        return phrase(rng, "map_count", questions, str(len(self.found.letters or self.found.coloured)), kept)

    def absent(self, rng: random.Random) -> Turn | None:
        """A question as the others, whose answer is none; at most one an image."""
        if not self.absent_left:
            return None
        self.absent_left = False
        others = [name for name in self.seen if name not in self.marked]
        draw = rng.random()
        if draw < 0.35 and self.unseen:
            return self._where(rng, rng.choice(self.unseen), "map_absent", NONE)
        if self.found.letters:
            if draw < 0.7 and others:
                return self._what_letter(rng, "map_absent", rng.choice(others), NONE)
            letter = rng.choice([letter for letter in LETTERS if letter not in self.found.letters.values()])
            return self._letter(rng, "map_absent", letter, NONE)
        if not self.found.coloured:  # the lands have tints
            return None
        if draw < 0.7 and others:
            return self._what_colour(rng, "map_absent", rng.choice(others), NONE)
        # the sea may be blue or white, but no country is
        colours = [
            name for name in COLOURS if name not in self.found.coloured.values() and name not in ("white", "yellow")
        ]
        return self._colour(rng, "map_absent", rng.choice(colours), NONE)

    def makers(self) -> list[tuple[float, TurnMaker]]:
        return [
            (3.0, self.country), (1.5, self.mark), (1.5, self.where), (0.6, self.continent), (0.6, self.exists),
            (0.8, self.marked_or_not), (1.5, self.largest), (0.3, self.count), (1.4, self.absent),
        ]  # fmt: skip


def _describe(found: WorldMap) -> str:
    parts = [f"{name} is {colour}" for name, colour in found.coloured.items()]
    parts += [f"{name} has the letter {letter}" for name, letter in found.letters.items()]
    text = f"a map of {found.continent}. {', '.join(parts)}." if parts else f"a map of {found.continent}."
    return f"{text} text: {', '.join(found.named)}." if found.named else text


def render_map(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws a continent, or a part of it, and asks about its countries.

    The test's maps have coarser outlines, and half of them Mercator's projection; training has neither.
    """
    outlines = load_outlines(pictures_folder(), "110m" if test else "50m")
    found = draw_map(rng, outlines, test, image_size)
    chosen = choose_turns(rng, _Questions(found, test, rng).makers(), turns)
    image = augment(found.image, rng, found.sea, found.glyphs)
    return Sample(image, "maps", _describe(found), chosen, test, found.glyphs)


MAP_TASKS = (
    "map_country", "map_color", "map_letter", "map_where", "map_continent", "map_exists", "map_marked", "map_largest",
    "map_count", "map_absent",
)  # fmt: skip
_LANGUAGE = """
which what where how many at of to country countries is are the a an map on in it one color colored letter letters
has have there name named written part place continent shown show does do you see can count largest yes no none left
right top bottom center read text
"""
MAP_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *_LANGUAGE.split(),
            *COLOURS,
            *(word for window in WINDOWS for word in window.split()),
            *(word for country in countries() for word in country.name.split()),
        ]
    )
)

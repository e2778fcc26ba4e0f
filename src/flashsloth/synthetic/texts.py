"""Written words: signs, lines, receipts and tables, to be read, found, counted and added up."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from .augment import augment
from .colours import RGB, choose_ink
from .fonts import FACE_NAMES, Style, TextDraw, draw_text, fit_height, text_width
from .sample import (
    REFERENCE_SIZE,
    Box,
    Glyph,
    Sample,
    Turn,
    TurnMaker,
    choose_absent,
    choose_turns,
    phrase,
    yes_no_maker,
)
from .words import (
    HELD_OUT,
    HELD_OUT_ITEMS,
    HELD_OUT_WORDS,
    TRAIN_ITEMS,
    TRAIN_WORDS,
    choose_words,
    random_number,
    random_string,
)

LAYOUT_WEIGHTS = {"sign": 3, "lines": 4, "receipt": 3, "table": 2}
HELD_OUT_SHARE = 0.4  # tables show no words of the kind, so a third of all images is left
ORDINALS = ("first", "second", "third", "fourth", "fifth")
NUMBER_SHARE = 0.1  # of the words that are numbers instead
LARGEST_SUM = 20


@dataclass(frozen=True)
class Page:
    """A drawn page with what it says."""

    image: Image.Image
    caption: str
    makers: Sequence[tuple[float, TurnMaker]]
    held_out: bool
    ground: RGB  # colour at the border
    glyphs: list[Glyph]
    absent: Sequence[Sequence[str]] = ()  # questions about what is not there, in all their wordings
    boxes: list[Box] = field(default_factory=list)  # that the makers give to their questions


def _choose_style(rng: random.Random) -> Style:
    ink, paper = choose_ink(rng)
    return Style(rng.choice(FACE_NAMES), rng.choices(("lower", "upper", "title"), (4, 4, 3))[0], ink, paper)


def _words(rng: random.Random, count: int, held_out: bool) -> list[str]:
    words = choose_words(rng, count, held_out)
    for index, word in enumerate(words):
        if word not in HELD_OUT and rng.random() < NUMBER_SHARE:
            words[index] = random_number(rng)
    return words if len(set(words)) == count else _words(rng, count, held_out)


def _near_miss(rng: random.Random, word: str) -> str:
    """The word with one letter changed."""
    place = rng.randrange(len(word))
    letters = "0123456789" if word.isdigit() else "abcdefghijklmnoprstuvwy"
    return word[:place] + rng.choice(letters.replace(word[place], "")) + word[place + 1 :]


def _find(rng: random.Random, shown: Sequence[str], test: bool) -> TurnMaker:
    others = [random_string(rng), random_string(rng), *rng.sample(TRAIN_WORDS, 2)]
    if test:
        others.append(rng.choice(HELD_OUT_WORDS))
    if rng.random() < 0.3:
        others.append(_near_miss(rng, rng.choice(shown)))
    absent = [word for word in others if word not in shown and (test or word not in HELD_OUT)]
    return yes_no_maker(rng, "text_find", ("is the word {} shown?", "does it say {}?"), shown, absent)


def _letter(words: Sequence[str]) -> TurnMaker:
    def make(rng: random.Random) -> Turn | None:
        spelled = [index for index, word in enumerate(words) if not word.isdigit()]
        if not spelled:
            return None
        index = rng.choice(spelled)
        which = "word" if len(words) == 1 else f"{ORDINALS[index]} word"
        if rng.random() < 0.5:
            return Turn("text_letter", f"what is the first letter of the {which}?", words[index][0])
        return Turn("text_letter", f"what is the last letter of the {which}?", words[index][-1])

    return make


def _lines_at(rng: random.Random, size: int, count: int, height: int) -> tuple[float, float]:
    """(middle of the first line, distance of the lines), clear of the border by what a rotation moves."""
    first, last = height / 2 + 8 * size / REFERENCE_SIZE, size - height / 2 - 9 * size / REFERENCE_SIZE
    pitch = min((last - first) / max(1, count - 1), height * rng.uniform(1.7, 2.5))
    return rng.uniform(first, last - pitch * (count - 1)), pitch


def _draw_sign(rng: random.Random, test: bool, size: int, style: Style) -> Page:
    """One large word, sometimes on a board."""
    held_out = test and rng.random() < HELD_OUT_SHARE
    word = _words(rng, 1, held_out)[0]
    text, scale = style.cased(word), size / REFERENCE_SIZE
    height = fit_height(style.face, (text,), round(rng.uniform(22, 46) * scale), 122 * scale)
    room = (REFERENCE_SIZE - 2 * 20) * scale - height
    x, y = size / 2, size / 2 + rng.uniform(-0.5, 0.5) * room
    image = Image.new("RGB", (size, size), style.paper)
    draw, ground = TextDraw(image), style.paper
    if rng.random() < 0.4:  # a board with a frame on another ground
        red, green, blue = ((channel + 128) // 2 for channel in style.paper)
        ground = (red, green, blue)
        image.paste(ground, (0, 0, size, size))
        half = height / 2 + 12 * scale
        box = (3 * scale, y - half, size - 3 * scale, y + half)
        draw.rounded_rectangle(box, rng.uniform(0, 10) * scale, style.paper, style.ink, round(2 * scale))
    draw_text(draw, (x, y), text, style.face, height, style.ink)

    def read(rng: random.Random) -> Turn:
        return phrase(rng, "text_read_word", ("what does it say?", "what is written here?", "read the word."), word)

    def length(rng: random.Random) -> Turn:
        noun = "digits" if word.isdigit() else "letters"
        return Turn("text_length", f"how many {noun} does it have?", str(len(word)))

    makers = [(3.0, read), (1.0, _find(rng, [word], test)), (0.5, _letter([word])), (0.4, length)]
    return Page(image, f"text: {word}.", makers, word in HELD_OUT, ground, draw.glyphs)


def _draw_lines(rng: random.Random, test: bool, size: int, style: Style) -> Page:
    """Two to four words, one a line."""
    count = rng.choice((2, 2, 3, 3, 4))
    words = _words(rng, count, test and rng.random() < HELD_OUT_SHARE)
    texts, scale = [style.cased(word) for word in words], size / REFERENCE_SIZE
    heights = {2: (18, 28), 3: (16, 22), 4: (15, 18)}[count]
    height = fit_height(style.face, tuple(texts), round(rng.uniform(*heights) * scale), 122 * scale)
    image = Image.new("RGB", (size, size), style.paper)
    draw = TextDraw(image)
    start, pitch = _lines_at(rng, size, count, height)
    anchor = rng.choice("lmr")
    x = {"l": 10 * scale, "m": size / 2, "r": size - 10 * scale}[anchor]
    for index, text in enumerate(texts):
        draw_text(draw, (x, start + index * pitch), text, style.face, height, style.ink, f"{anchor}m")

    def read(rng: random.Random) -> Turn:
        index = rng.randrange(count)
        names = [ORDINALS[index]] + ["last"] * (index == count - 1)
        name = rng.choice(names)
        questions = (f"what is the {name} line?", f"what is the {name} word?", f"read the {name} line.")
        return phrase(rng, "text_read_line", questions, words[index])

    def number(rng: random.Random) -> Turn:
        return phrase(rng, "text_count", ("how many words are there?", "how many lines are there?"), str(count))

    makers = [(3.0, read), (1.2, _find(rng, words, test)), (0.5, _letter(words)), (0.3, number)]
    held_out = any(word in HELD_OUT for word in words)
    return Page(image, f"text: {', '.join(words)}.", makers, held_out, style.paper, draw.glyphs)


def _draw_receipt(rng: random.Random, test: bool, size: int, style: Style) -> Page:
    """Two to four items with prices from 1 to 9, all different."""
    count = rng.choice((2, 3, 3, 4))
    items = rng.sample(TRAIN_ITEMS, count)
    if rng.random() < 0.15:
        items[0] = random_string(rng, 3, 5)
    if test and rng.random() < HELD_OUT_SHARE:
        items[rng.randrange(count)] = rng.choice(HELD_OUT_ITEMS)
    prices = rng.sample(range(1, 10), count)
    heading = rng.choice(("", "", "menu", "bill", "shop")) if count < 4 else ""
    sign = rng.choice(("", "", "$"))
    rows = [(style.cased(item), f"{sign}{price}") for item, price in zip(items, prices, strict=True)]
    scale = size / REFERENCE_SIZE
    lefts = tuple(left for left, _ in rows)
    height = fit_height(style.face, lefts, round(rng.uniform(14, 17) * scale), 92 * scale)
    image = Image.new("RGB", (size, size), style.paper)
    draw = TextDraw(image)
    lines = count + bool(heading)
    y, pitch = _lines_at(rng, size, lines, height)
    if heading:
        draw_text(draw, (size / 2, y), style.cased(heading), style.face, height, style.ink)
        draw.line((8 * scale, y + pitch / 2, size - 8 * scale, y + pitch / 2), style.ink, max(1, round(scale)))
        y += pitch
    boxes: list[Box] = []  # an item, its price, the next item, ...
    for left, right in rows:
        draw_text(draw, (8 * scale, y), left, style.face, height, style.ink, "lm")
        draw_text(draw, (size - 9 * scale, y), right, style.face, height, style.ink, "rm")
        above, below = y - height / 2, y + height / 2
        boxes.append(Box(8 * scale, above, 8 * scale + text_width(style.face, height, left), below))
        edge = size - 9 * scale
        boxes.append(Box(edge - text_width(style.face, height, right), above, edge, below))
        y += pitch

    def row(*indices: int) -> list[Box]:
        return [boxes[2 * index + side] for index in indices for side in (0, 1)]

    def price(rng: random.Random) -> Turn:
        index = rng.randrange(count)
        questions = (f"how much is the {items[index]}?", f"what is the price of the {items[index]}?")
        return phrase(rng, "receipt_price", questions, str(prices[index]), boxes=row(index))

    def item(rng: random.Random) -> Turn:
        index = rng.randrange(count)
        questions = (f"what costs {prices[index]}?", f"which item costs {prices[index]}?")
        return phrase(rng, "receipt_item", questions, items[index], boxes=row(index))

    def total(rng: random.Random) -> Turn:
        first, second = rng.sample(range(count), 2)
        assert prices[first] + prices[second] <= LARGEST_SUM
        question = f"how much are the {items[first]} and the {items[second]} together?"
        return Turn("receipt_total", question, str(prices[first] + prices[second]), boxes=tuple(row(first, second)))

    def cheapest(rng: random.Random) -> Turn:
        word, index = "cheapest", prices.index(min(prices))
        if rng.random() >= 0.5:
            word, index = "most expensive", prices.index(max(prices))
        return Turn("receipt_extreme", f"what is the {word} item?", items[index], boxes=tuple(row(index)))

    def number(rng: random.Random) -> Turn:
        return Turn("receipt_count", "how many items are there?", str(count))

    body = ", ".join(f"{name} {price}" for name, price in zip(items, prices, strict=True))
    caption = f"receipt{' titled ' + heading if heading else ''}: {body}."
    makers = [(2.0, price), (1.0, item), (1.0, total), (0.8, cheapest), (0.3, number), (0.5, _find(rng, items, test))]
    absent = [
        wordings
        for name in TRAIN_ITEMS
        if name not in items
        for wordings in ((f"how much is the {name}?", f"what is the price of the {name}?"),)
    ]
    return Page(
        image, caption, makers, any(name in HELD_OUT for name in items), style.paper, draw.glyphs, absent, boxes
    )


def _draw_table(rng: random.Random, test: bool, size: int, style: Style) -> Page:
    """Two or three rows and columns of numbers under single letters."""
    rows, columns = rng.choice(((2, 2), (2, 3), (3, 2), (3, 3)))
    letters = rng.sample("abcdefghjkmnprstuvwxyz", rows + columns)
    row_names, column_names = sorted(letters[:rows]), sorted(letters[rows:])
    largest = 9 if rng.random() < 0.6 else 99
    cells = [[rng.randint(1, largest) for _ in range(columns)] for _ in range(rows)]
    scale = size / REFERENCE_SIZE
    width, depth = size / (columns + 1), min(size / (rows + 1), rng.uniform(34, 48) * scale)
    top = rng.uniform(0, size - depth * (rows + 1))
    height = round(rng.uniform(13, 16) * scale)
    image = Image.new("RGB", (size, size), style.paper)
    draw = TextDraw(image)
    ruled = rng.random()
    thickness = max(1, round(scale))
    for index in range(1, rows + 1):
        if index == 1 or ruled < 0.5:
            draw.line((0, top + index * depth, size, top + index * depth), style.ink, thickness)
    for index in range(1, columns + 1):
        if index == 1 or ruled < 0.5:
            draw.line((index * width, top, index * width, top + depth * (rows + 1)), style.ink, thickness)
    names = [["", *column_names]] + [[name, *map(str, line)] for name, line in zip(row_names, cells, strict=True)]
    for line, texts in enumerate(names):
        for column, text in enumerate(texts):
            position = ((column + 0.5) * width, top + (line + 0.5) * depth)
            draw_text(draw, position, style.cased(text), style.face, height, style.ink)

    def cell(rng: random.Random) -> Turn:
        line, column = rng.randrange(rows), rng.randrange(columns)
        row_name, column_name = row_names[line], column_names[column]
        questions = (
            f"what is the value in row {row_name}, column {column_name}?",
            f"what number is in row {row_name} and column {column_name}?",
        )
        return phrase(rng, "table_cell", questions, str(cells[line][column]))

    def number(rng: random.Random) -> Turn:
        if rng.random() < 0.5:
            return Turn("table_count", "how many rows of numbers are there?", str(rows))
        return Turn("table_count", "how many columns of numbers are there?", str(columns))

    def compare(rng: random.Random) -> Turn | None:
        line = rng.randrange(rows)
        first, second = rng.sample(range(columns), 2)
        if cells[line][first] == cells[line][second]:
            return None
        question = (
            f"in row {row_names[line]}, which column is larger, {column_names[first]} or {column_names[second]}?"
        )
        return Turn("table_compare", question, column_names[max(first, second, key=cells[line].__getitem__)])

    body = ". ".join(f"row {name}: {', '.join(map(str, line))}" for name, line in zip(row_names, cells, strict=True))
    caption = f"table with columns {', '.join(column_names)}. {body}."
    absent = [
        (
            f"what is the value in row {row}, column {column}?",
            f"what number is in row {row} and column {column}?",
        )
        for row in row_names
        for column in "abcdefghjkmnprstuvwxyz"
        if column not in letters
    ]
    makers = [(3.0, cell), (0.4, number), (0.8, compare)]
    return Page(image, caption, makers, False, style.paper, draw.glyphs, absent)


LAYOUTS = {"sign": _draw_sign, "lines": _draw_lines, "receipt": _draw_receipt, "table": _draw_table}


def render_text(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws a sign, some lines, a receipt or a table and asks about it."""
    layout = rng.choices(list(LAYOUT_WEIGHTS), list(LAYOUT_WEIGHTS.values()))[0]
    style = _choose_style(rng)
    page = LAYOUTS[layout](rng, test, image_size, style)
    image = augment(page.image, rng, page.ground, page.glyphs, page.boxes)
    chosen = choose_turns(rng, page.makers, turns)
    absent = choose_absent(rng, "text_absent", page.absent)
    return Sample(image, "text", page.caption, chosen, page.held_out, page.glyphs, absent)


def render_page(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws three to six lines of one to three words: many letters an image, for practice in reading."""
    style, scale = _choose_style(rng), image_size / REFERENCE_SIZE
    count = rng.choice((3, 4, 4, 5, 5, 6))
    height = round(rng.uniform(*{3: (14, 18), 4: (13, 16), 5: (12, 14), 6: (11, 13)}[count]) * scale)
    gap, room = text_width(style.face, height, " ") * 1.3, 126 * scale
    lines: list[list[str]] = []
    for _ in range(count):
        line: list[str] = []
        for word in _words(rng, rng.choice((1, 2, 2, 3, 3)), False):
            width = sum(text_width(style.face, height, style.cased(part)) + gap for part in [*line, word])
            if not line or width <= room:
                line.append(word)
        lines.append(line)
    image = Image.new("RGB", (image_size, image_size), style.paper)
    draw = TextDraw(image)
    y, pitch = _lines_at(rng, image_size, count, height)
    for line in lines:
        fitted = fit_height(style.face, tuple(style.cased(word) for word in line), height, room)
        x = rng.uniform(8 * scale, max(8 * scale, image_size / 4))
        x = min(x, image_size - 8 * scale - sum(text_width(style.face, fitted, style.cased(w)) + gap for w in line))
        x = max(x, 6 * scale)
        for word in line:
            draw_text(draw, (x, y), style.cased(word), style.face, fitted, style.ink, "lm")
            x += text_width(style.face, fitted, style.cased(word)) + gap
        y += pitch

    def read(rng: random.Random) -> Turn:
        index = rng.randrange(count)
        name = "last" if index == count - 1 else f"{ORDINALS[index]}"
        return phrase(rng, "page_read_line", (f"read the {name} line.",), " ".join(lines[index]))

    image = augment(image, rng, style.paper, draw.glyphs)
    caption = f"text: {', '.join(' '.join(line) for line in lines)}."
    return Sample(image, "pages", caption, choose_turns(rng, [(1.0, read)], turns), False, draw.glyphs)


PAGE_TASKS = ("page_read_line",)
TEXT_TASKS = (
    "text_read_word", "text_read_line", "text_find", "text_letter", "text_length", "text_count", "receipt_price",
    "receipt_item", "receipt_total", "receipt_extreme", "receipt_count", "table_cell", "table_count", "table_compare",
    "text_absent",
)  # fmt: skip

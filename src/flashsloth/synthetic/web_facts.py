"""What a drawn page says: receipts, product cards, tables, forms, dialogs, button bars, menus and notices."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .colours import COLOURS
from .words import (
    HELD_OUT,
    HELD_OUT_ITEMS,
    TRAIN_ITEMS,
    TRAIN_WORDS,
    choose_title,
    choose_words,
    random_number,
    random_string,
)

HELD_OUT_SHARE = 0.5
EMPTY = "empty"  # the answer for a field with nothing in it

NAMES = (
    "ann", "bob", "eve", "tom", "kim", "max", "sue", "ray", "lea", "ben", "ida", "joe", "mia", "sam", "zoe", "leo",
)  # fmt: skip
HELD_OUT_NAMES = ("nora", "hugo", "vera", "otto")
CITIES = (
    "paris", "rome", "oslo", "lima", "cairo", "delhi", "tokyo", "bonn", "kyiv", "riga", "seoul", "milan", "porto",
    "nice", "basel", "dover",
)  # fmt: skip
HELD_OUT_CITIES = ("berlin", "madrid", "dublin", "quito")
BUTTONS = (
    "ok", "cancel", "save", "open", "close", "delete", "print", "send", "next", "back", "stop", "start", "help",
    "edit", "copy", "paste", "cut", "undo", "share", "add", "remove", "login", "retry", "skip", "apply", "reset",
    "search", "find", "new", "exit", "view", "zoom", "play", "pause", "buy", "pay", "rename", "select", "export",
    "tools",
)  # fmt: skip
HELD_OUT_BUTTONS = ("submit", "confirm", "discard", "continue", "accept", "reload", "import", "finish")
HEADINGS = ("menu", "bill", "shop", "receipt", "order", "cafe", "store", "market")
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
PETS = ("cat", "dog", "hen", "pig", "fox", "owl", "bee", "cow")
INKS = tuple(name for name in COLOURS if name not in ("black", "white"))
FIELDS = (
    "name", "city", "street", "email", "phone", "code", "age", "date", "user", "team", "note", "job", "room",
    "size", "country",
)  # fmt: skip
BOXES = (
    "news", "terms", "gift", "sound", "wifi", "alarm", "sync", "updates", "dark mode", "private", "lunch", "parking",
    "member", "urgent", "repeat", "backup",
)  # fmt: skip
CHOICES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("size", ("small", "medium", "large", "tiny")),
    ("colour", INKS),
    ("day", DAYS),
    ("month", MONTHS),
    ("drink", ("tea", "milk", "juice", "water", "soda")),
    ("payment", ("cash", "card", "cheque")),
    ("seat", ("front", "aisle", "middle")),
    ("pet", PETS),
    ("delivery", ("post", "pickup", "express")),
    ("meal", ("pizza", "soup", "salad", "rice", "fish")),
)
# (name of the rows, rows, columns); a column is numbers unless COLUMNS gives its words
TABLES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("day", DAYS, ("rain", "sales", "visits", "calls", "steps", "high", "low")),
    ("month", MONTHS, ("rent", "food", "fuel", "power", "wins", "trips")),
    ("name", NAMES, ("math", "art", "music", "sport", "age", "score", "goals")),
    ("name", NAMES, ("city", "pet", "colour", "day", "age", "team")),
    ("city", CITIES, ("north", "south", "rain", "snow", "buses", "parks", "heat")),
    ("item", TRAIN_ITEMS, ("price", "stock", "sold", "size", "colour")),
    ("team", TRAIN_WORDS, ("won", "lost", "drawn", "points", "city")),
    ("id", TRAIN_WORDS, ("first", "second", "third", "total")),
)
COLUMNS: dict[str, tuple[str, ...]] = {
    "city": CITIES, "pet": PETS, "colour": INKS, "day": DAYS, "team": TRAIN_WORDS, "size": ("s", "m", "l", "xl", "xs"),
}  # fmt: skip
HELD_OUT_ROWS = {"name": HELD_OUT_NAMES, "city": HELD_OUT_CITIES, "item": HELD_OUT_ITEMS}
_CAPTIONS = """
receipt cards table titled total or form box ticked not button buttons dialog disabled menu highlighted list notice
"""
CAPTION_WORDS = frozenset(_CAPTIONS.split())
KEPT = HELD_OUT | frozenset((*HELD_OUT_NAMES, *HELD_OUT_CITIES, *HELD_OUT_BUTTONS))


def kept_for_test(text: str) -> bool:
    """Whether a word that a caption tells of occurs in the test split only."""
    return not KEPT.isdisjoint(set(re.findall("[a-z]+", text)) - CAPTION_WORDS)


def _free_words(rng: random.Random, count: int, test: bool, share: float, made_up: float = 0.3) -> list[str]:
    """Different words; a share of the test split's have a held-out one among them."""
    held_out = test and rng.random() < share
    while True:  # a made-up word may be one of this module's held-out names
        words = choose_words(rng, count, held_out, made_up)
        if test or KEPT.isdisjoint(words):
            return words


def choose_nouns(
    rng: random.Random, pool: Sequence[str], held_out: Sequence[str], count: int, test: bool, made_up: float = 0.15
) -> list[str]:
    """Different nouns of the pool, some made up; in the test split one is often held out."""
    nouns: dict[str, None] = {}
    if test and held_out and rng.random() < HELD_OUT_SHARE:
        nouns[rng.choice(held_out)] = None
    while len(nouns) < count:
        noun = random_string(rng, 3, 6) if rng.random() < made_up else rng.choice(pool)
        if test or noun not in KEPT:
            nouns[noun] = None
    chosen = list(nouns)
    rng.shuffle(chosen)
    return chosen


def choose_heading(rng: random.Random, test: bool) -> str:
    """A title of one or two words."""
    if test and rng.random() < 0.3:
        return choose_title(rng, True)
    return choose_title(rng, False) if rng.random() < 0.6 else " ".join(_free_words(rng, rng.choice((1, 2)), test, 0))


@dataclass(frozen=True)
class Priced:
    """Items with prices: a receipt, or product cards with a coloured label each."""

    kind: str
    title: str
    items: tuple[str, ...]
    prices: tuple[int, ...]  # in the unit that is written: whole coins, or hundredths
    cents: bool
    sign: str
    total: bool
    colours: tuple[str, ...]
    missing: str
    missing_price: int
    missing_colour: str

    def written(self, amount: int) -> str:
        """An amount without its sign."""
        return f"{amount // 100}.{amount % 100:02}" if self.cents else str(amount)

    def caption(self) -> str:
        body = ", ".join(f"{n} {self.written(p)}" for n, p in zip(self.items, self.prices, strict=True))
        if self.colours:
            body = ", ".join(
                f"{colour} {name} {self.written(price)}"
                for colour, name, price in zip(self.colours, self.items, self.prices, strict=True)
            )
        total = f" total {self.written(sum(self.prices))}." if self.total else ""
        return f"{self.kind}{' titled ' + self.title if self.title else ''}: {body}.{total}"


@dataclass(frozen=True)
class Table:
    """Named rows and columns of numbers or words."""

    title: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    missing_row: str
    missing_column: str

    def caption(self) -> str:
        lines = (
            f"{row}: " + ", ".join(f"{name} {cell}" for name, cell in zip(self.columns, cells, strict=True))
            for row, cells in zip(self.rows, self.cells, strict=True)
        )
        return f"table{' titled ' + self.title if self.title else ''}. {'. '.join(lines)}."


@dataclass(frozen=True)
class Button:
    """A labelled button."""

    label: str
    colour: str = ""  # as its filling
    off: bool = False


@dataclass(frozen=True)
class Form:
    """Labelled fields, boxes to tick, and groups of which one option is chosen."""

    title: str
    fields: tuple[tuple[str, str], ...]
    boxes: tuple[tuple[str, bool], ...]
    radio: tuple[str, tuple[str, ...], str] | None
    select: tuple[str, str] | None
    button: str
    missing: str
    missing_group: str

    def caption(self) -> str:
        parts = [f"{label}: {value or EMPTY}" for label, value in self.fields]
        parts += [f"box {label} {'ticked' if ticked else 'not ticked'}" for label, ticked in self.boxes]
        if self.radio:
            parts.append(f"{self.radio[0]} {' or '.join(self.radio[1])}: {self.radio[2]}")
        if self.select:
            parts.append(f"{self.select[0]}: {self.select[1]}")
        button = f" button {self.button}." if self.button else ""
        return f"form{' titled ' + self.title if self.title else ''}. {', '.join(parts)}.{button}"


@dataclass(frozen=True)
class Dialog:
    """A message over some buttons; without message and title a bar of buttons."""

    title: str
    message: str
    buttons: tuple[Button, ...]
    missing: tuple[str, ...] = field(default=())

    def caption(self) -> str:
        labels = (
            " ".join(filter(None, ("disabled" if button.off else "", button.colour, button.label)))
            for button in self.buttons
        )
        head = f"dialog{' titled ' + self.title if self.title else ''}: {self.message}. " if self.message else ""
        return f"{head}buttons {', '.join(labels)}."


@dataclass(frozen=True)
class Menu:
    """Entries with shortcuts, of which one is highlighted and one may be disabled."""

    title: str
    entries: tuple[str, ...]
    keys: tuple[str, ...]  # empty where no entry has one
    on: int
    off: int | None
    missing: tuple[str, ...]

    def caption(self) -> str:
        parts = []
        for index, entry in enumerate(self.entries):
            state = " highlighted" if index == self.on else " disabled" if index == self.off else ""
            parts.append(entry + (f" {self.keys[index]}" if self.keys else "") + state)
        return f"menu{' titled ' + self.title if self.title else ''}: {', '.join(parts)}."


@dataclass(frozen=True)
class Notice:
    """A title over some lines."""

    kind: str  # plain, bullets or numbered
    title: str
    lines: tuple[str, ...]
    missing: tuple[str, ...]

    def caption(self) -> str:
        return f"{'list' if self.kind != 'plain' else 'notice'} titled {self.title}. {', '.join(self.lines)}."


Facts = Priced | Table | Form | Dialog | Menu | Notice


def shown_colours(facts: Facts) -> tuple[str, ...]:
    """The named colours of cards and buttons."""
    if isinstance(facts, Priced):
        return facts.colours
    return tuple(button.colour for button in facts.buttons if button.colour) if isinstance(facts, Dialog) else ()


def choose_priced(rng: random.Random, test: bool, cards: bool = False) -> Priced:
    """Two to six items with different prices; whole prices are below 10, so that two can be added."""
    count = rng.choice((2, 3, 4)) if cards else rng.choice((2, 3, 3, 4, 4, 5, 6))
    *items, missing = choose_nouns(rng, TRAIN_ITEMS, HELD_OUT_ITEMS, count + 1, test)
    cents = rng.random() < 0.4
    *prices, missing_price = rng.sample(range(25, 2000, 5) if cents else range(1, 10), count + 1)
    title = "" if rng.random() < 0.3 else rng.choice(HEADINGS)
    sign = rng.choice(("", "", "$"))
    total = not cards and rng.random() < 0.6
    *colours, missing_colour = rng.sample(INKS, count + 1) if cards else ("",)
    kind = "cards" if cards else "receipt"
    facts = (kind, title, tuple(items), tuple(prices), cents, sign, total, tuple(colours))
    return Priced(*facts, missing, missing_price, missing_colour)


def choose_cards(rng: random.Random, test: bool) -> Priced:
    """Product cards."""
    return choose_priced(rng, test, cards=True)


def choose_table(rng: random.Random, test: bool) -> Table:
    """Two to five rows and one to four columns; numbers of a column are all different."""
    corner, row_pool, column_pool = rng.choice(TABLES)
    rows, columns = rng.choice((2, 3, 3, 4, 4, 5)), rng.choice((1, 2, 2, 3, 3, 4))
    *names, missing_row = choose_nouns(rng, row_pool, HELD_OUT_ROWS.get(corner, ()), rows + 1, test, 0.1)
    if row_pool in (DAYS, MONTHS) and rng.random() < 0.5:
        names.sort(key=lambda name: row_pool.index(name) if name in row_pool else 99)
    columns = min(columns, len(column_pool) - 1)
    *heads, missing_column = rng.sample(column_pool, columns + 1)
    cells = []
    for head in heads:
        pool = COLUMNS.get(head)
        low, high = rng.choice(((1, 10), (10, 100), (10, 100), (100, 1000)))
        words = rng.choices(pool, k=rows) if pool else [str(number) for number in rng.sample(range(low, high), rows)]
        cells.append(words)
    title = choose_heading(rng, test) if rng.random() < 0.4 else ""
    lines = tuple(zip(*cells, strict=True))
    return Table(title, corner, tuple(names), tuple(heads), lines, missing_row, missing_column)


def _choose_value(rng: random.Random, label: str, test: bool) -> str:
    if rng.random() < 0.12:
        return ""
    if label in ("phone", "code", "age", "room", "size"):
        return random_number(rng)
    if label == "city":
        return choose_nouns(rng, CITIES, HELD_OUT_CITIES, 1, test)[0]
    if label == "date":
        return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
    if label == "email":
        return f"{rng.choice(NAMES)}@{_free_words(rng, 1, test, 0.2, 0.6)[0]}.com"
    if label in ("name", "user") and rng.random() < 0.6:
        return choose_nouns(rng, NAMES, HELD_OUT_NAMES, 1, test)[0]
    return " ".join(_free_words(rng, rng.choice((1, 1, 2)), test, HELD_OUT_SHARE))


def choose_form(rng: random.Random, test: bool) -> Form:
    """One to four fields, up to three boxes, and groups; at most seven lines."""
    fields, boxes = rng.choice(((1, 2), (2, 0), (2, 2), (3, 0), (4, 0), (0, 3), (0, 4), (1, 3), (2, 1), (3, 2)))
    room = 6 - fields - boxes
    kinds = rng.choice((("radio",), ("select",), ("radio", "select"), ())) if room else ()
    *chosen_groups, (missing_group, _) = rng.sample(CHOICES, len(kinds) + 1)
    groups = dict(zip(kinds, chosen_groups, strict=True))
    taken = {missing_group, *(label for label, _ in groups.values())}
    *labels, missing = rng.sample([label for label in FIELDS if label not in taken], fields + 1)
    radio = select = None
    if "radio" in groups:
        label, pool = groups["radio"]
        options = tuple(rng.sample(pool, rng.choice((2, 3))))
        radio = (label, options, rng.choice(options))
    if "select" in groups:
        label, pool = groups["select"]
        select = (label, rng.choice(pool))
    ticked = [(label, rng.random() < 0.5) for label in choose_nouns(rng, BOXES, (), boxes, test, 0.2)]
    title = choose_heading(rng, test) if rng.random() < 0.5 else ""
    button = choose_nouns(rng, BUTTONS, HELD_OUT_BUTTONS, 1, test)[0] if rng.random() < 0.5 else ""
    values = tuple((label, _choose_value(rng, label, test)) for label in labels)
    return Form(title, values, tuple(ticked), radio, select, button, missing, missing_group)


def _choose_buttons(rng: random.Random, count: int, test: bool) -> tuple[tuple[Button, ...], tuple[str, ...]]:
    labels = choose_nouns(rng, BUTTONS, HELD_OUT_BUTTONS, count + 3, test)
    coloured = rng.random()
    colours = rng.sample(INKS, count) if coloured < 0.6 else [""] * count
    off = rng.randrange(count) if count > 1 and rng.random() < 0.4 else -1
    colours = ["" if index == off else colour for index, colour in enumerate(colours)]
    buttons = tuple(Button(labels[index], colours[index], index == off) for index in range(count))
    return buttons, tuple(labels[count:])


def choose_dialog(rng: random.Random, test: bool) -> Dialog:
    """A short question with one to three buttons."""
    buttons, missing = _choose_buttons(rng, rng.choice((1, 2, 2, 2, 3)), test)
    words = _free_words(rng, rng.choice((1, 2)), test, HELD_OUT_SHARE)
    message = " ".join([rng.choice(BUTTONS[2:10]) if rng.random() < 0.8 else "really", *words])
    return Dialog(choose_heading(rng, test) if rng.random() < 0.7 else "", message, buttons, missing)


def choose_bar(rng: random.Random, test: bool) -> Dialog:
    """Two to six buttons alone."""
    buttons, missing = _choose_buttons(rng, rng.choice((2, 2, 3, 3, 4, 5, 6)), test)
    return Dialog("", "", buttons, missing)


def choose_menu(rng: random.Random, test: bool) -> Menu:
    """Three to six entries."""
    count = rng.choice((3, 4, 4, 5, 6))
    nouns = choose_nouns(rng, BUTTONS + TRAIN_WORDS[::9], HELD_OUT_BUTTONS, count + 3, test)
    keys = [f"ctrl+{key}" for key in rng.sample("abcdefghkmnprstuvwxyz", count)]
    if rng.random() < 0.4:
        keys = [f"f{number}" for number in rng.sample(range(1, 10), count)]
    on, off = rng.sample(range(count), 2)
    title = choose_heading(rng, test) if rng.random() < 0.4 else ""
    shown = tuple(keys) if rng.random() < 0.4 else ()
    return Menu(title, tuple(nouns[:count]), shown, on, off if rng.random() < 0.6 else None, tuple(nouns[count:]))


def choose_notice(rng: random.Random, test: bool) -> Notice:
    """Two to five lines of one to three words."""
    kind = rng.choice(("plain", "bullets", "numbered"))
    lines: dict[str, None] = {}
    count = rng.choice((2, 3, 3, 4, 4, 5))
    while len(lines) < count:
        words = _free_words(rng, rng.choice((1, 1, 2, 2, 3)), test, 0.2)
        lines[" ".join(words)] = None
    missing = _free_words(rng, 4, test, 0.7)
    shown = " ".join(lines).split()
    return Notice(kind, choose_heading(rng, test), tuple(lines), tuple(word for word in missing if word not in shown))

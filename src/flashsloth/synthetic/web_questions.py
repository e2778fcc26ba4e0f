"""What is asked about drawn pages: one row of wordings a question, and the makers that fill them in."""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .sample import Turn, TurnMaker, phrase, yes_no_maker
from .web_facts import EMPTY, INKS, Dialog, Facts, Form, Menu, Notice, Priced, Table

NONE = "none"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
ABSENT_SHARE = 0.035  # of the weights; as there are many of them, 8 % of what is asked

# question -> (wordings, wordings of the test split)
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "price": (
        ("how much is the {0}?", "what is the price of the {0}?", "what does the {0} cost?", "price of {0}?"),
        ("how much do you pay for the {0}?", "tell me the price of the {0}."),
    ),
    "item": (("what costs {0}?", "which item costs {0}?", "which item is {0}?"), ("what has the price {0}?",)),
    "sum": (
        ("how much are the {0} and the {1} together?", "what do the {0} and the {1} cost together?",
         "what is the sum of {0} and {1}?"),
        ("what is the price of {0} and {1} together?",),
    ),
    "total": (("what is the total?", "how much is the total?", "how much is it in total?"), ("read the total.",)),
    "count_items": (("how many items are there?", "how many items are shown?", "count the items."),
                    ("how many items do you see?",)),
    "cheapest": (("what is the cheapest item?", "which item is the cheapest?", "which item costs the least?"),
                 ("what has the lowest price?",)),
    "dearest": (
        ("what is the most expensive item?", "which item is the most expensive?", "which item costs the most?"),
        ("what has the highest price?",),
    ),
    "cell": (
        ("what is the {1} of {0}?", "what is in row {0}, column {1}?", "what is the {1} for {0}?", "{1} of {0}?"),
        ("what is written in row {0} and column {1}?", "tell me the {1} of {0}."),
    ),
    "row_of": (("which row has {0} in column {1}?", "which row has the {1} {0}?", "which row says {0} under {1}?"),
               ("in which row is the {1} {0}?",)),
    "largest": (("which row has the largest {0}?", "where is the {0} the largest?", "what has the highest {0}?"),
                ("which row has the most {0}?",)),
    "smallest": (("which row has the smallest {0}?", "where is the {0} the smallest?", "what has the lowest {0}?"),
                 ("which row has the least {0}?",)),
    "count_rows": (("how many rows are there below the header?", "how many rows are below the first row?",
                    "how many rows are there without the header?"), ("count the rows below the header.",)),
    "field": (
        ("what is in the field {0}?", "what is written in the field {0}?", "what is the {0}?", "read the field {0}."),
        ("what does the field {0} say?", "which text is in the field {0}?"),
    ),
    "chosen": (
        ("which {0} is chosen?", "which option is chosen for {0}?", "what is chosen for {0}?", "what is the {0}?"),
        ("which {0} is selected?", "tell me the chosen {0}."),
    ),
    "ticked": (("is the box {0} ticked?", "is {0} ticked?", "is the box {0} checked?"), ("is {0} checked?",)),
    "only_ticked": (("which box is ticked?", "which box is checked?", "what is ticked?"), ("what is checked?",)),
    "count_ticked": (("how many boxes are ticked?", "how many boxes are checked?", "count the ticked boxes."),
                     ("how many are ticked?",)),
    "title": (("what is the title?", "read the title.", "what does the title say?"),
              ("what is written in the title?",)),
    "message": (("what does the dialog ask?", "what is the question in the dialog?", "read the message."),
                ("what does the message say?",)),
    "button_is": (("is there a button {0}?", "do you see a button {0}?", "is {0} one of the buttons?"),
                  ("does it show a button {0}?",)),
    "buttons": (("which buttons are there?", "what do the buttons say?", "read the buttons."),
                ("which buttons do you see?",)),
    "count_buttons": (("how many buttons are there?", "count the buttons.", "how many buttons are shown?"),
                      ("how many buttons do you see?",)),
    "colour": (("what colour is the button {0}?", "which colour has the button {0}?",
                "what is the colour of the button {0}?"), ("tell me the colour of the button {0}.",)),
    "button_of": (("which button is {0}?", "what does the {0} button say?", "read the {0} button."),
                  ("what is written on the {0} button?",)),
    "card_colour": (("what colour is the {0}?", "which colour has the {0}?", "what is the colour of the {0}?"),
                    ("tell me the colour of the {0}.",)),
    "card_of": (("which item is {0}?", "what is {0}?", "which item has the colour {0}?"), ("what is the {0} item?",)),
    "off_button": (("which button is disabled?", "which button is greyed out?", "what is disabled?"),
                   ("which button can not be used?",)),
    "on": (("which item is highlighted?", "which entry is highlighted?", "what is highlighted?"),
           ("which entry is selected?",)),
    "off": (("which item is disabled?", "which entry is greyed out?", "what is disabled?"),
            ("which entry can not be used?",)),
    "key": (("which key is for {0}?", "what is the key of {0}?", "what is the shortcut of {0}?"),
            ("tell me the shortcut for {0}.",)),
    "entry": (("what is the {0} item?", "what is the {0} entry?", "read the {0} entry."), ("which entry is {0}?",)),
    "count_entries": (("how many entries are there?", "how many items are in the menu?", "count the entries."),
                      ("how many entries do you see?",)),
    "line": (("read the {0} line.", "what is the {0} line?", "what does the {0} line say?"),
             ("what is written in the {0} line?",)),
    "count_lines": (("how many lines are below the title?", "how many lines are there without the title?",
                     "how many lines are under the title?"), ("count the lines below the title.",)),
    "word": (("is the word {0} shown?", "does it say {0}?", "do you see the word {0}?"), ("is {0} written here?",)),
}  # fmt: skip
# the tasks of questions that are scored together
TASK_OF = {
    "count_items": "count", "count_rows": "count", "count_buttons": "count", "count_entries": "count",
    "count_lines": "count", "count_ticked": "count", "cheapest": "extreme", "dearest": "extreme",
    "largest": "extreme", "smallest": "extreme", "only_ticked": "ticked_which", "button_of": "colour_of",
    "card_of": "colour_of", "card_colour": "colour", "off_button": "disabled", "off": "disabled", "on": "highlighted",
    "word": "find",
}  # fmt: skip


def task_name(prefix: str, key: str) -> str:
    """The task that a question counts for."""
    return f"{prefix}_{TASK_OF.get(key, key)}"


def all_tasks(prefix: str, keys: Iterable[str] = WORDINGS) -> tuple[str, ...]:
    """Every task of some questions, once, and that of what is absent."""
    return (*dict.fromkeys(task_name(prefix, key) for key in keys), f"{prefix}_absent")


def question_words(keys: Iterable[str] = WORDINGS) -> tuple[str, ...]:
    """The words of all wordings, without what is filled in."""
    texts = [text for key in keys for texts in WORDINGS[key] for text in texts]
    return tuple(dict.fromkeys(re.findall("[a-z]+", " ".join(texts))))


class Asker:
    """Makes turns about one page.

    Args:
        prefix: what the names of tasks begin with.
        test: whether wordings that are kept for the test split may be taken.
    """

    def __init__(self, rng: random.Random, prefix: str, test: bool) -> None:
        self.rng = rng
        self.prefix = prefix
        self.test = test
        self.makers: list[tuple[float, TurnMaker]] = []
        self.absent: list[Callable[[], Turn]] = []

    def turn(self, key: str, answer: str, *names: str) -> Turn:
        """One question filled in; what is not there is a task of its own."""
        wordings, kept = ([text.format(*names) for text in texts] for texts in WORDINGS[key])
        task = f"{self.prefix}_absent" if answer == NONE else task_name(self.prefix, key)
        return phrase(self.rng, task, wordings, answer, kept if self.test else ())

    def one_of(self, weight: float, key: str, rows: Sequence[tuple[str, ...]]) -> None:
        """Adds a question that may be asked of any row: the answer, then the names in the question."""
        if rows:
            self.makers.append((weight, lambda rng: self.turn(key, *rng.choice(rows))))

    def title(self, weight: float, title: str) -> None:
        """Asks for the title, which may not be there."""
        if title:
            self.one_of(weight, "title", [(title,)])
        else:
            self.missing("title")

    def missing(self, key: str, *names: str) -> None:
        """Adds a question whose answer is `none`."""
        self.absent.append(lambda: self.turn(key, NONE, *names))

    def yes_no(self, weight: float, key: str, present: Iterable[str], absent: Iterable[str]) -> None:
        """Adds yes/no questions about nouns."""
        wordings, kept = WORDINGS[key]
        take_kept = self.test and self.rng.random() < 0.5
        task = task_name(self.prefix, key)
        make = yes_no_maker(self.rng, task, kept if take_kept else wordings, present, absent)

        def marked(rng: random.Random) -> Turn | None:
            turn = make(rng)
            return turn and replace(turn, kept_wording=take_kept)

        self.makers.append((weight, marked))

    def finish(self) -> list[tuple[float, TurnMaker]]:
        """All makers; those of absent things have their share of the weight."""
        if not self.absent:
            return self.makers
        weight = ABSENT_SHARE / (1 - ABSENT_SHARE) * sum(weight for weight, _ in self.makers)
        return [*self.makers, (weight, lambda rng: rng.choice(self.absent)())]


def _ask_priced(ask: Asker, facts: Priced) -> None:
    written = [facts.written(price) for price in facts.prices]
    ask.one_of(2.0, "price", [(price, item) for price, item in zip(written, facts.items, strict=True)])
    ask.one_of(1.0, "item", [(item, price) for price, item in zip(written, facts.items, strict=True)])
    ask.missing("price", facts.missing)
    ask.missing("price", facts.missing)
    ask.missing("item", facts.written(facts.missing_price))
    if not facts.cents:
        pairs = [(a, b) for a in range(len(written)) for b in range(len(written)) if a != b]
        sums = [(str(facts.prices[a] + facts.prices[b]), facts.items[a], facts.items[b]) for a, b in pairs]
        ask.one_of(1.2, "sum", sums)
    if facts.total:
        ask.one_of(1.5, "total", [(facts.written(sum(facts.prices)),)])
    order = sorted(range(len(written)), key=facts.prices.__getitem__)
    ask.one_of(0.5, "cheapest", [(facts.items[order[0]],)])
    ask.one_of(0.5, "dearest", [(facts.items[order[-1]],)])
    ask.one_of(0.4, "count_items", [(str(len(written)),)])
    if facts.colours:
        ask.one_of(0.8, "card_colour", list(zip(facts.colours, facts.items, strict=True)))
        ask.one_of(0.8, "card_of", list(zip(facts.items, facts.colours, strict=True)))
        ask.missing("card_of", facts.missing_colour)
        ask.missing("card_colour", facts.missing)
    else:
        ask.title(0.2, facts.title)


def _ask_table(ask: Asker, facts: Table) -> None:
    cells = [
        (cell, row, column)
        for row, line in zip(facts.rows, facts.cells, strict=True)
        for column, cell in zip(facts.columns, line, strict=True)
    ]
    ask.one_of(3.0, "cell", cells)
    ask.missing("cell", facts.missing_row, ask.rng.choice(facts.columns))
    ask.missing("cell", ask.rng.choice(facts.rows), facts.missing_column)
    for column, line in zip(facts.columns, zip(*facts.cells, strict=True), strict=True):
        share = 1 / len(facts.columns)
        found = [(row, cell, column) for row, cell in zip(facts.rows, line, strict=True) if line.count(cell) == 1]
        ask.one_of(1.0 * share, "row_of", found)
        if line[0].isdigit():
            order = sorted(range(len(line)), key=lambda index: int(line[index]))
            ask.one_of(0.7 * share, "largest", [(facts.rows[order[-1]], column)])
            ask.one_of(0.7 * share, "smallest", [(facts.rows[order[0]], column)])
            digits = len(line[0])
            low, high = 10 ** (digits - 1), 10**digits
            number = str(ask.rng.randrange(low, high))
            if number not in line:
                ask.missing("row_of", number, column)
    ask.one_of(0.5, "count_rows", [(str(len(facts.rows)),)])
    ask.title(0.4, facts.title)


def _ask_form(ask: Asker, facts: Form) -> None:
    ask.one_of(2.5, "field", [(value or EMPTY, label) for label, value in facts.fields])
    ask.missing("field", facts.missing)
    ask.missing("chosen", facts.missing_group)
    groups = [(facts.radio[2], facts.radio[0])] if facts.radio else []
    groups += [(facts.select[1], facts.select[0])] if facts.select else []
    ask.one_of(2.0, "chosen", groups)
    ticked = [label for label, on in facts.boxes if on]
    ask.yes_no(2.5, "ticked", ticked, [label for label, on in facts.boxes if not on])
    if len(ticked) == 1:
        ask.one_of(0.8, "only_ticked", [(ticked[0],)])
    elif facts.boxes and not ticked:
        ask.missing("only_ticked")
    if len(facts.boxes) > 1:
        ask.one_of(0.5, "count_ticked", [(str(len(ticked)),)])
    ask.title(0.5, facts.title)
    if facts.button:
        ask.one_of(0.3, "buttons", [(facts.button,)])


def _ask_dialog(ask: Asker, facts: Dialog) -> None:
    labels = [button.label for button in facts.buttons]
    coloured = [(button.colour, button.label) for button in facts.buttons if button.colour]
    if facts.message:
        ask.one_of(2.0, "message", [(facts.message,)])
        ask.title(1.0, facts.title)
    ask.yes_no(1.5, "button_is", labels, facts.missing)
    if len(labels) < 3:
        ask.one_of(0.8, "buttons", [(" and ".join(labels),)])
    ask.one_of(0.5, "count_buttons", [(str(len(labels)),)])
    ask.one_of(1.2, "colour", coloured)
    ask.one_of(1.0, "button_of", [(label, colour) for colour, label in coloured])
    unused = [name for name in INKS if name not in dict(coloured)]
    if coloured and unused:
        ask.missing("colour", facts.missing[0])
        ask.missing("button_of", ask.rng.choice(unused))
    off = [(button.label,) for button in facts.buttons if button.off]
    ask.one_of(1.2, "off_button", off)
    if not off:
        ask.missing("off_button")


def _ask_menu(ask: Asker, facts: Menu) -> None:
    ask.one_of(2.0, "on", [(facts.entries[facts.on],)])
    places = [(entry, ORDINALS[index]) for index, entry in enumerate(facts.entries)]
    ask.one_of(1.2, "entry", [*places, (facts.entries[-1], "last")])
    if len(facts.entries) < len(ORDINALS):
        ask.missing("entry", ORDINALS[len(facts.entries)])
    if facts.keys:
        ask.one_of(1.6, "key", list(zip(facts.keys, facts.entries, strict=True)))
        ask.missing("key", facts.missing[0])
    if facts.off is None:
        ask.missing("off")
    else:
        ask.one_of(1.5, "off", [(facts.entries[facts.off],)])
    ask.yes_no(0.8, "word", facts.entries, facts.missing)
    ask.one_of(0.5, "count_entries", [(str(len(facts.entries)),)])
    ask.title(0.4, facts.title)


def _ask_notice(ask: Asker, facts: Notice) -> None:
    # below a title the first line could be either; the last is plain
    places = [(line, "last") for line in facts.lines[-1:]]
    if facts.kind != "plain":
        places = [(line, ORDINALS[index]) for index, line in enumerate(facts.lines)]
        ask.one_of(2.0, "entry", places)
        ask.missing("entry", ORDINALS[len(facts.lines)])
    else:
        ask.one_of(1.2, "line", places)
    ask.title(1.0, facts.title)
    ask.yes_no(1.5, "word", dict.fromkeys(" ".join(facts.lines).split()), facts.missing)
    ask.one_of(0.5, "count_lines", [(str(len(facts.lines)),)])


ASKERS: dict[type, Callable[..., None]] = {
    Priced: _ask_priced, Table: _ask_table, Form: _ask_form, Dialog: _ask_dialog, Menu: _ask_menu, Notice: _ask_notice,
}  # fmt: skip


def question_makers(rng: random.Random, facts: Facts, prefix: str, test: bool) -> list[tuple[float, TurnMaker]]:
    """What can be asked about a page."""
    ask = Asker(rng, prefix, test)
    ASKERS[type(facts)](ask, facts)
    return ask.finish()

"""Writes what a page says as HTML."""

import random
from collections.abc import Callable, Iterable
from html import escape

from .colours import COLOURS
from .web_facts import Button, Dialog, Facts, Form, Menu, Notice, Priced, Table
from .web_themes import Look, css_colour, ink_on


class _Writer:
    """Elements with cased and escaped text."""

    def __init__(self, rng: random.Random, look: Look) -> None:
        self.rng = rng
        self.look = look

    def tag(self, name: str, text: str, kind: str = "", style: str = "") -> str:
        return self.wrap(name, [escape(self.look.cased(text))], kind, style)

    def wrap(self, name: str, parts: Iterable[str], kind: str = "", style: str = "") -> str:
        attributes = (f' class="{kind}"' if kind else "") + (f' style="{style}"' if style else "")
        return f"<{name}{attributes}>{''.join(parts)}</{name}>"

    def heading(self, title: str) -> str:
        return self.tag("h1", title) if title else ""

    def button(self, button: Button) -> str:
        style = ""
        if button.colour:
            fill = COLOURS[button.colour]
            style = f"background:{css_colour(fill)};color:{css_colour(ink_on(fill))}"
        return self.tag("button", button.label, "off" if button.off else "", style)

    def buttons(self, buttons: Iterable[Button]) -> str:
        kind = self.rng.choice(("buttons", "buttons", "buttons right", "buttons column"))
        return self.wrap("div", map(self.button, buttons), kind)


def _priced(write: _Writer, facts: Priced) -> str:
    rows = [(name, facts.sign + facts.written(price)) for name, price in zip(facts.items, facts.prices, strict=True)]
    if facts.colours:
        top = write.rng.choice(("card left", "card top"))
        across = 2 if len(rows) == 4 or write.rng.random() < 0.5 else 1
        cards = (
            write.wrap(
                "div", [write.tag("div", name), write.tag("div", price, "price")], top,
                f"--own:{css_colour(COLOURS[colour])}",
            )
            for (name, price), colour in zip(rows, facts.colours, strict=True)
        )  # fmt: skip
        return write.heading(facts.title) + write.wrap("div", cards, "cards", f"--across:{across}")
    lines = [write.wrap("div", [write.tag("span", cell) for cell in row], "line") for row in rows]
    if facts.total:
        cells = [write.tag("span", "total"), write.tag("span", facts.sign + facts.written(sum(facts.prices)))]
        lines.append(write.wrap("div", cells, "line sum", "border-top:2px solid var(--ink)"))
    return write.heading(facts.title) + "".join(lines)


def _table(write: _Writer, facts: Table) -> str:
    corner = facts.corner if write.rng.random() < 0.6 else ""
    head = write.wrap("tr", (write.tag("th", text) for text in (corner, *facts.columns)))
    first = write.rng.choice(("th", "td"))
    body = (
        write.wrap("tr", [write.tag(first, row), *(write.tag("td", cell) for cell in cells)])
        for row, cells in zip(facts.rows, facts.cells, strict=True)
    )
    return write.heading(facts.title) + write.wrap("table", [head, *body], "numbers")


def _form(write: _Writer, facts: Form) -> str:
    colon = write.rng.choice(("", ":"))
    mark = write.rng.choice(("native", "native", "mark", "cross"))

    def tick(text: str, ticked: bool, kind: str) -> str:
        if mark == "native":
            sign = f'<input type="{kind}"{" checked" if ticked else ""}>'
        else:
            sign = f'<b class="{"round" if kind == "radio" else mark}{" yes" if ticked else ""}"></b>'
        return write.wrap("div", [sign, write.tag("span", text)], "tick")

    def labelled(label: str, inside: str) -> str:
        return write.wrap("div", [write.tag("span", label + colon), inside], "field")

    parts = [labelled(label, write.tag("div", value, "box")) for label, value in facts.fields]
    if facts.select:
        label, value = facts.select
        parts.append(labelled(label, write.wrap("div", [write.tag("span", value), "<i></i>"], "box pick")))
    if facts.radio:
        label, options, chosen = facts.radio
        listed = write.wrap("div", [tick(option, option == chosen, "radio") for option in options], "options")
        parts.append(write.tag("div", label + colon) + listed)
    boxes = [tick(label, ticked, "checkbox") for label, ticked in facts.boxes]
    parts = [*boxes, *parts] if write.rng.random() < 0.2 else [*parts, *boxes]
    if facts.button:
        parts.append(write.buttons([Button(facts.button)]))
    few = len(facts.fields) + len(facts.boxes) < 4
    return write.heading(facts.title) + write.wrap("div", parts, "above" if few and write.rng.random() < 0.5 else "")


def _dialog(write: _Writer, facts: Dialog) -> str:
    message = write.tag("p", facts.message + "?") if facts.message else ""
    return write.heading(facts.title) + message + write.buttons(facts.buttons)


def _menu(write: _Writer, facts: Menu) -> str:
    lines = []
    for index, entry in enumerate(facts.entries):
        cells = [write.tag("span", entry)] + ([write.tag("span", facts.keys[index])] if facts.keys else [])
        state = " on" if index == facts.on else " off" if index == facts.off else ""
        lines.append(write.wrap("div", cells, "entry" + state))
    return write.heading(facts.title) + write.wrap("div", lines, "menu")


def _notice(write: _Writer, facts: Notice) -> str:
    if facts.kind == "bullets":
        body = [write.wrap("ul", (write.tag("li", line) for line in facts.lines))]
    else:  # numbers are written as text, as a list's own have no known place
        starts = [f"{number}. " if facts.kind == "numbered" else "" for number in range(1, len(facts.lines) + 1)]
        body = [write.tag("p", start + line) for start, line in zip(starts, facts.lines, strict=True)]
    return write.heading(facts.title) + "".join(body)


BUILDERS: dict[type, Callable[..., str]] = {
    Priced: _priced, Table: _table, Form: _form, Dialog: _dialog, Menu: _menu, Notice: _notice,
}  # fmt: skip


def write_html(rng: random.Random, facts: Facts, look: Look) -> str:
    """The head and body of a page; what is shown has the id `page`."""
    body = BUILDERS[type(facts)](_Writer(rng, look), facts)
    return f"<head><style>{look.css}</style></head><body><div id=page>{body}</div></body>"

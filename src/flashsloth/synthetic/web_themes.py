"""How drawn pages look: fonts, palettes and style sheets, each with some that only the test split uses."""

import random
from dataclasses import dataclass

from .colours import COLOURS, MIN_DISTANCE, RGB, choose_ink, distance, jitter, luminance

# (family, what stands in where it is not installed)
FONTS: tuple[tuple[str, str], ...] = (
    ("Arimo", "sans-serif"), ("Cabin", "sans-serif"), ("Caladea", "serif"), ("Cantarell", "sans-serif"),
    ("Carlito", "sans-serif"), ("Comic Neue", "cursive"), ("Courier Prime", "monospace"),
    ("DejaVu Sans", "sans-serif"), ("DejaVu Sans Condensed", "sans-serif"), ("DejaVu Sans Mono", "monospace"),
    ("DejaVu Serif", "serif"), ("Dosis", "sans-serif"), ("EB Garamond", "serif"),
    ("Fantasque Sans Mono", "monospace"), ("Fira Code", "monospace"), ("FreeMono", "monospace"),
    ("FreeSans", "sans-serif"), ("FreeSerif", "serif"), ("Gentium", "serif"), ("Go", "sans-serif"),
    ("Inconsolata", "monospace"), ("Inter", "sans-serif"), ("Junction", "sans-serif"), ("Lato", "sans-serif"),
    ("Liberation Mono", "monospace"), ("Liberation Sans", "sans-serif"), ("Liberation Serif", "serif"),
    ("Linux Biolinum O", "sans-serif"), ("Linux Libertine O", "serif"), ("mononoki", "monospace"),
    ("Nimbus Sans Narrow", "sans-serif"), ("Open Sans", "sans-serif"), ("P052", "serif"),
    ("Quicksand", "sans-serif"), ("Roboto", "sans-serif"), ("Roboto Condensed", "sans-serif"),
    ("URW Gothic", "sans-serif"), ("C059", "serif"), ("Hack", "monospace"),
)  # fmt: skip
HELD_OUT_FONTS: tuple[tuple[str, str], ...] = (
    ("Karla", "sans-serif"), ("Vollkorn", "serif"), ("URW Bookman", "serif"), ("JetBrains Mono", "monospace"),
    ("Play", "sans-serif"),
)  # fmt: skip
HELD_OUT_SHARE = 0.25  # of test pages, for the fonts and for the theme

BASE = """
* { box-sizing: border-box; margin: 0; font-variant: no-contextual no-common-ligatures lining-nums }
html { background: var(--ground); overflow: hidden }
body { color: var(--ink); font: 16px/1.35 var(--font) }
#page { display: inline-block; width: max-content; background: var(--paper); padding: .5em .6em }
h1 { font-size: 1.1em; font-weight: var(--heading); padding-bottom: .25em; text-align: var(--align) }
table { border-collapse: collapse } th, td { padding: var(--pad) .5em } th { text-align: left; font-weight: var(--heading) }
.line { display: flex; justify-content: space-between; gap: 1.5em; padding: .1em 0 } .line.sum { font-weight: bold }
.numbers td + td, .numbers th + th { text-align: var(--cells) }
button { font: inherit; color: var(--ink); padding: .25em .7em; margin: .2em; background: var(--stripe); border: 1px solid var(--line) }
.buttons { display: flex; flex-wrap: wrap; margin-top: .3em; max-width: 15em } .right { justify-content: flex-end }
.column { flex-direction: column; align-items: stretch } .off, button.off { color: var(--muted) }
.field { display: flex; align-items: center; justify-content: space-between; gap: .6em; margin: .28em 0 }
.above .field { flex-direction: column; align-items: stretch; gap: .05em }
.box { min-width: 6.5em; min-height: 1.65em; padding: .1em .4em; border: 1px solid var(--muted); background: var(--field); color: var(--fieldink) }
.pick { display: flex; justify-content: space-between; gap: .5em } .pick i { border: .3em solid transparent; border-top-color: currentColor; align-self: center; margin-top: .3em }
.tick { display: flex; align-items: center; gap: .45em; margin: .22em 0 } .options { display: flex; gap: .7em; flex-wrap: wrap; max-width: 14em }
input { width: 1.05em; height: 1.05em; accent-color: var(--accent); flex: none }
.tick b, .drawn { width: 1em; height: 1em; border: .1em solid var(--ink); flex: none; position: relative }
.tick b.round { border-radius: 50% } .tick b.yes.round::after { content: ''; position: absolute; inset: .15em; border-radius: 50%; background: var(--ink) }
.tick b.yes.mark::after { content: ''; position: absolute; left: .28em; top: -.05em; width: .22em; height: .58em; border: solid var(--ink); border-width: 0 .14em .14em 0; transform: rotate(40deg) }
.tick b.yes.cross::after { content: ''; position: absolute; inset: .02em; background: linear-gradient(45deg, transparent 42%, var(--ink) 42% 58%, transparent 58%), linear-gradient(-45deg, transparent 42%, var(--ink) 42% 58%, transparent 58%) }
.menu { border: 1px solid var(--line); padding: .2em 0 } .entry { display: flex; justify-content: space-between; gap: 1.6em; padding: .12em .7em }
.entry.on { background: var(--accent); color: var(--onaccent) }
.cards { display: grid; gap: .4em; grid-template-columns: repeat(var(--across), 1fr) } .card { border: 1px solid var(--line); padding: .3em .5em }
#page .left { border-left: .5em solid var(--own) } #page .top { border-top: .6em solid var(--own) } .price { font-weight: bold }
ul { padding-left: 1.4em } p { padding: .08em 0; max-width: 15em }
"""  # noqa: E501
THEMES: dict[str, str] = {
    "plain": "td, th { border: 1px solid var(--line) }",
    "ruled": "th, td { border-bottom: 1px solid var(--line) } .box { border-width: 0 0 1px }"
    " button { border-width: 0 0 2px; background: none } .menu { border: 0 }",
    "striped": "tr:nth-child(even), .line:nth-of-type(even), .entry:nth-child(even):not(.on)"
    " { background: var(--stripe) }",
    "flat": "button { border: 0; border-radius: .4em } th { background: var(--accent); color: var(--onaccent) }"
    " .box, .card, .menu { border-radius: .35em } h1 { color: var(--deep) }",
    "pill": "button, .box { border-radius: 1em; padding-left: .9em; padding-right: .9em }"
    " .card { border-radius: .6em } #page { border-radius: .8em } .entry.on { border-radius: .6em }"
    " th { border-bottom: 2px solid var(--accent) }",
    "shadow": "#page { box-shadow: 0 .1em .4em #0006 } button, .card { box-shadow: 0 .08em .2em #0006; border: 0 }"
    " tr:first-child { background: var(--stripe) } .menu { box-shadow: 0 .2em .5em #0005; border: 0 }",
    "dashed": ".line { border-bottom: 1px dashed var(--muted) } #page { border: 1px dashed var(--muted) }"
    " td { border-left: 1px dotted var(--muted) } .card { border-style: dashed }",
    "window": "#page { border: 2px solid var(--ink); padding-top: 0 } h1 { background: var(--ink);"
    " color: var(--paper); margin: 0 -.55em .4em; padding: .15em .5em } td, th { border: 1px solid var(--line) }",
}  # fmt: skip
HELD_OUT_THEMES: dict[str, str] = {
    "bevelled": "#page { border: 3px outset var(--stripe); padding-top: .3em }"
    " button { border: 3px outset var(--stripe) } .box, table, .card { border: 2px inset var(--stripe) }"
    " h1 { background: linear-gradient(90deg, var(--accent),"
    " var(--accent) 30%, var(--stripe)); color: var(--onaccent); padding: .1em .4em; margin-bottom: .4em }"
    " td, th { border: 1px solid var(--stripe) } .entry.on { outline: 1px dotted var(--ink) }",
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """The style sheet of one page and what its builder must know of it."""

    css: str
    paper: RGB
    ground: RGB
    case: str
    held_out: bool

    def cased(self, text: str) -> str:
        return getattr(text, self.case)()


def _mix(first: RGB, second: RGB, share: float) -> RGB:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def css_colour(colour: RGB) -> str:
    """As #rrggbb."""
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def ink_on(colour: RGB) -> RGB:
    """Black or white, whichever is read better."""
    return (10, 10, 10) if luminance(colour) > 125 else (255, 255, 255)


def choose_look(rng: random.Random, test: bool) -> Look:
    """A font, a theme, a palette and the lesser habits of a style sheet."""
    kept_font, kept_theme = (test and rng.random() < HELD_OUT_SHARE for _ in range(2))
    family, generic = rng.choice(HELD_OUT_FONTS if kept_font else FONTS)
    theme = rng.choice(list((HELD_OUT_THEMES if kept_theme else THEMES).values()))
    ink, paper = ((15, 15, 15), (255, 255, 255)) if rng.random() < 0.25 else choose_ink(rng)
    seen = [colour for name, colour in COLOURS.items() if distance(colour, paper) > MIN_DISTANCE and name != "white"]
    accent = jitter(rng, rng.choice(seen or [ink]), 20)
    ground = paper if rng.random() < 0.5 else _mix(paper, rng.choice((ink, accent)), rng.uniform(0.1, 0.35))
    light = luminance(paper) > 125
    bright_field = light and rng.random() < 0.6
    colours = {
        "paper": paper,
        "ground": ground,
        "ink": ink,
        "line": _mix(paper, ink, rng.uniform(0.25, 0.8)),
        "muted": _mix(paper, ink, 0.48),
        "stripe": _mix(paper, ink, rng.uniform(0.07, 0.16)),
        "accent": accent,
        "onaccent": ink_on(accent),
        "deep": _mix(ink, accent, 0.4),
        "field": (255, 255, 255) if bright_field else _mix(paper, ink, 0.05),
        "fieldink": (10, 10, 10) if bright_field else ink,
    }
    others = {
        "font": f"'{family}', {generic}",
        "heading": rng.choice(("bold", "bold", "normal")),
        "align": rng.choice(("left", "left", "center")),
        "cells": rng.choice(("left", "center", "right", "right")),
        "pad": f"{rng.uniform(0.08, 0.3):.2f}em",
    }
    values = {name: css_colour(colour) for name, colour in colours.items()} | others
    variables = ";".join(f"--{name}:{value}" for name, value in values.items())
    weight = " body { font-weight: bold }" if rng.random() < 0.12 else ""
    case = rng.choices(("lower", "title", "capitalize", "upper"), (4, 3, 3, 2))[0]
    css = f":root {{ {variables} }} {BASE} {theme}{weight}"
    return Look(css, paper, ground, case, kept_font or kept_theme)

"""Pages as browsers show them, drawn by Chromium: receipts, cards, tables, forms, dialogs, buttons, menus, notices.

Needs `pip install 'flashsloth[draw]'` and a Chromium (Debian: `apt-get install chromium`). Fonts are those that the
machine has, and a generic family takes the place of any other; these Debian packages hold all of `web_themes.FONTS`:
fonts-cabin fonts-cantarell fonts-comic-neue fonts-courier-prime fonts-crosextra-caladea fonts-crosextra-carlito
fonts-dejavu-core fonts-dejavu-extra fonts-dosis fonts-ebgaramond fonts-fantasque-sans fonts-firacode
fonts-freefont-ttf fonts-go fonts-hack fonts-inconsolata fonts-inter fonts-jetbrains-mono fonts-junction fonts-karla
fonts-lato fonts-liberation2 fonts-linuxlibertine fonts-mononoki fonts-open-sans fonts-play fonts-quicksand
fonts-roboto-unhinted fonts-sil-gentium fonts-urw-base35 fonts-vollkorn.
A seed gives the same questions everywhere, and the same pixels for the same fonts and Chromium.
"""

import random
from collections.abc import Callable

from .augment import augment
from .colours import COLOURS, MIN_DISTANCE, distance
from .sample import Sample, choose_turns
from .web_browser import open_browser
from .web_facts import (
    CAPTION_WORDS,
    EMPTY,
    Facts,
    choose_bar,
    choose_cards,
    choose_dialog,
    choose_form,
    choose_menu,
    choose_notice,
    choose_priced,
    choose_table,
    kept_for_test,
    shown_colours,
)
from .web_html import write_html
from .web_questions import NONE, ORDINALS, all_tasks, question_makers, question_words
from .web_themes import choose_look

KINDS: dict[str, tuple[float, Callable[[random.Random, bool], Facts]]] = {
    "receipt": (2.5, choose_priced),
    "cards": (1.2, choose_cards),
    "table": (3.0, choose_table),
    "form": (3.0, choose_form),
    "dialog": (1.5, choose_dialog),
    "bar": (1.0, choose_bar),
    "menu": (1.5, choose_menu),
    "notice": (1.3, choose_notice),
}
LEAST_TEXT, LARGEST_TEXT = 13 / 288, 34 / 288  # size of letters as a share of the longer side
PAGE_TEXT = 16  # size in the style sheet
ATTEMPTS = 20


def render_web(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws one page and asks about it."""
    browser = open_browser()
    weights = [weight for weight, _ in KINDS.values()]
    for _ in range(ATTEMPTS):
        _, choose = rng.choices(list(KINDS.values()), weights)[0]
        facts, look = choose(rng, test), choose_look(rng, test)
        margin = image_size * rng.choice((0.01, 0.02, 0.03, 0.05))
        largest = image_size * rng.uniform(0.7, 1) * LARGEST_TEXT / PAGE_TEXT
        html = write_html(rng, facts, look)
        shot = browser.show(html, image_size, margin, largest, rng.random(), rng.random())
        # else what is written is too wide or too long to be read, or a colour that is asked for is hardly seen
        seen = min((distance(COLOURS[name], look.paper) for name in shown_colours(facts)), default=MIN_DISTANCE)
        if shot.least_text >= LEAST_TEXT * image_size and seen >= MIN_DISTANCE:
            break
    image = augment(browser.photograph(shot), rng, look.ground, shot.glyphs)
    chosen = choose_turns(rng, question_makers(rng, facts, "web", test), turns)
    caption = facts.caption()
    return Sample(image, "web", caption, chosen, look.held_out or kept_for_test(caption), shot.glyphs)


WEB_TASKS = all_tasks("web")
WEB_WORDS = tuple(
    dict.fromkeys([*question_words(), *sorted(CAPTION_WORDS), NONE, EMPTY, "and", "yes", "no", *ORDINALS, "last"])
)

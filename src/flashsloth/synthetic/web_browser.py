"""One Chromium page a process: shows a document at an exact size and tells where every character stands."""

import atexit
import base64
import io
import json
import os
import shutil
import threading
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from .sample import Glyph

PROGRAM_VARIABLE = "FLASHSLOTH_CHROMIUM"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
INSTALL_COMMAND = "pip install 'flashsloth[draw]'"
# text is drawn in grey levels, as colour fringes belong to one kind of screen; nothing is asked of the network
ARGUMENTS = (
    "--disable-gpu",
    "--disable-lcd-text",
    "--force-color-profile=srgb",
    "--disable-background-networking",
    "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
# Fits #page into the wanted room by a transform, which keeps the layout as it was found, and returns
# [width, height, least height of text, characters, x, y, x, y, ...]. Reads each character's box through a Range.
SHOW = """
([html, longer, margin, largest, across, down]) => {
    document.documentElement.innerHTML = html;
    const page = document.getElementById('page');
    const natural = page.getBoundingClientRect();
    const shorter = longer / 2;
    let scale = Math.min((longer - 2 * margin) / Math.max(natural.width, natural.height), largest);
    const side = length => Math.round(Math.min(longer, Math.max(shorter, length * scale + 2 * margin)));
    let width = side(natural.width), height = side(natural.height);
    if (natural.width >= natural.height) width = longer; else height = longer;
    const left = margin + across * (width - 2 * margin - natural.width * scale);
    const top = margin + down * (height - 2 * margin - natural.height * scale);
    page.style.cssText += `;position:absolute;left:0;top:0;transform-origin:0 0;` +
        `transform:translate(${left}px,${top}px) scale(${scale})`;
    const characters = [], places = [];
    let least = 1e9;
    const walker = document.createTreeWalker(page, NodeFilter.SHOW_TEXT), range = document.createRange();
    while (walker.nextNode()) {
        const node = walker.currentNode, text = node.data;
        if (!text.trim()) continue;
        const style = getComputedStyle(node.parentElement);
        least = Math.min(least, parseFloat(style.fontSize) * scale);
        for (let index = 0; index < text.length; index++) {
            const character = text[index];
            if (character < '!' || character > '~') continue;
            range.setStart(node, index);
            range.setEnd(node, index + 1);
            const box = range.getClientRects()[0];
            if (!box) continue;
            characters.push(character);
            places.push((box.left + box.right) / 2, (box.top + box.bottom) / 2);
        }
    }
    // one text passes several times as quickly as a list of numbers
    return JSON.stringify([width, height, least, characters.join(''), places]);
}
"""


@dataclass(frozen=True)
class Shot:
    """A document laid out: its size in pixels, the least size of its text, and its characters."""

    width: int
    height: int
    least_text: float
    glyphs: list[Glyph]


def find_program() -> str | None:
    """The Chromium to use: what FLASHSLOTH_CHROMIUM names, else the first one installed."""
    named = os.environ.get(PROGRAM_VARIABLE)
    return named or next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """A headless Chromium with one page that is never connected to a network."""

    def __init__(self) -> None:
        try:
            from playwright.sync_api import Error, sync_playwright
        except ImportError as error:
            raise ImportError(f"Web pages are drawn with playwright; install it with {INSTALL_COMMAND}.") from error
        program = find_program()
        if program is None:
            raise ValueError(
                f"Web pages are drawn by Chromium, and none of {', '.join(PROGRAMS)} is installed; install it "
                f"(apt-get install chromium) or let {PROGRAM_VARIABLE} name its file."
            )
        self._driver = sync_playwright().start()
        try:
            self._browser = self._driver.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        except Error as error:
            self._driver.stop()
            raise ValueError(f"{program} did not start as a browser ({error}); set {PROGRAM_VARIABLE}.") from error
        context = self._browser.new_context(viewport={"width": 288, "height": 288}, offline=True)
        self._page = context.new_page()
        self._session = context.new_cdp_session(self._page)
        self._side = 288

    def show(self, html: str, longer: int, margin: float, largest: float, across: float, down: float) -> Shot:
        """Lays a document out.

        Args:
            html: head and body; the element with the id `page` is what is shown.
            longer: pixels of the longer side; the other is at least half of it.
            margin: pixels around the element.
            largest: the most by which it is enlarged.
            across: where it stands if there is room, 0 for left to 1 for right.
            down: the same from top to bottom.
        """
        if longer != self._side:
            self._page.set_viewport_size({"width": longer, "height": longer})
            self._side = longer
        answer: str = self._page.evaluate(SHOW, [html, longer, margin, largest, across, down])
        width, height, least, characters, places = json.loads(answer)
        glyphs = [Glyph(*at) for at in zip(characters, places[::2], places[1::2], strict=True)]
        return Shot(width, height, least, glyphs)

    def photograph(self, shot: Shot) -> Image.Image:
        """The pixels of what was shown last."""
        data = self._session.send("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": True})["data"]
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        return image.crop((0, 0, shot.width, shot.height))

    def close(self) -> None:
        """Ends the program."""
        self._browser.close()
        self._driver.stop()


@lru_cache(maxsize=4)
def _open(process: int, thread: int) -> Browser:
    browser = Browser()

    def close() -> None:
        # a forked worker inherits this function, but the browser is its parent's
        if os.getpid() == process and threading.get_ident() == thread:
            browser.close()

    atexit.register(close)
    return browser


def open_browser() -> Browser:
    """The browser of this process and thread, started at its first use."""
    return _open(os.getpid(), threading.get_ident())

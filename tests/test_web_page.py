"""The page in a real browser: `make test-page`, or `pytest -m browser` where gradio, Playwright and Chromium are."""

import os
import shutil
import threading
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn")

from flashsloth.checkpoints.hub import ASSETS  # noqa: E402
from flashsloth.inference import load  # noqa: E402
from flashsloth.serve.app import create_app  # noqa: E402
from flashsloth.serve.engine import Engine  # noqa: E402
from flashsloth.serve.settings import Settings  # noqa: E402
from flashsloth.web.page import mount_page  # noqa: E402
from flashsloth.web.sources import InProcess, Remote  # noqa: E402
from flashsloth_cli.listening import listen  # noqa: E402

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("FLASHSLOTH_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SAMPLES = ASSETS / "samples"
RED, RED_ANSWER = "what shape is the red object?", "cross"
BLUE, BLUE_ANSWER = "what shape is the blue object?", "triangle"
WAIT = 60_000  # milliseconds; a busy machine is slow
# what a browser says of a page that is well
HARMLESS = ("Autofocus processing was blocked", "Method not implemented")


@contextmanager
def serving(app):
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def running():
    session = load("nano", device="cpu")
    engine = Engine(session)
    engine.start()
    yield engine, session
    engine.stop()


@pytest.fixture(scope="module")
def address(running):
    settings = Settings(max_images=3)
    app = mount_page(create_app(running[0], settings), InProcess({"nano": running}), settings)
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; install Debian's package, or name one in FLASHSLOTH_CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, address, width=1200, height=1000, **options):
    """A tab on the page; whatever it says in its console that is no information fails the test."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    problems = []
    tab.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(address)
    tab.wait_for_selector("#flashsloth-question textarea")
    yield tab
    context.close()
    assert not [problem for problem in problems if not problem.startswith(HARMLESS)]


def add(tab, *files):
    tab.set_input_files("#flashsloth-images input[type=file]", files)
    tab.wait_for_selector("#flashsloth-images img")
    tab.wait_for_timeout(300)


def ask(tab, question):
    tab.fill("#flashsloth-question textarea", question)
    tab.click("#flashsloth-ask")


def answers(tab):
    return tab.locator("#flashsloth-chat [data-testid=bot]").all_inner_texts()


def wait_for_maps(tab, count):
    tab.wait_for_function(f"document.querySelectorAll('iframe.flashsloth-map').length === {count}")


def test_upload_ask_and_ask_again(browser, address, running):
    with opened(browser, address) as tab:
        add(tab, SAMPLES / "scene.jpg")
        ask(tab, RED)
        wait_for_maps(tab, 1)
        assert tab.locator("#flashsloth-question textarea").input_value() == ""
        ask(tab, BLUE)
        wait_for_maps(tab, 2)
        texts = "\n".join(answers(tab))
        assert RED_ANSWER in texts and "16 visual tokens instead of 144" in texts and "first words after" in texts
        for stage in ("preprocess", "encode", "compress", "prefill", "decode"):
            assert stage in texts
        own = running[1].conversation(SAMPLES / "scene.jpg")
        expected = [own.ask(RED).text, own.ask(BLUE).text]
        shown = [tab.frame_locator("iframe.flashsloth-map").nth(n).locator("#answer button") for n in range(2)]
        assert [buttons.first.inner_text() for buttons in shown] == [text.split()[0] for text in expected]
        if pictures := os.environ.get("FLASHSLOTH_SCREENSHOTS"):
            tab.screenshot(path=Path(pictures) / "page.png")


def test_answers_are_streamed(browser, running):
    """Text is on the page before the answer is whole."""

    class Slow(InProcess):
        def answer(self, *args):
            for piece in super().answer(*args):
                yield piece
                go_on.wait(30)

    go_on = threading.Event()
    settings = Settings()
    app = mount_page(create_app(running[0], settings), Slow({"nano": running}), settings)
    with serving(app) as url, opened(browser, url) as tab:
        add(tab, SAMPLES / "scene.jpg")
        ask(tab, RED)
        tab.wait_for_function(
            "document.querySelectorAll('#flashsloth-chat [data-testid=bot]').length === 1 && "
            "document.querySelector('#flashsloth-chat [data-testid=bot]').innerText.trim().length > 0"
        )
        assert tab.locator("iframe.flashsloth-map").count() == 0
        go_on.set()
        wait_for_maps(tab, 1)


def test_words_are_pointed_at(browser, address):
    with opened(browser, address) as tab:
        add(tab, SAMPLES / "scene.jpg")
        ask(tab, RED)
        wait_for_maps(tab, 1)
        page = tab.frame_locator("iframe.flashsloth-map")

        def pixels():
            return page.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")

        plain = pixels()
        words = page.locator("#question button")
        assert words.all_inner_texts() == RED.split()
        words.nth(4).hover()
        assert "red" in page.locator("#shown").inner_text()
        page.get_by_label("what the image offers (SAP)").check()
        page.locator("#shown").hover()
        assert pixels() != plain and "SAP" in page.locator("#shown").inner_text()
        page.get_by_label("none").check()
        colours = page.locator("canvas").first.evaluate(
            "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(x => x)"
        )
        assert colours is False


def test_bad_files_are_refused_with_a_message(browser, address, tmp_path):
    broken = tmp_path / "broken.png"
    buffer = BytesIO()
    Image.new("RGB", (30, 30)).save(buffer, "PNG")
    broken.write_bytes(buffer.getvalue()[:60])
    (tmp_path / "text.txt").write_text("no image")
    with opened(browser, address) as tab:
        tab.set_input_files("#flashsloth-images input[type=file]", broken)
        tab.wait_for_selector("text=broken.png cannot be used")
        tab.wait_for_function("document.querySelectorAll('#flashsloth-images img').length === 0")
        tab.set_input_files("#flashsloth-images input[type=file]", tmp_path / "text.txt")
        tab.wait_for_selector("text=/invalid file type/i")
        ask(tab, " ")
        tab.wait_for_selector("text=Write a question first")
        add(tab, SAMPLES / "scene.jpg")  # and the page goes on
        ask(tab, RED)
        wait_for_maps(tab, 1)


def test_too_many_images_are_told(browser, address):
    with opened(browser, address) as tab:
        add(tab, *[SAMPLES / name for name in ("scene.jpg", "chart.jpg", "sign.jpg")], SAMPLES / "scene.jpg")
        tab.wait_for_selector("text=Only the first 3 images are kept")


def test_two_tabs_do_not_mix(browser, address):
    with opened(browser, address) as first, opened(browser, address) as second:
        add(first, SAMPLES / "scene.jpg")
        add(second, SAMPLES / "chart.jpg")
        ask(first, RED)
        ask(second, "which one is the largest?")
        wait_for_maps(first, 1)
        wait_for_maps(second, 1)
        assert "cross" in "".join(answers(first)) and "sun" in "".join(answers(second))
        assert "sun" not in "".join(answers(first)) and "cross" not in "".join(answers(second))


def test_keyboard_alone(browser, address):
    """An example is chosen and asked, and a word pinned, without a mouse."""
    with opened(browser, address) as tab:
        for _ in range(30):
            tab.keyboard.press("Tab")
            focused = tab.evaluate("document.activeElement.tagName + document.activeElement.innerText")
            if focused.startswith("BUTTON") and "red object" in focused:
                break
        tab.keyboard.press("Enter")
        tab.wait_for_function("document.querySelector('#flashsloth-question textarea').value.includes('red object')")
        tab.wait_for_selector("#flashsloth-images img")
        for _ in range(30):
            tab.keyboard.press("Tab")
            if tab.evaluate("document.activeElement.matches('#flashsloth-question textarea')"):
                break
        tab.keyboard.press("Enter")
        wait_for_maps(tab, 1)
        frame = tab.frame_locator("iframe.flashsloth-map")
        word = frame.locator("#question button").nth(4)
        for _ in range(60):
            if word.evaluate("word => word === document.activeElement"):
                break
            tab.keyboard.press("Shift+Tab")
        tab.keyboard.press("Enter")
        assert word.get_attribute("aria-pressed") == "true"
        assert "red" in frame.locator("#shown").inner_text()


def test_a_phone(browser, address):
    with opened(browser, address, width=390, height=844, has_touch=True) as tab:
        add(tab, SAMPLES / "scene.jpg")
        ask(tab, RED)
        wait_for_maps(tab, 1)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        box = tab.locator("iframe.flashsloth-map").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        inner = tab.frame_locator("iframe.flashsloth-map").locator("html")
        assert inner.evaluate("page => page.scrollWidth <= page.clientWidth")
        if pictures := os.environ.get("FLASHSLOTH_SCREENSHOTS"):
            tab.screenshot(path=Path(pictures) / "phone.png", full_page=True)


def test_new_images_begin_a_new_conversation(browser, address):
    with opened(browser, address) as tab:
        add(tab, SAMPLES / "scene.jpg")
        ask(tab, RED)
        wait_for_maps(tab, 1)
        tab.click("text=sign: what is the price of the map?")
        tab.wait_for_function("document.querySelector('#flashsloth-question textarea').value.includes('price')")
        tab.click("#flashsloth-ask")
        tab.wait_for_selector("text=what is the price of the map? >> nth=1")
        wait_for_maps(tab, 1)
        assert RED_ANSWER not in "".join(answers(tab))
        assert "6" in "".join(answers(tab))
        tab.click("text=New chat")
        wait_for_maps(tab, 0)


def test_a_page_in_front_of_another_server(browser, running):
    """Streams from it, shows what it tells of the cost, and no map; and says so where it is gone."""
    settings = Settings(model_name="tiny sloth")
    with serving(create_app(running[0], settings)) as url:
        from fastapi import FastAPI

        app = mount_page(FastAPI(), Remote(f"{url}/v1"), settings)
        with serving(app) as page, opened(browser, page) as tab:
            add(tab, SAMPLES / "scene.jpg")
            ask(tab, RED)
            tab.wait_for_selector("text=16 visual tokens")
            assert RED_ANSWER in "".join(answers(tab))
            assert tab.locator("iframe").count() == 0


def test_keys_are_wanted_on_the_page_too(browser, running):
    settings = Settings(api_keys=("secret",))
    app = mount_page(create_app(running[0], settings), InProcess({"nano": running}), settings)
    with serving(app) as url:
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(url)
        tab.wait_for_selector("input[type=password]")
        assert tab.locator("#flashsloth-question").count() == 0
        for key in ("wrong", "secret"):
            tab.locator("input:not([type=password])").first.fill("me")
            tab.fill("input[type=password]", key)
            tab.click("button:has-text('Login')")
            if key == "wrong":
                tab.wait_for_selector("text=/incorrect/i")
        tab.wait_for_selector("#flashsloth-question")
        context.close()

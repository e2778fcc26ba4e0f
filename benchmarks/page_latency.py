"""Time from pressing the page's button to the first words in the browser: `python benchmarks/page_latency.py`.

Needs flashsloth[web], Playwright and Chromium; run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import threading
import time

import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Page, sync_playwright

from flashsloth.hub import ASSETS
from flashsloth.inference import load
from flashsloth.serve.engine import Engine
from flashsloth.serve.settings import Settings
from flashsloth.web.page import mount_page
from flashsloth.web.sources import InProcess
from flashsloth_cli.listening import listen

QUESTIONS = ("what shape is the red object?", "what shape is the blue object?", "how many objects are there?")
# when the text of a new answer is in the document, in milliseconds after the button was pressed
MEASURE = """(count) => new Promise((resolve) => {
  const started = performance.now(), chat = document.querySelector("#flashsloth-chat");
  const look = () => {
    const all = [...chat.querySelectorAll("[data-testid=bot]")];
    const answers = all.filter((answer) => !answer.querySelector("iframe"));
    if (answers.length > count && answers.at(-1).innerText.trim()) resolve(performance.now() - started);
    else requestAnimationFrame(look);
  };
  look();
  document.querySelector("#flashsloth-ask").click();
})"""


def ask(page: Page, question: str) -> float:
    page.fill("#flashsloth-question textarea", question)
    maps = page.locator("iframe.flashsloth-map").count()
    plain = page.locator("#flashsloth-chat [data-testid=bot]:not(:has(iframe))").count()
    milliseconds = page.evaluate(MEASURE, plain)
    page.wait_for_function(f"document.querySelectorAll('iframe.flashsloth-map').length === {maps + 1}")
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=5, help="new images; three questions each")
    parser.add_argument("--chromium", default=os.environ.get("FLASHSLOTH_CHROMIUM") or shutil.which("chromium"))
    arguments = parser.parse_args()
    session, settings = load("nano", device="cpu"), Settings()
    engine = Engine(session)
    engine.start()
    app = mount_page(FastAPI(), InProcess({"nano": (engine, session)}), settings)
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    first, later = [], []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        for chat in range(arguments.chats + 1):
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
            page.wait_for_selector("#flashsloth-question textarea")
            name = ("scene.jpg", "chart.jpg", "sign.jpg")[chat % 3]
            page.set_input_files("#flashsloth-images input[type=file]", ASSETS / "samples" / name)
            page.wait_for_selector("#flashsloth-images img")
            page.wait_for_timeout(1000)
            times = [ask(page, question) for question in QUESTIONS]
            if chat:  # the first warms up
                first.append(times[0])
                later += times[1:]
            page.close()
        browser.close()
    server.should_exit = True
    thread.join()
    engine.stop()
    for name, values in (("first question about an image", first), ("later questions", later)):
        found = {"median_ms": statistics.median(values), "most_ms": max(values), "n": len(values)}
        print(name, json.dumps({key: round(value, 1) for key, value in found.items()}))


if __name__ == "__main__":
    main()

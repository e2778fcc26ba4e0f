"""Draw the pictures of README and docs: `python scripts/draw_explanations.py` (an image, two questions, their maps).

With --page, also a screenshot of the page in the browser (flashsloth[web], Playwright and Chromium are needed).
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from flashsloth.hub import ASSETS
from flashsloth.inference import load
from flashsloth.inference.heat import fit, lay_over, panels

ROOT = Path(__file__).parents[1]
MAPS, PAGE = ROOT / "docs" / "explain-maps.png", ROOT / "docs" / "page.png"
IMAGE = ASSETS / "samples" / "scene.jpg"
QUESTIONS = ("what shape is the red object?", "what color is the triangle?")
SIDE, PAGE_WIDTH, COLOURS = 230, 900, 256


def draw_maps() -> Image.Image:
    """A row for each question: the image, and every map over it."""
    session = load("nano", device="cpu")
    rows = []
    for question in QUESTIONS:
        explanation = session.explain(IMAGE, question)
        small = fit(explanation.images[0], SIDE)
        maps = [(name, lay_over(small, explanation.over_image(name))) for name in explanation.layers]
        rows.append((f"{question}  {explanation.answer}", [("image", small), *maps]))
    return panels(rows)


def photograph_page() -> Image.Image:
    """The page after a question and its answer, as its test leaves it."""
    with tempfile.TemporaryDirectory() as folder:
        test = [sys.executable, "-m", "pytest", "-q", "-m", "browser", "tests/test_web_page.py", "-k", "upload"]
        subprocess.run(test, cwd=ROOT, check=True, env={**os.environ, "FLASHSLOTH_SCREENSHOTS": folder})
        image = Image.open(io.BytesIO((Path(folder) / "page.png").read_bytes())).convert("RGB")
    return image.resize((PAGE_WIDTH, round(image.height * PAGE_WIDTH / image.width)), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="photograph the page in the browser, too")
    pictures = {MAPS: draw_maps()}
    if parser.parse_args().page:
        pictures[PAGE] = photograph_page()
    for path, picture in pictures.items():
        picture.quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main()

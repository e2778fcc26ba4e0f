"""Figures drawn by matplotlib: bars, lines, points, pies and histograms in its own styles."""

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import Any

from PIL import Image

from .augment import add_noise, change_levels, compress
from .figure_facts import SEVERAL, Figure, caption_of, choose_figure, written
from .figure_questions import FIGURE_TASKS, Look, ask_about
from .figure_styles import choose_colours, choose_style, cycle_words
from .fonts import font_path, text_width
from .sample import Glyph, Sample

__all__ = ["FIGURE_TASKS", "render_figure"]

POINTS_AN_INCH = 72
SMALLEST_EM = 8.2  # pixels of an image of 288, in which a font of 10 points is 10 pixels at 4 inches
# longer sides in inches, with the font size that matplotlib takes by default
USUAL_SIDES = (4.0, 4.0, 4.4, 4.8, 4.8)
LARGER_FONTS = ((11, 4.8), (11, 5.0), (12, 4.8), (12, 5.5), (13, 5.5), (14, 6.0), (14, 6.4))
RATIOS = (0.75, 0.75, 0.75, 0.75, 0.8, 0.7, 0.65, 1.0, 1.2)  # height to width
FONTS = {"DejaVu Sans": 12, "DejaVu Serif": 1, "DejaVu Sans Mono": 1, "Roboto": 2, "Lato": 1, "Source Sans Pro": 1}
FONT_FACES = ("roboto", "roboto-bold", "lato", "lato-bold", "source-sans", "source-sans-bold")
MARKERS = "oooosD^vPX"
CASES = (str.lower, str.lower, str.title, str.title, str.upper)


@lru_cache(maxsize=1)
def _matplotlib() -> Any:
    """The module, with the fonts of FONT_FACES."""
    try:
        import matplotlib
        import matplotlib.style
        from matplotlib import font_manager
    except ImportError as error:
        raise ImportError("figures need matplotlib; install it with: pip install 'flashsloth[draw]'") from error
    for face in FONT_FACES:
        font_manager.fontManager.addfont(font_path(face))
    return matplotlib


def _wear(image: Image.Image, rng: random.Random) -> Image.Image:
    """What happens to a figure on its way: compression, other levels, a little noise."""
    if rng.random() < 0.25:
        image = compress(image, rng.randint(60, 95))
    if rng.random() < 0.1:
        image = change_levels(image, rng.uniform(0.8, 1.1), rng.uniform(-15, 15))
    if rng.random() < 0.1:
        image = add_noise(image, rng, rng.uniform(1, 5))
    return image

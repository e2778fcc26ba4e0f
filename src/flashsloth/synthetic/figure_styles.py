"""Looks of figures: matplotlib's style sheets with the plain names of their colours, and colours picked by name."""

import random

from .colours import MIN_DISTANCE, RGB, distance, luminance

# style sheets of matplotlib and their weight
STYLES: dict[str, float] = {
    "default": 14, "ggplot": 2, "bmh": 1, "seaborn-v0_8": 2, "seaborn-v0_8-whitegrid": 2, "seaborn-v0_8-darkgrid": 1,
    "seaborn-v0_8-muted": 1, "seaborn-v0_8-pastel": 1, "fivethirtyeight": 1.5, "dark_background": 1.5, "classic": 1.5,
    "Solarize_Light2": 1, "tableau-colorblind10": 1, "petroff10": 1,
}  # fmt: skip
PAPERS: dict[str, RGB] = {
    "ggplot": (229, 229, 229), "bmh": (238, 238, 238), "seaborn-v0_8": (234, 234, 242),
    "seaborn-v0_8-darkgrid": (234, 234, 242), "fivethirtyeight": (240, 240, 240), "dark_background": (0, 0, 0),
    "Solarize_Light2": (238, 232, 213),
}  # fmt: skip
WHITE: RGB = (255, 255, 255)

# colour words of a style's own cycle, in order; "" where people would not agree
_TAB = ("blue", "orange", "green", "red", "purple", "brown", "pink")
_CYCLES: dict[str, tuple[str, ...]] = {
    "default": _TAB,
    "seaborn-v0_8-whitegrid": _TAB,
    "seaborn-v0_8-darkgrid": _TAB,
    "ggplot": ("red", "blue", "purple", "gray", "yellow", "green", "pink"),
    "bmh": ("blue", "red", "purple", "green", "orange", "pink"),
    "seaborn-v0_8": ("blue", "green", "red", "purple", "", ""),
    "seaborn-v0_8-muted": ("blue", "green", "red", "purple", "", ""),
    "seaborn-v0_8-pastel": ("blue", "green", "", "purple", "", ""),
    "fivethirtyeight": ("blue", "red", "yellow", "green", "gray", "purple"),
    "dark_background": ("", "", "", "red", "blue", "orange", "green"),
    "classic": ("blue", "green", "red", "cyan", "", "yellow", "black"),
    "Solarize_Light2": ("blue", "", "", "", "", "red", "pink", "purple"),
    "tableau-colorblind10": ("blue", "orange", "gray", "", "", ""),
    "petroff10": ("blue", "orange", "red", "gray", "purple", "brown"),
}

# shades that go by a word
SHADES: dict[str, tuple[str, ...]] = {
    "red": ("#ff0000", "#d62728", "#dc143c", "#b22222", "#e41a1c"),
    "orange": ("#ffa500", "#ff7f0e", "#ff8c00", "#f58518"),
    "yellow": ("#ffd700", "#f0d000", "#eeca3b"),
    "green": ("#008000", "#2ca02c", "#228b22", "#54a24b", "#3cb371"),
    "blue": ("#0000ff", "#1f77b4", "#4169e1", "#4c78a8", "#1e3fae"),
    "purple": ("#800080", "#9467bd", "#7b2d9b", "#8a2be2"),
    "black": ("#000000", "#111111"),
    "brown": ("#8c564b", "#8b4513", "#7b4a2d"),
    "pink": ("#ff69b4", "#e377c2", "#ff8fc0"),
    "gray": ("#808080", "#7f7f7f", "#8f8f8f"),
    "cyan": ("#00d5e5", "#17becf", "#00ced1"),
}


def rgb_of(shade: str) -> RGB:
    """`#rrggbb` as numbers."""
    return int(shade[1:3], 16), int(shade[3:5], 16), int(shade[5:7], 16)


def choose_style(rng: random.Random) -> str:
    """One of the style sheets."""
    return rng.choices(list(STYLES), list(STYLES.values()))[0]


def cycle_words(style: str, count: int) -> tuple[str, ...]:
    """Words of the first `count` colours of a style; "" for those without one."""
    words = _CYCLES[style]
    return tuple(words[index] if index < len(words) else "" for index in range(count))


def choose_colours(rng: random.Random, style: str, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(words, shades) of `count` colours that stand out on the paper of a style."""
    paper = PAPERS.get(style, WHITE)
    fitting = {
        word: [shade for shade in shades if distance(rgb_of(shade), paper) > MIN_DISTANCE]
        for word, shades in SHADES.items()
    }
    words = rng.sample([word for word, shades in fitting.items() if shades], count)
    return tuple(words), tuple(rng.choice(fitting[word]) for word in words)


def ground_of(style: str) -> str:
    """The colour of the paper, `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*PAPERS.get(style, WHITE))


def ink_on(shade: str) -> str:
    """Black or white, whichever is legible on a shade."""
    return "#ffffff" if luminance(rgb_of(shade)) < 110 else "#000000"

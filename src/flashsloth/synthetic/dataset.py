"""`render` one image of a family, or a `SyntheticDataset` of many as chat messages."""

import random
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from .charts import CHART_TASKS, render_chart
from .drawn import drawn_families
from .figure_questions import FIGURE_TASKS
from .figures import render_figure
from .gnuplot_figures import render_gnuplot_figure
from .maps import MAP_TASKS, render_map
from .office import OFFICE_TASKS, render_office
from .photos import PHOTO_TASKS, Photographs, render_photo
from .pictures import PICTURE_TASKS, render_picture, render_twemoji_picture
from .sample import REFERENCE_SIZE, Sample, make_generator, split_id
from .scenes import SCENE_TASKS, render_scene
from .texts import PAGE_TASKS, TEXT_TASKS, render_page, render_text
from .web import WEB_TASKS, render_web

FAMILIES: dict[str, Callable[..., Sample]] = {
    "scenes": render_scene,
    "charts": render_chart,
    "text": render_text,
    "photos": render_photo,
    "pages": render_page,
    "figures": render_figure,
    "gnuplot_figures": render_gnuplot_figure,
    "web": render_web,
    "office_tables": render_office,
    "pictures": render_picture,
    "twemoji_pictures": render_twemoji_picture,
    "maps": render_map,
}
FAMILY_IDS = {
    "scenes": 0, "charts": 1, "text": 2, "photos": 3, "pages": 4, "figures": 5, "gnuplot_figures": 6, "web": 7,
    "office_tables": 8, "pictures": 9, "twemoji_pictures": 10, "maps": 11,
}  # fmt: skip
# drawn by programs, or in a style, that a model never sees in training
TEST_ONLY_FAMILIES = frozenset({"gnuplot_figures", "office_tables", "twemoji_pictures"})
# what a model is asked for and scored on; pages serve to practise reading
DEFAULT_FAMILIES = ("scenes", "charts", "text", "photos")
SPARE_TURNS = 3  # questions drawn for one that is asked, where some tasks are asked less
TASKS: dict[str, tuple[str, ...]] = {
    "scenes": SCENE_TASKS,
    "charts": CHART_TASKS,
    "text": TEXT_TASKS,
    "photos": PHOTO_TASKS,
    "pages": PAGE_TASKS,
    "figures": FIGURE_TASKS,
    "gnuplot_figures": FIGURE_TASKS,
    "web": WEB_TASKS,
    "office_tables": OFFICE_TASKS,
    "pictures": PICTURE_TASKS,
    "twemoji_pictures": PICTURE_TASKS,
    "maps": MAP_TASKS,
}


@lru_cache(maxsize=1)
def _default_photographs() -> Photographs:
    return Photographs()


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"Image family {family!r} is unknown; use one of {', '.join(FAMILIES)}.")


def render(
    family: str,
    seed: int,
    split: str,
    *,
    image_size: int = REFERENCE_SIZE,
    turns: int = 6,
    photos: Photographs | None = None,
) -> Sample:
    """Draws one image with its caption and questions; the same arguments always give the same result.

    Args:
        family: a key of FAMILIES.
        seed: a non-negative integer; equal seeds of different splits or families have nothing in common.
        split: `train` or `test`. Held-out words, titles and colour-shape pairs, and CIFAR-10's test photographs,
            occur in `test` only.
        image_size: width and height in pixels.
        turns: how many different questions to ask; fewer where the image does not allow as many.
        photos: the photographs of the `photos` family; default `Photographs()`.
    """
    _check_family(family)
    if image_size < 32 or turns < 1 or seed < 0:
        raise ValueError(f"image_size {image_size}, turns {turns}, seed {seed}: need at least 32, 1 and 0.")
    rng = make_generator(split, FAMILY_IDS[family], seed)
    test = split == "test"
    if family == "photos":
        return render_photo(rng, test, image_size, turns, photos or _default_photographs())
    return FAMILIES[family](rng, test, image_size, turns)


class SyntheticDataset:
    """Map-style dataset of rendered images; item i depends on (split, seed, i) and the options alone.

    Args:
        split: `train` or `test`.
        size: number of items.
        seed: seed of the whole set.
        weights: share of every family; default equal shares of scenes, charts, text and photos.
        image_size: width and height in pixels.
        turns: questions an image.
        photos: the photographs of the `photos` family; default `Photographs()`.
        question_shares: of the questions of a task, the share that is asked, 0 to 1; 1 for tasks that are not named.
            Others take the place of those left out, as far as the image allows.
        absent_share: of the questions about an image that has such, the share that is about what is not there.
        drawn: folder of `drawn.draw`; families that it holds for the split are read from there, the others rendered.
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        image_size: int = REFERENCE_SIZE,
        turns: int = 6,
        photos: Photographs | None = None,
        question_shares: Mapping[str, float] | None = None,
        drawn: Path | None = None,
        absent_share: float = 0.0,
    ) -> None:
        split_id(split)
        weights = dict.fromkeys(DEFAULT_FAMILIES, 1.0) if weights is None else dict(weights)
        for family, weight in weights.items():
            _check_family(family)
            if weight < 0:
                raise ValueError(f"weights[{family!r}] is {weight}; it must not be negative.")
        if size < 0 or not any(weights.values()):
            raise ValueError(f"size {size} and weights {weights}: need a size of 0 or more and a positive weight.")
        self.question_shares = dict(question_shares or {})
        for task, share in self.question_shares.items():
            if not any(task in tasks for tasks in TASKS.values()):
                names = ", ".join(name for tasks in TASKS.values() for name in tasks)
                raise ValueError(f"question_shares names the task {task!r}; the tasks are {names}.")
            if not 0 <= share <= 1:
                raise ValueError(f"question_shares[{task!r}] is {share}; it must be between 0 and 1.")
        self.split, self.size, self.seed = split, size, seed
        self.weights = weights
        self.image_size, self.turns = image_size, turns
        if not 0 <= absent_share <= 1:
            raise ValueError(f"absent_share is {absent_share}; it must be between 0 and 1.")
        self.absent_share = absent_share
        self.photos = photos or Photographs()
        self.drawn = drawn_families(drawn, list(weights), split) if drawn is not None else {}

    def __len__(self) -> int:
        return self.size

    def family(self, index: int) -> str:
        """The family of an index, without drawing it."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[random.Random, str]:
        rng = make_generator(self.split, self.seed, index)
        return rng, rng.choices(list(self.weights), list(self.weights.values()))[0]

    def sample(self, index: int) -> Sample:
        """The rendered sample of an index."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of a dataset of {self.size}")
        rng, family = self._draw(index)
        # even seeds train, odd seeds test
        seed = 2 * rng.getrandbits(62) + split_id(self.split)
        turns = self.turns * (SPARE_TURNS if self.question_shares else 1)
        if family in self.drawn:
            sample = self.drawn[family].sample(rng, turns)
        else:
            sample = render(family, seed, self.split, image_size=self.image_size, turns=turns, photos=self.photos)
        if self.question_shares:
            asked = [turn for turn in sample.turns if rng.random() < self.question_shares.get(turn.task, 1.0)]
            sample.turns = (asked or sample.turns[:1])[: self.turns]
        for place in range(len(sample.turns)) if self.absent_share else ():
            if sample.absent and rng.random() < self.absent_share:
                sample.turns[place] = sample.absent.pop()
        return sample

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.sample(index)
        messages: list[dict[str, Any]] = []
        for turn in sample.turns:
            content = [{"type": "text", "text": turn.question}]
            if not messages:
                content.insert(0, {"type": "image"})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return {
            "images": [sample.image],
            "messages": messages,
            "caption": sample.caption,
            "family": sample.family,
            "tasks": [turn.task for turn in sample.turns],
            "answers": [turn.answer for turn in sample.turns],
            "held_out": sample.held_out,
            "glyphs": sample.glyphs,
        }

"""Whether maps of attention tell the truth: masked regions, drawn images whose truth is known, changed questions.

Shape suffixes: H W rows and columns of cells over an image, F fractions of the cells, S images of one batch, T tokens,
A answer tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..inference.explanation import Explanation
from ..inference.maps import brightest_place
from ..inference.session import FlashSloth
from ..model.compressors import select_images
from ..synthetic import SyntheticDataset, exact_match
from ..synthetic.sample import Box, Sample, Turn

FAMILIES = ("scenes", "charts", "text")
# share of the image that is masked, or shown
FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
BASELINES = ("centre", "random")
TURNS = 6  # questions drawn for an image, of which two are asked
ASKED = 2
MOST_TRIES = 200  # images drawn for one that has questions with known places
SAME, WORDING, QUESTION = "the same question again", "other words for it", "another question"


@dataclass(frozen=True)
class Asked:
    """A question about a drawn image.

    Attributes:
        image: which of the run, counted from 0.
        picture: the image.
        family: of the image.
        turn: question, answer and the boxes of what it asks about.
    """

    image: int
    picture: Image.Image
    family: str
    turn: Turn


@dataclass
class Checked:
    """What was measured for one question.

    Attributes:
        image, family, task: as asked.
        is_correct: whether the model's answer is right.
        probability: of the model's answer, with the whole image.
        deletion: for each order of the cells, the answer's probability when so much of the image, `FRACTIONS`, is
            masked, the first cells first.
        insertion: the same when only so much of it is shown.
        hits: for each order, whether its first place lies on what was asked about; `random` is the share of all
            places that do.
        shares: of each map, the part that lies on what was asked about; `random` is the part of the image that it
            covers.
        moves: how far maps move, `layer: change: total variation distance`, 0 to 1.
    """

    image: int
    family: str
    task: str
    is_correct: bool
    probability: float
    deletion: dict[str, list[float]] = field(default_factory=dict)
    insertion: dict[str, list[float]] = field(default_factory=dict)
    hits: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    moves: dict[str, dict[str, float]] = field(default_factory=dict)


def questions(
    families: Sequence[str], count: int, seed: int, image_size: int, split: str = "test"
) -> list[list[Asked]]:
    """Questions whose places are known, those of an image together; the families take turns.

    Args:
        count: of questions, at least.

    Raises:
        ValueError: a family without such questions.
    """
    images: list[list[Asked]] = []
    draws = [_draw(family, seed, image_size, split) for family in families]
    while sum(map(len, images)) < count:
        sample = next(draws[len(images) % len(draws)])
        turns = [turn for turn in sample.turns if turn.boxes][:ASKED]
        images.append([Asked(len(images), sample.image, sample.family, turn) for turn in turns])
    return images


def _draw(family: str, seed: int, image_size: int, split: str) -> Iterator[Sample]:
    """Images with at least one question whose place is known."""
    dataset = SyntheticDataset(split, 10**9, seed, {family: 1.0}, image_size, TURNS)
    without = 0
    for index in itertools.count():
        sample = dataset.sample(index)
        without = 0 if any(turn.boxes for turn in sample.turns) else without + 1
        if without == MOST_TRIES:
            raise ValueError(f"images of {family!r} do not tell where things are; use {', '.join(FAMILIES)}")
        if not without:
            yield sample


class FaithfulnessCheck:
    """Measures the maps of a model, question by question.

    Args:
        session: the model.
        seed: of the random order.
        batch_size: masked images that are answered at once.
        visual_tokens: of every image; default the model's.
    """

    def __init__(
        self, session: FlashSloth, seed: int = 0, batch_size: int = 32, visual_tokens: int | None = None
    ) -> None:
        self.session, self.batch_size, self.visual_tokens = session, batch_size, visual_tokens
        self.seed = seed

    def run(self, asked: Sequence[Asked], max_new_tokens: int = 16) -> list[Checked]:
        """Check the questions about one image."""
        checked: list[Checked] = []
        before: Explanation | None = None
        for question in asked:
            explanation = self._explain(question, question.turn.question, max_new_tokens)
            checked.append(self._check(question, explanation))
            checked[-1].moves = self._moves(question, explanation, before, max_new_tokens)
            before = explanation
        return checked

    def _explain(self, asked: Asked, question: str, max_new_tokens: int) -> Explanation:
        return self.session.explain(
            asked.picture, question, visual_tokens=self.visual_tokens, max_new_tokens=max_new_tokens
        )

    def _check(self, asked: Asked, explanation: Explanation) -> Checked:
        maps = {layer: explanation.over_image(layer) for layer in explanation.layers}
        maps["centre"] = closeness_to_centre(explanation.cells, asked.picture.size)
        checked = Checked(
            asked.image,
            asked.family,
            asked.turn.task,
            exact_match(explanation.answer, asked.turn.answer),
            explanation.probability,
        )
        on_it_HW = covered(asked.turn.boxes, asked.picture.size, explanation.cells)
        near = cell_size(explanation.cells, asked.picture.size)
        for name, map_HW in maps.items():
            checked.hits[name] = float(is_on(brightest_place(map_HW), asked.turn.boxes, asked.picture.size, near))
            if name in explanation.layers:
                checked.shares[name] = float((map_HW * on_it_HW).sum() / map_HW.sum())
        checked.hits["random"] = share_of_places(explanation.cells, asked.turn.boxes, asked.picture.size, near)
        checked.shares["random"] = float(on_it_HW.mean())
        orders = {name: np.argsort(-map_HW, axis=None, kind="stable") for name, map_HW in maps.items()}
        orders["random"] = np.random.default_rng([self.seed, asked.image]).permutation(maps["centre"].size)
        checked.deletion, checked.insertion = self._curves(asked.picture, explanation, orders)
        return checked

    def _curves(
        self, picture: Image.Image, explanation: Explanation, orders: dict[str, np.ndarray]
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        cells = explanation.cells
        inner = [round(fraction * cells[0] * cells[1]) for fraction in FRACTIONS[1:-1]]
        hidden = [np.zeros(cells, dtype=bool), np.ones(cells, dtype=bool)]
        for order in orders.values():
            for first in inner:
                mask_HW = np.zeros(cells, dtype=bool)
                mask_HW.flat[order[:first]] = True
                hidden += [mask_HW, ~mask_HW]
        pictures = [masked(picture, mask_HW) for mask_HW in hidden]
        whole, empty, *rest = self.probabilities(pictures, explanation.question, explanation.answer)
        deletion: dict[str, list[float]] = {}
        insertion: dict[str, list[float]] = {}
        for place, name in enumerate(orders):
            own = rest[2 * len(inner) * place : 2 * len(inner) * (place + 1)]
            deletion[name] = [whole, *own[::2], empty]
            insertion[name] = [empty, *own[1::2], whole]
        return deletion, insertion

    @torch.inference_mode()
    def probabilities(self, pictures: Sequence[Image.Image], question: str, answer: str) -> list[float]:
        """The probability of an answer and its end for each picture, at temperature 1."""
        session, processor = self.session, self.session.processor
        counts = session.image_tokens(1, self.visual_tokens)

        def encode(chat: list[dict[str, Any]], asks: bool) -> Any:
            options = {"return_tensors": "pt", "return_pixel_values": False, "visual_tokens": counts}
            return processor.apply_chat_template(
                chat, add_generation_prompt=asks, tokenize=True, return_dict=True, processor_kwargs=options
            ).to(session.device)

        asks = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        answers = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        inputs = encode([asks, answers], False)
        inputs.pop("image_token_counts", None)
        kept = inputs["input_ids"].shape[1] - encode([asks], True)["input_ids"].shape[1]
        answer_1A = inputs["input_ids"][:, -kept:]
        found: list[float] = []
        for start in range(0, len(pictures), self.batch_size):
            some = list(pictures[start : start + self.batch_size])
            pixels_SVCHW = processor.image_processor(some, return_tensors="pt")["pixel_values"]
            features_SPE = session.encode_views(pixels_SVCHW)
            counts_S = None if counts is None else torch.tensor(counts * len(some))
            features = session.model.model.compress_images(features_SPE, counts_S)
            logits_SAV = session.model(
                **{name: value.expand(len(some), *value.shape[1:]) for name, value in inputs.items()},
                image_features=select_images(features, torch.arange(len(some), device=session.device)),
                use_cache=False,
                logits_to_keep=kept + 1,
            ).logits[:, :-1]
            logprobs_SAV = logits_SAV.float().log_softmax(dim=-1)
            index_SA1 = answer_1A.expand(len(some), -1).unsqueeze(-1)
            found += logprobs_SAV.gather(2, index_SA1)[..., 0].double().sum(dim=1).exp().tolist()
        return found

    def _moves(
        self, asked: Asked, explanation: Explanation, before: Explanation | None, max_new_tokens: int
    ) -> dict[str, dict[str, float]]:
        others = {SAME: self._explain(asked, asked.turn.question, max_new_tokens)}
        if asked.turn.meaning not in ("", asked.turn.question):
            others[WORDING] = self._explain(asked, asked.turn.meaning, max_new_tokens)
        if before is not None:
            others[QUESTION] = before
        return {
            layer: {
                change: total_variation(explanation.over_image(layer), other.over_image(layer))
                for change, other in others.items()
            }
            for layer in explanation.layers
        }


def total_variation(first_HW: np.ndarray, second_HW: np.ndarray) -> float:
    """How much of one map has to be moved to make the other, 0 to 1."""
    return float(np.abs(first_HW / first_HW.sum() - second_HW / second_HW.sum()).sum() / 2)


def masked(picture: Image.Image, mask_HW: np.ndarray) -> Image.Image:
    """The picture with the cells of a mask in its mean colour."""
    pixels = np.array(picture.convert("RGB"))
    rows = np.linspace(0, picture.height, mask_HW.shape[0] + 1).round().astype(int)
    columns = np.linspace(0, picture.width, mask_HW.shape[1] + 1).round().astype(int)
    mean = pixels.mean(axis=(0, 1)).round().astype(np.uint8)
    hidden = mask_HW.repeat(np.diff(rows), axis=0).repeat(np.diff(columns), axis=1)
    pixels[hidden] = mean
    return Image.fromarray(pixels)


def closeness_to_centre(cells: tuple[int, int], image_size: tuple[int, int]) -> np.ndarray:
    """A map that is highest in the middle of the image and falls with the distance."""
    y_HW, x_HW = np.mgrid[: cells[0], : cells[1]] + 0.5
    width, height = cell_size(cells, image_size)
    return -np.hypot((x_HW - cells[1] / 2) * width, (y_HW - cells[0] / 2) * height)


def cell_size(cells: tuple[int, int], image_size: tuple[int, int]) -> tuple[float, float]:
    """(width, height) in pixels."""
    return image_size[0] / cells[1], image_size[1] / cells[0]


def is_on(
    place: tuple[float, float], boxes: Sequence[Box], image_size: tuple[int, int], near: tuple[float, float]
) -> bool:
    """Whether a place, in parts of width and height, lies in a box, or within half a cell of one."""
    x, y = place[0] * image_size[0], place[1] * image_size[1]
    return any(
        box.left - near[0] / 2 <= x <= box.right + near[0] / 2
        and box.top - near[1] / 2 <= y <= box.bottom + near[1] / 2
        for box in boxes
    )


def share_of_places(
    cells: tuple[int, int], boxes: Sequence[Box], image_size: tuple[int, int], near: tuple[float, float]
) -> float:
    """The share of the middles of all cells that lie on the boxes."""
    places = [
        ((column + 0.5) / cells[1], (row + 0.5) / cells[0]) for row in range(cells[0]) for column in range(cells[1])
    ]
    return float(np.mean([is_on(place, boxes, image_size, near) for place in places]))


def covered(boxes: Sequence[Box], image_size: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """The share of each cell that boxes cover, (H, W); boxes that overlap count once."""
    fine = 8  # points of a cell along each side
    y_H = (np.arange(cells[0] * fine) + 0.5) / (cells[0] * fine) * image_size[1]
    x_W = (np.arange(cells[1] * fine) + 0.5) / (cells[1] * fine) * image_size[0]
    inside = np.zeros((len(y_H), len(x_W)), dtype=bool)
    for box in boxes:
        inside |= ((y_H >= box.top) & (y_H <= box.bottom))[:, None] & ((x_W >= box.left) & (x_W <= box.right))[None]
    return inside.reshape(cells[0], fine, cells[1], fine).mean(axis=(1, 3))

"""Eight or more records of each benchmark of the paper, in its own schema and with drawn images, on disk.

Beside them stand planted answers, right and wrong, and the score that they must give, computed by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from flashsloth.synthetic import render

LETTERS = "ABCD"


@dataclass(frozen=True)
class Planted:
    """Records of a benchmark.

    Attributes:
        rows: in the benchmark's schema.
        answers: given to them.
        score: what the report must say.
        images: the column (or columns) of images; lists of them in `listed`.
        extra: a second set by its configuration.
        split: of both.
    """

    rows: list[dict[str, Any]]
    answers: list[str]
    score: float
    images: tuple[str, ...] = ("image",)
    listed: bool = False
    extra: dict[str, list[dict[str, Any]]] | None = None
    split: str = "test"

    def save(self, folder: Path, name: str) -> Path:
        """As `flashsloth eval fetch` does."""
        self._split(self.rows).save_to_disk(str(folder / name))
        for configuration, rows in (self.extra or {}).items():
            self._split(rows, ("image",)).save_to_disk(str(folder / f"{name}-{configuration}"))
        return folder / name

    def _split(self, rows: list[dict[str, Any]], images: tuple[str, ...] | None = None) -> datasets.DatasetDict:
        data = datasets.Dataset.from_list(rows)
        for column in self.images if images is None else images:
            kind = datasets.List(datasets.Image()) if self.listed else datasets.Image()
            if column in data.column_names:
                data = data.cast_column(column, kind)
        return datasets.DatasetDict({self.split: data})


def picture(seed: int) -> dict[str, Any]:
    """A drawn scene as `datasets` holds it."""
    import io

    buffer = io.BytesIO()
    image: Image.Image = render("scenes", seed, "test", image_size=96).image
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def pope() -> Planted:
    golds = ["yes"] * 4 + ["no"] * 4
    rows = [
        {
            "id": str(number), "question_id": str(number), "question": "Is there a circle in the image?",
            "answer": gold, "image_source": f"scene_{number}", "image": picture(number), "category": "random",
        }
        for number, gold in enumerate(golds)
    ]  # fmt: skip
    # 3 of 4 present ones found, 1 invented: precision 3/4, recall 3/4
    return Planted(rows, ["yes", "Yes", "yes", "no", "no", "no", "yes", "no"], 75.0)


def mme() -> Planted:
    kinds = ["existence", "existence", "OCR", "code_reasoning"]
    rows = [
        {
            "question_id": f"{kind}/{pair}.png", "image": picture(pair), "category": kind, "answer": gold,
            "question": f"Is it a {'scene' if gold == 'Yes' else 'cat'}? Please answer yes or no.",
        }
        for pair, kind in enumerate(kinds)
        for gold in ("Yes", "No")
    ]  # fmt: skip
    # existence: a pair right (100 + 100) and half of one (50 + 0), mean 125; OCR: none; code reasoning: 200
    answers = ["Yes", "No.", "yes", "yes", "no", "yes", "Yes", "No"]
    return Planted(rows, answers, 125.0 + 0.0 + 200.0)


def mmbench_en_dev_static() -> Planted:
    golds = ["A", "B", "C", "D", "A", "B", "C"]
    rows = [
        {
            "index": index, "question": f"What is shown in picture {index}?", "hint": "nan", "answer": gold,
            "A": "a circle", "B": "a square", "C": "a star", "D": "a triangle", "category": "object_localization",
            "L2-category": "finegrained_perception", "source": "drawn", "split": "dev", "image": picture(index),
            "comment": "nan",
        }
        for index, gold in [*enumerate(golds, start=1), (1_000_002, "C")]
    ]  # fmt: skip
    # question 2 is right, but not with its options turned, so it counts as wrong; 7 is wrong: 5 of 7
    answers = ["A", "B", "C. a star", "D", "(A)", "B.", "D", "B"]
    return Planted(rows, answers, 100 * 5 / 7, split="dev")


# what the judge of the tests says to an answer
GRADES = {"two stars": "1.0", "a star and a moon": "0.5", "nothing": "0.0", "seven": "0.7"}


def mmvet() -> Planted:
    answers = ["two stars", "a star and a moon", "nothing", "seven"] * 2
    rows = [
        {
            "question_id": f"v1_{number}", "image": picture(number), "question": "What is shown?",
            "answer": "two<AND>stars", "image_source": "drawn", "capability": "rec,ocr" if number % 2 else "spat",
        }
        for number in range(8)
    ]  # fmt: skip
    return Planted(rows, answers, 100 * (1.0 + 0.5 + 0.0 + 0.7) / 4)


def seedbench() -> Planted:
    kinds = ["image"] * 8 + ["video"] * 2
    golds = ["A", "B", "C", "D"] * 2 + ["A", "B"]
    rows = [
        {
            "answer": gold, "choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four",
            "data_id": f"{number}", "data_type": kind, "question": "How many shapes are there?",
            "question_id": f"{number}", "question_type_id": 5, "image": [picture(number)], "segment": [],
        }
        for number, (kind, gold) in enumerate(zip(kinds, golds, strict=True))
    ]  # fmt: skip
    for row in rows:
        row["segment"] = [0]
    # 6 of 8 images; the videos are right, and count elsewhere
    answers = ["A", "B. two", "C", "A", "a", "B", "D", "D", "A", "B"]
    return Planted(rows, answers, 75.0, listed=True)


def mmmu_val() -> Planted:
    rows = []
    for number in range(8):
        is_open = number >= 6
        row: dict[str, Any] = {
            "id": f"validation_{'Math' if number % 2 else 'Art'}_{number}",
            "question": "How many shapes does <image 1> show?",
            "options": "[]" if is_open else "['one', 'two', 'six']",
            "explanation": "", "img_type": "['Drawings']", "answer": "4" if is_open else "ABC"[number % 3],
            "topic_difficulty": "Easy", "question_type": "open" if is_open else "multiple-choice",
            "subfield": "Counting", "image_1": picture(number),
        }  # fmt: skip
        rows.append(row | {f"image_{place}": None for place in range(2, 8)})
    # choices: 4 of 6; open: one of two
    answers = ["A", "B", "(C)", "A", "C", "B", "4", "The answer is 5"]
    columns = tuple(f"image_{place}" for place in range(1, 8))
    return Planted(rows, answers, 62.5, images=columns, split="validation")


def mathvista_testmini_format() -> Planted:
    metadata = {
        "split": "testmini", "language": "english", "source": "drawn", "category": "math-targeted-vqa",
        "task": "counting", "context": "synthetic scene", "grade": "elementary school", "skills": ["arithmetic"],
    }  # fmt: skip
    rows = []
    for number in range(8):
        is_choice = number < 4
        rows.append(
            {
                "pid": str(number), "question": "How many shapes are there?", "image": f"images/{number}.jpg",
                "decoded_image": picture(number), "choices": ["three", "four"] if is_choice else [],
                "unit": None, "precision": None, "answer": "three" if is_choice else str(number),
                "question_type": "multi_choice" if is_choice else "free_form",
                "answer_type": "text" if is_choice else "integer", "metadata": metadata,
                "query": "Hint: answer.\nQuestion: How many shapes are there?",
            }
        )  # fmt: skip
    # the judge reads "(A)" and "7" out of sentences; right are 0, 1, 3 and 4, 5, 7
    answers = ["three", "It is option (A)", "four", "three", "4", "5", "5", "There are seven of them: 7"]
    return Planted(rows, answers, 75.0, images=("decoded_image",), split="testmini")


def gqa() -> Planted:
    golds = ["red", "yes", "circle", "left", "no", "blue", "star", "right"]
    rows = [
        {
            "id": str(number), "imageId": f"n{number % 3}", "question": "What is it?", "answer": gold,
            "fullAnswer": f"It is {gold}.", "isBalanced": True,
        }
        for number, gold in enumerate(golds)
    ]  # fmt: skip
    images = [{"id": f"n{number}", "image": picture(number)} for number in range(3)]
    answers = ["red", "Yes.", "a circle", "left", "no", "green", "star", "RIGHT"]  # six of eight
    extra = {"testdev_balanced_images": images}
    return Planted(rows, answers, 75.0, images=(), extra=extra, split="testdev")


def scienceqa_img() -> Planted:
    rows = [
        {
            "image": picture(number), "question": "Which shape is largest?", "choices": ["the circle", "the star"],
            "answer": number % 2, "hint": "Look closely." if number % 3 else "", "task": "closed choice",
            "grade": "grade2", "subject": "natural science", "topic": "physics", "category": "Size",
            "skill": "Compare", "lecture": "", "solution": "",
        }
        for number in range(8)
    ]  # fmt: skip
    answers = ["A", "b", "A. the circle", "B.", "B", "A", "the circle", "B"]  # 0, 1, 2, 3, 7
    return Planted(rows, answers, 62.5)


def textvqa_val() -> Planted:
    # ten answers of people, of whom so many wrote "stop"
    agreeing = [10, 10, 3, 1, 2, 10, 0, 10]
    rows = [
        {
            "image_id": f"{number}", "question_id": number, "question": "what does the sign say?",
            "question_tokens": ["what"], "image": picture(number), "image_width": 96, "image_height": 96,
            "flickr_original_url": "", "flickr_300k_url": "", "image_classes": ["Sign"], "set_name": "val",
            "answers": ["stop"] * count + [f"word{place}" for place in range(10 - count)], "ocr_tokens": ["stop"],
        }
        for number, count in enumerate(agreeing)
    ]  # fmt: skip
    answers = ["stop", "Stop.", "stop", "stop", "stop", "go", "stop", "the stop"]
    # each of ten people is compared with the other nine, three of whom must agree for a full point
    scores = [1, 1, (3 * 2 / 3 + 7) / 10, 9 / 3 / 10, (2 / 3 + 8 * 2 / 3) / 10, 0, 0, 1]
    return Planted(rows, answers, 100 * sum(scores) / 8, split="validation")


def ai2d() -> Planted:
    rows = [
        {
            "question": "Which part is marked?", "options": ["root", "leaf", "stem", "seed"],
            "answer": str(number % 4), "image": picture(number),
        }
        for number in range(8)
    ]  # fmt: skip
    answers = ["A", "B. leaf", "c", "D", "A.", "leaf", "D", "D"]  # all but 5 and 6
    return Planted(rows, answers, 75.0)


def chartqa() -> Planted:
    golds = ["10", "20%", "Yes", "blue", "1000", "3.5", "no", "Norway"]
    rows = [
        {
            "type": "human_test" if number < 4 else "augmented_test", "question": "How high is the bar?",
            "answer": gold, "image": picture(number),
        }
        for number, gold in enumerate(golds)
    ]  # fmt: skip
    # 10.4 and 1049 lie within five percent, 3.7 does not
    answers = ["10.4", "20%", "yes", "red", "1049", "3.7", "no", "norway"]
    return Planted(rows, answers, 75.0)


def docvqa_val() -> Planted:
    golds = [["12 May"], ["total", "sum"], ["abcd"], ["John"], ["7"], ["page"], ["north"], ["invoice"]]
    rows = [
        {
            "questionId": str(number), "question": "What does it say?", "question_types": ["form"],
            "image": picture(number), "docId": number, "ucsf_document_id": "x", "ucsf_document_page_no": "1",
            "answers": gold, "data_split": "val",
        }
        for number, gold in enumerate(golds)
    ]  # fmt: skip
    answers = ["12 may", "sum", "abcx", "zzzz", "7", "pages", "north", "receipt"]
    # one letter of four, and one of five; what is half wrong or worse counts nothing
    return Planted(rows, answers, 100 * (1 + 1 + 3 / 4 + 0 + 1 + 4 / 5 + 1 + 0) / 8, split="validation")


def realworldqa() -> Planted:
    golds = ["A", "B", "C", "2", "Yes", "A", "B", "downhill"]
    choice = "Which one is it?\nA. near\nB. far\nC. none\nPlease answer directly with only the letter of the correct "
    rows = [
        {
            "image": picture(number), "answer": gold, "image_path": f"{number}.webp",
            "question": choice + "option and nothing else." if gold in LETTERS else "What is it? Answer in one word.",
        }
        for number, gold in enumerate(golds)
    ]  # fmt: skip
    answers = ["A", "B. far", "A", "2", "yes.", "(A)", "C", "Downhill"]  # all but 2 and 6
    return Planted(rows, answers, 75.0)


ALL: dict[str, Callable[[], Planted]] = {
    each.__name__: each
    for each in (
        pope, mme, mmbench_en_dev_static, mmvet, seedbench, mmmu_val, mathvista_testmini_format, gqa, scienceqa_img,
        textvqa_val, ai2d, chartqa, docvqa_val, realworldqa,
    )
}  # fmt: skip

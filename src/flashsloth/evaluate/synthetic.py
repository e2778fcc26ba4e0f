"""Exact match of a model on held-out synthetic images, by task and family."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.sources import resolve_folder
from ..inference import FlashSloth
from ..inference.batches import Record, answer, prepare
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from ..synthetic import Photographs, SyntheticDataset, exact_match
from ..synthetic.dataset import DEFAULT_FAMILIES, TEST_ONLY_FAMILIES

ALL = "all"


@dataclass
class Score:
    """Correct answers among the questions of one kind."""

    correct: int = 0
    total: int = 0

    @property
    def accuracy(self) -> float:
        return self.correct / self.total if self.total else float("nan")

    def add(self, is_correct: bool) -> None:
        self.correct += is_correct
        self.total += 1


@dataclass
class Report:
    """Result of one evaluation; the keys of `tasks` are `family/task`."""

    settings: dict[str, Any]
    overall: Score = field(default_factory=Score)
    held_out: Score = field(default_factory=Score)
    families: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    tasks: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    majority: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    """The answer most frequent for the task in the training split, by task, by family and over all."""

    def add(
        self, family: str, task: str, held_out: bool, given: str, answer: str, majority: Mapping[str, str]
    ) -> None:
        """Score one answer.

        Args:
            task: `family/task`.
            majority: the most frequent answers, by the same.
        """
        is_correct = exact_match(given, answer)
        scores: Iterable[Score] = (self.overall, self.families[family], self.tasks[task])
        for score in scores:
            score.add(is_correct)
        if held_out:
            self.held_out.add(is_correct)
        for key in (ALL, family, task):
            self.majority[key].add(exact_match(majority.get(task, ""), answer))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, accuracies included."""

        def plain(score: Score) -> dict[str, Any]:
            return {**asdict(score), "accuracy": round(score.accuracy, 4) if score.total else None}

        tables = {
            name: {key: plain(score) for key, score in sorted(getattr(self, name).items())}
            for name in ("families", "tasks", "majority")
        }
        return {
            "settings": self.settings,
            "overall": plain(self.overall),
            "held_out_combinations": plain(self.held_out),
            **tables,
        }


def majority_answers(dataset: SyntheticDataset, family: str | None = None) -> dict[str, str]:
    """The most frequent answer of each task of a (training) dataset, keys `family/task`; of one family where given."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(len(dataset)):
        if family not in (None, dataset.family(index)):
            continue
        sample = dataset.sample(index)
        for turn in sample.turns:
            counts[f"{sample.family}/{turn.task}"][turn.answer] += 1
    return {task: answers.most_common(1)[0][0] for task, answers in counts.items()}


def answer_batch(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    images: Sequence[Any],
    questions: Sequence[str],
    max_new_tokens: int,
    visual_tokens: int | None = None,
) -> list[str]:
    """Greedy answers, each question a conversation of its own; an image that repeats is encoded once.

    Args:
        images: the image of each question.
        visual_tokens: of every image; default the model's.

    Raises:
        ValueError: a question that does not fit the model's context.
    """
    records = [
        Record(str(row), (image,), text) for row, (image, text) in enumerate(zip(images, questions, strict=True))
    ]
    batch = prepare(records, processor, model.config.text_config.max_position_embeddings, visual_tokens)
    if batch.errors:
        raise ValueError(batch.errors[0][1])
    return [line["answer"] for line in answer(FlashSloth(model, processor), batch, max_new_tokens)]


def evaluate(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    *,
    split: str = "test",
    count: int = 1000,
    seed: int = 0,
    families: Sequence[str] | None = None,
    turns: int = 6,
    photos: str | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    majority_images: int = 2000,
    visual_tokens: int | None = None,
    absent_share: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Ask `turns` questions about each of `count` images.

    Args:
        split: `test` holds what training never sees: its own seeds, photographs, words and combinations.
        families: default all, in equal shares.
        photos: folder of the CIFAR-10 parquet files (or `$VARIABLE`), for the photo family.
        batch_size: questions a batch.
        visual_tokens: of every image; default the model's.
        absent_share: of the questions, those about what is not there.
        majority_images: training images from which the majority answers are counted.
        progress: called with (images done, count).
    """
    options: dict[str, Any] = {
        "weights": None if families is None else dict.fromkeys(families, 1.0),
        "image_size": model.config.image_height,
        "turns": turns,
        "photos": Photographs(resolve_folder(photos)),
        "absent_share": absent_share,
    }
    if visual_tokens is not None:
        model.config.window_of(visual_tokens)
    settings = {"split": split, "count": count, "seed": seed, "turns": turns, "families": list(families or [ALL])}
    settings |= {"visual_tokens": visual_tokens or model.config.num_image_tokens, "absent_share": absent_share}
    report = Report(settings)
    weights = options.pop("weights") or dict.fromkeys(DEFAULT_FAMILIES, 1.0)
    kept = {family: weight for family, weight in weights.items() if family in TEST_ONLY_FAMILIES}
    majority: dict[str, str] = {}
    # families that training never sees are counted on images of their own
    for own, counted, first in (({**weights}.keys() - kept.keys(), "train", seed), (kept.keys(), "test", seed + 1)):
        if own:
            shares = {family: weight for family, weight in weights.items() if family in own}
            majority |= majority_answers(SyntheticDataset(counted, majority_images, first, shares, **options))
    options["weights"] = weights
    dataset = SyntheticDataset(split, count, seed, **options)
    model.eval()
    pending: list[tuple[Any, Any, bool, Any]] = []
    for index in range(count):
        sample = dataset.sample(index)
        pending += [(sample.image, sample.family, sample.held_out, turn) for turn in sample.turns]
        while len(pending) >= batch_size or (pending and index == count - 1):
            _score(report, model, processor, pending[:batch_size], max_new_tokens, visual_tokens, majority)
            del pending[:batch_size]
        if progress is not None:
            progress(index + 1, count)
    return report


def _score(
    report: Report,
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    questions: Sequence[tuple[Any, str, bool, Any]],
    max_new_tokens: int,
    visual_tokens: int | None,
    majority: dict[str, str],
) -> None:
    images = [image for image, _, _, _ in questions]
    asked = [turn.question for *_, turn in questions]
    answers = answer_batch(model, processor, images, asked, max_new_tokens, visual_tokens)
    for (_, family, held_out, turn), given in zip(questions, answers, strict=True):
        report.add(family, f"{family}/{turn.task}", held_out, given, turn.answer, majority)


def write_report(report: Report, path: Path) -> None:
    """Save the report as JSON."""
    path.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")

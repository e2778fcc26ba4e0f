"""What is evaluated: the benchmarks of the paper with their names, prompts and published rows, and the own sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

POINTS = 100.0  # of scores that lmms-eval gives as fractions
# visual tokens of an image in the published models, which tell to which row a score belongs
PUBLISHED_MODELS = MappingProxyType({"FlashSloth": 81, "FlashSloth-HD": 405})


@dataclass(frozen=True)
class Benchmark:
    """A row of the report.

    Attributes:
        title: the field's name.
        task: the task of lmms-eval.
        metrics: names of its metrics; the score is their sum.
        scale: what the sum is multiplied by.
        per_sample: the metric that says which samples are right.
        split: of the data.
        dataset: on the hub, with its configuration; None for sets that are drawn.
        also: further configurations that the task loads by itself.
        published: scores of the paper's models.
        tolerance: how far a score may lie from the published one.
        judged: scored by a language model.
        overrides: of the task's configuration, so that it asks as the authors did.
        note: what a reader must know to believe the score.
        gigabytes, questions: of the set, about.
    """

    title: str
    task: str
    metrics: Sequence[str]
    scale: float = POINTS
    per_sample: str = ""
    split: str = "test"
    dataset: tuple[str, str | None] | None = None
    also: Sequence[str] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 1.0
    judged: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    gigabytes: float = 0.0
    questions: int = 0

    @property
    def folder(self) -> str:
        """Of the data below `--data`."""
        return self.task

    @property
    def sample_metric(self) -> str:
        """The metric of single samples."""
        return self.per_sample or self.metrics[0]


def _rows(base: float, high: float) -> dict[str, float]:
    return dict(zip(PUBLISHED_MODELS, (base, high), strict=True))


def _hub(name: str, configuration: str | None = None) -> tuple[str, str | None]:
    return f"lmms-lab-encoder/{name}", configuration


PAPER = (
    Benchmark(
        "POPE", "pope", ("pope_f1_score",), per_sample="pope_accuracy", dataset=_hub("POPE"),
        published=_rows(86.3, 87.2), note="F1 over all three parts", gigabytes=0.3, questions=9000,
    ),
    Benchmark(
        "MME", "mme", ("mme_perception_score", "mme_cognition_score"), scale=1.0, dataset=_hub("MME"),
        published=_rows(1702.0, 1745.0), tolerance=20.0, note="perception + cognition, of 2800",
        gigabytes=0.9, questions=2374,
    ),
    Benchmark(
        "MMBench-EN", "mmbench_en_dev_static", ("gpt_eval_score",), scale=1.0, split="dev",
        dataset=_hub("MMBench", "en"), published=_rows(73.0, 75.7),
        overrides={"generation_kwargs": {"max_new_tokens": 64, "do_sample": False}},
        note="letters are read by rule, no judge and no guess", gigabytes=0.1, questions=4329,
    ),
    Benchmark(
        "MM-Vet", "mmvet", ("gpt_eval_score",), scale=1.0, dataset=_hub("MMVet"), published=_rows(41.9, 49.0),
        tolerance=2.0, judged=True,
        overrides={
            "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": ""}},
            "generation_kwargs": {"max_new_tokens": 512, "do_sample": False},
        },
        note="the question alone; lmms-eval's own prompt asks to think step by step", gigabytes=0.1, questions=218,
    ),
    Benchmark(
        "SEED-Bench image", "seedbench", ("seed_image",), dataset=_hub("SEED-Bench"), published=_rows(68.0, 71.2),
        overrides={"generation_kwargs": {"max_new_tokens": 16, "do_sample": False}},
        note="the 14,232 questions about images", gigabytes=28.0, questions=17990,
    ),
    Benchmark(
        "MMMU", "mmmu_val", ("mmmu_acc",), split="validation", dataset=_hub("MMMU"), published=_rows(39.7, 37.8),
        overrides={"doc_to_messages": None},
        note="images first, their marks stay in the text; MMMU's own rule guesses for answers without an option",
        gigabytes=3.5, questions=900,
    ),
    Benchmark(
        "MathVista", "mathvista_testmini_format", ("llm_as_judge_eval",), scale=1.0, split="testmini",
        dataset=("AI4Math/MathVista", None), published=_rows(42.5, 40.6), tolerance=2.0, judged=True,
        overrides={"generation_kwargs": {"max_new_tokens": 512, "do_sample": False}},
        note="a judge reads the answer out of the text", gigabytes=0.9, questions=1000,
    ),
    Benchmark(
        "GQA", "gqa", ("exact_match",), split="testdev", dataset=_hub("GQA", "testdev_balanced_instructions"),
        also=("testdev_balanced_images",), published=_rows(61.1, 62.5), gigabytes=0.2, questions=12578,
    ),
    Benchmark(
        "ScienceQA image", "scienceqa_img", ("exact_match",), dataset=_hub("ScienceQA", "ScienceQA-IMG"),
        published=_rows(88.6, 91.1), gigabytes=0.2, questions=2017,
    ),
    Benchmark(
        "TextVQA", "textvqa_val", ("exact_match",), split="validation", dataset=_hub("textvqa"),
        published=_rows(64.6, 71.0), overrides={"generation_kwargs": {"max_new_tokens": 16, "do_sample": False}},
        note="without words read by another program", gigabytes=6.0, questions=5000,
    ),
    Benchmark(
        "AI2D", "ai2d", ("exact_match",), dataset=_hub("ai2d"), published=_rows(72.5, 75.3),
        note="letters of the parts are drawn on opaque boxes", gigabytes=0.5, questions=3088,
    ),
    Benchmark(
        "ChartQA", "chartqa", ("relaxed_overall",), dataset=_hub("ChartQA"), published=_rows(51.0, 69.8),
        gigabytes=0.1, questions=2500,
    ),
    Benchmark(
        "DocVQA", "docvqa_val", ("anls",), split="validation", dataset=_hub("DocVQA", "DocVQA"),
        published=_rows(48.6, 74.8), gigabytes=9.0, questions=5349,
    ),
    Benchmark(
        "RealWorldQA", "realworldqa", ("exact_match",), dataset=_hub("RealWorldQA"), published=_rows(54.8, 59.9),
        gigabytes=0.7, questions=765,
    ),
)  # fmt: skip

FAMILIES = ("scenes", "charts", "text", "photos")
OTHER_FAMILIES = (
    "pages", "figures", "gnuplot_figures", "web", "office_tables", "pictures", "twemoji_pictures", "maps",
)  # fmt: skip


def _own(family: str) -> Benchmark:
    return Benchmark(family, f"flashsloth_{family}", ("exact_match",), note="drawn anew; exact match")


NANO = tuple(map(_own, FAMILIES))
QUICK_TASKS = ("pope", "mme", "mmbench_en_dev_static", "scienceqa_img", "ai2d", "chartqa", "realworldqa")
SUITES: Mapping[str, Sequence[Benchmark]] = MappingProxyType(
    {"paper": PAPER, "quick": tuple(row for row in PAPER if row.task in QUICK_TASKS), "nano": NANO}
)
BENCHMARKS = MappingProxyType({row.task: row for row in (*PAPER, *NANO, *map(_own, OTHER_FAMILIES))})


def chosen(suite: str | None, tasks: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of a suite and those named, each once; names may be titles too.

    Raises:
        ValueError: an unknown suite.
    """
    if suite is not None and suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")
    by_title = {row.title.lower(): row for row in BENCHMARKS.values()}
    named = [BENCHMARKS.get(name) or by_title.get(name.lower()) or Benchmark(name, name, ()) for name in tasks]
    rows = [*(SUITES[suite] if suite else ()), *named]
    return list({row.task: row for row in rows}.values())

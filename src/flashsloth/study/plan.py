"""The runs of a study: which recipe each one trains, in which folder, in which order."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..checkpoints.files import write_whole
from ..model.configuration_flashsloth import FlashSlothConfig
from ..train.build import vision_config
from ..train.recipe import ModelRecipe, Recipe, load_recipe, parse_recipe
from .config import EvaluationSettings, Study

PLAN_FILE, RESULT_FILE, WORKER_LOG = "plan.json", "result.json", "worker.log"
TRAINING_FOLDER = "training"
# a study sets these in every recipe; on its command line they would contradict its own fields
_RESERVED = {"seed": "seeds", "output_dir": "output_dir"}


@dataclass(frozen=True)
class Run:
    """One training run of a study: a variant with a seed.

    Attributes:
        folder: holds the plan, the training run and the result.
        visual_tokens: tokens that stand for an image in the language model.
        query_tokens: learned query tokens a question.
    """

    variant: str
    seed: int
    folder: Path
    recipe: Recipe
    evaluation: EvaluationSettings
    visual_tokens: int
    query_tokens: int

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.max_steps or 0 for stage in self.recipe.stages)

    @property
    def is_finished(self) -> bool:
        return (self.folder / RESULT_FILE).is_file()

    def to_json(self) -> dict[str, Any]:
        """What a worker needs, and what must not change between two starts of a study."""
        recipe = TypeAdapter(Recipe).dump_python(self.recipe, mode="json")
        evaluation = TypeAdapter(EvaluationSettings).dump_python(self.evaluation, mode="json")
        return {
            "variant": self.variant,
            "seed": self.seed,
            "visual_tokens": self.visual_tokens,
            "query_tokens": self.query_tokens,
            "evaluation": evaluation,
            "recipe": recipe,
        }

    def write_plan(self) -> None:
        """Save the plan beside the run.

        Raises:
            ValueError: the folder holds a run with other settings, whose result would be mixed with this study's.
        """
        path = self.folder / PLAN_FILE
        plan = self.to_json()
        if path.exists() and _comparable(json.loads(path.read_text(encoding="utf-8"))) != _comparable(plan):
            raise ValueError(
                f"{self.folder} holds a run with other settings than the study has now; delete the folder, undo the "
                "change, or choose another output_dir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)


def make_plan(
    study: Study,
    overrides: Sequence[str] = (),
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    """All runs, seed by seed, so that a study that is stopped early has every variant with its first seeds.

    Args:
        overrides: `key=value` on the base recipe, for every variant.
        only: names of the variants to run; default all.
        seeds: those of the study's seeds to run; default all.

    Raises:
        ValueError: an unknown variant or seed, a recipe that does not load, or one whose length is set by the clock.
    """
    _check_names("variant", only, study.variants)
    _check_names("seed", seeds, study.seeds)
    for override in overrides:
        key = override.partition("=")[0]
        if key in _RESERVED:
            raise ValueError(f"override {override!r}: a study sets {key} itself; change its {_RESERVED[key]} instead")
        for name, variant in study.variants.items():
            if key in [item.partition("=")[0] for item in variant.as_list()]:
                raise ValueError(f"override {override!r} contradicts variant {name!r}, which sets {key} itself")
    runs = []
    for seed in study.seeds if seeds is None else [seed for seed in study.seeds if seed in seeds]:
        for name, variant in study.variants.items():
            if only is None or name in only:
                folder = study.output_dir / name / f"seed-{seed}"
                extra = [f"seed={seed}", f"output_dir={json.dumps(str(folder / TRAINING_FOLDER))}"]
                recipe = load_recipe(study.base, [*overrides, *variant.as_list(), *extra])
                _check_budget(recipe, study.base)
                tokens, queries = _count_tokens(recipe.model)
                runs.append(Run(name, seed, folder, recipe, study.evaluation, tokens, queries))
    return runs


def write_json(path: Path, value: Any) -> None:
    """Save JSON so that the file is there whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def _comparable(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan as two starts of a study compare it: it may have been moved, and recipes may have got new fields."""
    recipe = TypeAdapter(Recipe).dump_python(parse_recipe(plan["recipe"], PLAN_FILE), mode="json")
    evaluation = TypeAdapter(EvaluationSettings).validate_python(plan["evaluation"])
    return {**plan, "recipe": {**recipe, "output_dir": None}, "evaluation": evaluation}


def _check_names(kind: str, wanted: Sequence[Any] | None, known: Any) -> None:
    for name in wanted or ():
        if name not in known:
            raise ValueError(f"no {kind} {name!r} in the study; it has {', '.join(map(str, known))}")


def _check_budget(recipe: Recipe, base: Path) -> None:
    for stage in recipe.stages:
        if stage.max_steps is None or stage.max_minutes is not None:
            raise ValueError(
                f"{base}: stage {stage.name!r} must end by max_steps alone, not by the clock or by epochs: variants "
                "are compared on the same number of images"
            )


def _count_tokens(model: ModelRecipe) -> tuple[int, int]:
    if model.checkpoint is not None:
        raise ValueError(
            "a study needs model.vision and model.language: a model.checkpoint fixes what variants are to change"
        )
    assert model.vision is not None, "the recipe has checked it"
    config = FlashSlothConfig(vision_config=vision_config(model.vision), **model.config)
    return config.num_image_tokens, config.num_query_tokens

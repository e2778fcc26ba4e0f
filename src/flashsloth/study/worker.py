"""One run of a study, in a process of its own: train, count, evaluate, write the result.

    python -m flashsloth.study.worker FOLDER

A process of its own makes time and memory those of one run, and lets a run be killed without the study.
"""

import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from pydantic import TypeAdapter
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.dataset import build_collator, build_dataset
from ..data.sources import resolve_folder
from ..evaluate.synthetic import evaluate
from ..model.modeling_flashsloth import IGNORED_LABEL, FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from ..synthetic import Photographs, SyntheticDataset
from ..train.build import load
from ..train.freeze import PART_NAMES, part_of, set_trainable_parts
from ..train.recipe import Recipe, parse_recipe
from ..train.run import run as train
from .config import EvaluationSettings
from .measure import TrainingUsage, count_flops, mean_counts
from .plan import PLAN_FILE, RESULT_FILE, TRAINING_FOLDER, write_json

# its name as a module: run as a script it is __main__, which the package's logging would leave out
logger = logging.getLogger("flashsloth.study.worker")

USAGE_FILE, LOCK_FILE = "usage.json", "lock"
# images whose first question is counted as a prefill
PREFILL_QUESTIONS = 16


def run_one(folder: Path) -> dict[str, Any]:
    """Carry out the plan in a folder, from where an earlier attempt stopped.

    Returns:
        what was written to the folder's result file.

    Raises:
        ValueError: another process works in the folder, or the recipe cannot be trained.
    """
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            return _run_one(folder)
    except Timeout as error:
        raise ValueError(f"another process is working on {folder}; wait for it or end it") from error


def _run_one(folder: Path) -> dict[str, Any]:
    plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    recipe = parse_recipe(plan["recipe"], str(folder / PLAN_FILE))
    # the folder may have been moved since the plan was made
    recipe.output_dir = folder / TRAINING_FOLDER
    settings = TypeAdapter(EvaluationSettings).validate_python(plan["evaluation"])
    usage = TrainingUsage(folder / USAGE_FILE)
    trained = train(recipe, resume=True, callbacks=[usage])
    model, processor = load(trained)
    model.to(torch.accelerator.current_accelerator() if usage.on_accelerator else "cpu")
    flops = measure_flops(model, processor, recipe, settings)
    started = time.perf_counter()
    report = evaluate(
        model,
        processor,
        split="test",
        count=settings.count,
        seed=settings.seed,
        families=settings.families,
        turns=settings.turns,
        photos=settings.photos,
        batch_size=settings.batch_size,
        majority_images=settings.majority_images,
    )
    logger.info("evaluated in %.0f s: %.1f %% exact", time.perf_counter() - started, 100 * report.overall.accuracy)
    images = {
        stage.name: (stage.max_steps or 0) * stage.batch_size * stage.gradient_accumulation for stage in recipe.stages
    }
    parameters = dict.fromkeys(PART_NAMES, 0)
    for name, parameter in model.named_parameters():
        parameters[part_of(name)] += parameter.numel()
    result = {
        **{key: plan[key] for key in ("variant", "seed", "visual_tokens", "query_tokens")},
        "parameters": parameters,
        "images": images,
        "training": usage.totals(),
        "flops": flops,
        "evaluation": report.to_json(),
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "precision": recipe.precision,
    }
    write_json(folder / RESULT_FILE, result)
    for checkpoint in (folder / TRAINING_FOLDER).glob(f"*/{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)  # served to resume only
    return result


def measure_flops(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    recipe: Recipe,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Operations per image of a training step's forward pass (last stage, its first batch, padding included), of the
    whole step, and of reading one question about one held-out image."""
    stage = recipe.stages[-1]
    model.set_attn_implementation("eager")
    dataset = build_dataset(recipe, stage, model.config.image_height)
    collator = build_collator(recipe, stage, processor)
    first = next(iter(DataLoader(dataset, batch_size=stage.batch_size, collate_fn=collator)))
    batch = {name: value.to(model.device) for name, value in first.items()}
    images = batch["pixel_values"].shape[0]
    set_trainable_parts(model, stage.train)
    model.train()
    forward = count_flops(model, {**batch, "loss_only": True})
    step = count_flops(model, {**batch, "loss_only": True}, backward=True)
    model.eval()
    held_out = SyntheticDataset(
        "test",
        min(settings.count, PREFILL_QUESTIONS),
        settings.seed,
        weights=dict.fromkeys(settings.families, 1.0),
        image_size=model.config.image_height,
        turns=settings.turns,
        photos=Photographs(resolve_folder(settings.photos)),
    )
    prefills, lengths = [], []
    for index in range(len(held_out)):
        item = held_out[index]
        prompt = processor.apply_chat_template(
            [item["messages"][:1]],
            images=item["images"],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        lengths.append(prompt["input_ids"].shape[1])
        prefills.append(count_flops(model, {**prompt, "logits_to_keep": 1}))
    return {
        "training_forward": mean_counts([forward], images),
        "training_step": mean_counts([step], images)["total"],
        "prefill": mean_counts(prefills),
        "prefill_tokens": sum(lengths) / len(lengths),
        # equal in all variants of a seed, unless a length limit has cut answers from some
        "labelled_tokens": int((batch["labels"] != IGNORED_LABEL).sum()),
    }


def main() -> None:
    """Entry point of the worker process."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("flashsloth").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    run_one(Path(sys.argv[1]))


if __name__ == "__main__":
    main()

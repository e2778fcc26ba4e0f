"""Run a recipe: stage after stage, to one ordinary model folder."""

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..data.dataset import build_collator, build_dataset, check_learnable, keep_encoded_samples
from ..data.packing import check_packing
from ..data.recipe import is_streamed
from ..kernels.packed_layers import keep_freed_memory, lacks_kernels
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from .adapters import add_adapter, finish_adapter_folder
from .build import build, load, set_dtypes
from .callbacks import Clock, LogFile, ProgressBar
from .card import record_samples, write_card
from .freeze import count_parts, format_counts, set_trainable_parts
from .kernels import apply_kernels
from .recipe import LOG_FILE, RECIPE_FILE, Recipe, StageRecipe, dump_recipe, with_accumulation
from .trainer import StageTrainer, check_launcher, training_arguments, uses_cpu

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"


def run(recipe: Recipe, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train all stages.

    Args:
        resume: continue in `recipe.output_dir`: finished stages are skipped, an interrupted one goes on from its last
            checkpoint. Without it the folder must not hold a run yet.
        callbacks: added to the Trainer of every stage, after this package's own.

    Returns:
        The folder of the trained model, which `from_pretrained` loads.

    Raises:
        ValueError: the output folder is taken, or the recipe does not fit the data or the model.
    """
    output_dir = recipe.output_dir
    if not resume and (output_dir / RECIPE_FILE).exists():
        raise ValueError(f"output_dir {output_dir} already holds a run; continue it with --resume, or choose another")
    if uses_cpu():
        check_launcher(None)
        _check_precision_on_cpu(recipe.precision)
    processes = PartialState(cpu=uses_cpu())
    processes.wait_for_everyone()
    set_seed(recipe.seed)
    done = {stage.name for stage in recipe.stages if _model_folder(recipe, stage).exists()}
    todo = [stage for stage in recipe.stages if stage.name not in done]
    model: FlashSlothForConditionalGeneration | None = None
    processor: FlashSlothProcessor | None = None
    finished: Path | None = None
    opened: dict[str, Any] = {}
    if todo:  # everything is looked at before a folder is made, so that a refused run leaves none behind
        first = recipe.stages.index(todo[0])
        finished = _model_folder(recipe, recipe.stages[first - 1]) if first else None
        model, processor = build(recipe.model) if finished is None else load(finished)
        for stage in todo:
            dataset = build_dataset(recipe, stage, model.config.image_height)
            check_learnable(dataset, stage, build_collator(recipe, stage, processor))
            opened.setdefault(todo[0].name, dataset)  # what later stages need is opened again, not held until then
    processes.wait_for_everyone()
    if processes.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        _record_recipe(recipe, output_dir / RECIPE_FILE)
    processes.wait_for_everyone()
    try:
        for stage in recipe.stages:
            folder = _model_folder(recipe, stage)
            if stage.name in done:
                logger.info("stage %s is finished already", stage.name)
            else:
                if model is None or processor is None:
                    assert finished is not None, "the first model is there, later ones begin where a stage has ended"
                    model, processor = load(finished)
                stage = with_accumulation(stage, processes.num_processes)
                base = recipe.model.checkpoint if finished is None else str(finished)
                dataset = opened.pop(stage.name, None)
                if dataset is None:
                    dataset = build_dataset(recipe, stage, model.config.image_height)
                if _run_stage(recipe, stage, dataset, model, processor, base, callbacks):
                    model = processor = None  # what this process holds of it is a share
            finished = folder
    except BaseException:
        if processes.is_main_process and last_checkpoint(recipe) is None:
            _forget(recipe)
        raise
    return _model_folder(recipe, recipe.stages[-1])


def _model_folder(recipe: Recipe, stage: StageRecipe) -> Path:
    return recipe.output_dir / stage.name / MODEL_FOLDER


def last_checkpoint(recipe: Recipe) -> Path | None:
    """The folder from which a run that has ended early would go on: of the last stage that has one."""
    for stage in reversed(recipe.stages):
        folder = recipe.output_dir / stage.name
        if (folder / MODEL_FOLDER).exists():
            return folder / MODEL_FOLDER
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if checkpoint is not None:
            return Path(checkpoint)
    return None


def _forget(recipe: Recipe) -> None:
    """Let a run that has ended without a checkpoint be begun again; what it has logged stays to be looked at."""
    (recipe.output_dir / RECIPE_FILE).unlink(missing_ok=True)
    for folder in (*(recipe.output_dir / stage.name for stage in recipe.stages), recipe.output_dir):
        with suppress(OSError):  # it is not there, or not empty
            folder.rmdir()


def _check_precision_on_cpu(precision: str) -> None:
    if precision == "float16":
        raise ValueError("precision: float16 contradicts training on a CPU; use bfloat16 or float32")
    if precision == "bfloat16" and lacks_kernels(torch.bfloat16):
        logger.warning(
            "precision: bfloat16 is several times slower than float32 on this processor, which has no kernels for it; "
            "set precision=float32"
        )


def _samples_drawn(stage: StageRecipe, dataset: Any, samples_of_step: int) -> int | None:
    if stage.max_steps is not None:
        return stage.max_steps * samples_of_step
    return None if stage.epochs is None else math.ceil(stage.epochs * len(dataset))


def _run_stage(
    recipe: Recipe,
    stage: StageRecipe,
    dataset: Any,
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    base: str | None,
    callbacks: Sequence[TrainerCallback],
) -> bool:
    """Train one stage and write its folder; returns whether the model has been sharded over processes.

    Args:
        base: name or folder of `model`, None for one that is not saved yet.
    """
    stage_dir = recipe.output_dir / stage.name
    stage_dir.mkdir(parents=True, exist_ok=True)
    if stage.packing:
        check_packing(model.model.language_model)
    if stage.lora is None:
        counts = set_trainable_parts(model, stage.train)
    else:
        assert base is not None, "the recipe has checked it"
        model = add_adapter(model, stage, base)
        counts = count_parts(model)
    set_dtypes(model, recipe.model.dtype)
    logger.info("stage %s: %s", stage.name, format_counts(counts))
    model.train()
    model.set_attn_implementation(recipe.model.attention)
    apply_kernels(model, recipe.kernels, uses_cpu())
    if recipe.torch_compile:
        model.model.compile(dynamic=False)
    # the last worker of a stream to have samples makes the batches of all others
    slots = None if is_streamed(recipe.data[stage.data], recipe.data) else recipe.loader.prefetch + 1
    trainer = StageTrainer(
        model=model,
        args=training_arguments(recipe, stage, stage_dir, sequential=dataset.is_independent),
        stage=stage,
        train_dataset=dataset,
        data_collator=build_collator(recipe, stage, processor, slots),
        processing_class=processor,
    )
    trainer.remove_callback(PrinterCallback)
    images = stage.batch_size * stage.gradient_accumulation * trainer.args.world_size
    if not stage.glyph_loss:  # which comes from how samples were drawn, not from what they are encoded to
        keep_encoded_samples(
            dataset, _samples_drawn(stage, dataset, images), recipe.loader.cache_mb, recipe.loader.workers
        )
    trainer.add_callback(LogFile(recipe.output_dir / LOG_FILE, stage.name, images))
    bar = ProgressBar(stage.name, images)
    if recipe.logging.progress:
        trainer.add_callback(bar)
    trainer.add_callback(Clock(recipe.checkpoints.every_minutes))
    for callback in callbacks:
        trainer.add_callback(callback)
    if uses_cpu():
        keep_freed_memory()  # a step frees and asks again for the same memory
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(stage_dir)))
    except ValueError as error:
        raise ValueError(_without_traceback(str(error))) from error
    finally:
        bar.stop()
        trainer.stop_workers()
    if trainer.glyph_supervision is not None:
        trainer.glyph_supervision.remove()
    if dataset.num_broken:
        logger.warning("stage %s: this process skipped %d broken samples", stage.name, dataset.num_broken)
    model.eval()
    log = recipe.output_dir / LOG_FILE

    def finish(folder: Path) -> None:
        if stage.lora is not None:
            finish_adapter_folder(folder, str(base))
        if hasattr(dataset, "__len__"):  # a stream has no length
            record_samples(recipe.output_dir, stage.name, len(dataset))
        write_card(folder, recipe, stage, counts, log)

    trainer.save_result(stage_dir / MODEL_FOLDER, finish)
    return trainer.is_sharded


def _without_traceback(message: str) -> str:
    """The reason alone, where torch has put a worker process's whole traceback into the message."""
    if not message.startswith("Caught ") or "DataLoader worker" not in message:
        return message
    kind, separator, reason = message.rstrip().rpartition("\n")[2].partition(": ")
    return reason if separator else kind


def _record_recipe(recipe: Recipe, path: Path) -> None:
    text = dump_recipe(recipe)
    if path.exists() and path.read_text() != text:
        logger.warning("the recipe differs from the one this run began with; the run goes on with the new one")
    path.write_text(text)

"""The Trainer of one stage: optimiser and schedule from the recipe, checkpoints that appear whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import has_length, rotate_checkpoints
from transformers.utils import strtobool

from ..data.recipe import is_streamed
from ..data.sampler import ModalityLengthSampler
from ..data.transport import forget_slots
from .callbacks import reporters
from .glyphs import GlyphSupervision
from .optimization import ProgressScheduler, build_optimizer
from .participation import EveryPartTakesPart
from .recipe import Recipe, StageRecipe
from .saving import replace_folder, staged

# Steps of a stage that only the clock ends; the Trainer wants a number.
UNLIMITED_STEPS = 10**9
_STAGING = "incomplete"
MAX_REASON = 500  # characters of what a library says
# What the launcher sets when it asks for sharding, and what accelerate then makes of the run.
SHARDING_VARIABLES = {
    "ACCELERATE_USE_FSDP": DistributedType.FSDP,
    "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
}


def check_launcher(running: DistributedType | None) -> None:
    """Refuse a run that would not be sharded although its launcher asks for it: accelerate only ignores it.

    Raises:
        ValueError: `running`, what accelerate makes of the run, is not what the launcher asks for.
    """
    for variable, kind in SHARDING_VARIABLES.items():
        if strtobool(os.environ.get(variable, "false")) and running != kind:
            raise ValueError(
                f"the launcher asks for {kind.value}, which needs accelerators (GPUs), and FSDP at least two; this "
                "run would go on without it. Launch with configs/accelerate/ddp.yaml"
            )


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Make one sentence of what libraries raise on a checkpoint that is damaged, or of another model."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:MAX_REASON]
        raise ValueError(
            f"cannot go on from {checkpoint}: {type(error).__name__}: {reason}. Was the recipe's model changed? If "
            "the folder is damaged, remove it: the run goes on from the one before"
        ) from error


def uses_cpu() -> bool:
    """Whether training runs on the CPU, which is so where there is nothing faster."""
    return not torch.accelerator.is_available()


def training_arguments(recipe: Recipe, stage: StageRecipe, output_dir: Path, sequential: bool) -> TrainingArguments:
    """Translate a stage into the Trainer's arguments."""
    workers = recipe.loader.workers
    steps = stage.max_steps or (UNLIMITED_STEPS if stage.epochs is None else -1)
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        max_steps=steps,
        num_train_epochs=stage.epochs or 1,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        # a stage may list parts that its data does not reach: queries when it learns captions
        ddp_find_unused_parameters=True,
        use_cpu=uses_cpu(),
        logging_steps=recipe.logging.every_steps,
        disable_tqdm=True,
        report_to=reporters(recipe.logging),
        include_num_input_tokens_seen="non_padding",
        save_strategy="no" if recipe.checkpoints.every_steps is None else "steps",
        save_steps=recipe.checkpoints.every_steps or 1,
        save_total_limit=recipe.checkpoints.keep,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=recipe.loader.prefetch if workers else None,
        # a worker is a copy of this process: all memory that is written after it has started is copied, in every epoch
        # if they start anew. Those of a stream begin it again where its copy in this process says.
        dataloader_persistent_workers=bool(workers) and not is_streamed(recipe.data[stage.data], recipe.data),
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        train_sampling_strategy="sequential" if sequential else "random",
        # rows differ in length and number of images, so a stream's batches cannot be cut from one big one
        accelerator_config={"dispatch_batches": False},
        label_names=["labels"],
    )


def sharded_layers(model: PreTrainedModel) -> list[str]:
    """Class names of the layers that FSDP gathers one at a time: those of this encoder and this decoder."""
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(model._no_split_modules))


class StageTrainer(Trainer):
    """Trainer with a learning rate per part and a schedule that may follow the clock."""

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: ProgressScheduler | None

    def __init__(self, *args: Any, stage: StageRecipe, **kwargs: Any) -> None:
        self.stage = stage
        self._staging: Path | None = None
        self._parameter_count: int | None = None
        self._loader: DataLoader | None = None
        super().__init__(*args, **kwargs)
        self.glyph_supervision = GlyphSupervision(self.model) if stage.glyph_loss else None
        self.add_callback(EveryPartTakesPart())

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        check_launcher(state.distributed_type)
        if state.distributed_type == DistributedType.FSDP:
            plugin = state.fsdp_plugin
            if plugin.transformer_cls_names_to_wrap is None:
                plugin.transformer_cls_names_to_wrap = sharded_layers(self.model)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.is_sharded and self.stage.optimizer == "muon":
            raise ValueError(
                f"stage {self.stage.name!r}: optimizer: muon contradicts a launcher that shards the optimiser: Muon "
                "needs whole matrices. Use adamw, or launch with configs/accelerate/ddp.yaml"
            )
        if self.shards_weights and getattr(self.model, "head_loss", None) is not None:
            raise ValueError(
                "kernels.cut_cross_entropy contradicts a launcher that shards weights: it reads the whole head. Set "
                "it to false, or launch with configs/accelerate/zero2.yaml or ddp.yaml"
            )
        if self.optimizer is None:
            model = self.model if model is None else model
            muon_dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            self.optimizer = build_optimizer(model, self.stage, self.get_decay_parameter_names(model), muon_dtype)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> ProgressScheduler:
        if self.lr_scheduler is None:
            steps = None if num_training_steps >= UNLIMITED_STEPS else num_training_steps
            self.lr_scheduler = ProgressScheduler(optimizer or self.optimizer, self.stage, steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if has_length(loader) and not len(loader):
            raise ValueError(
                f"stage {self.stage.name!r}: data.{self.stage.data} has {len(self.train_dataset)} samples, which fill "
                f"no batch of {self.stage.batch_size} for each of {self.args.world_size} processes; lower batch_size"
            )
        # Starting workers draws a random number: not one of those that training draws, since a resumed run starts
        # them more often than one that goes on.
        self._loader = getattr(loader, "base_dataloader", loader)
        self._loader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._last_batch_kept():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        with self._last_batch_kept():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _last_batch_kept(self) -> Iterator[None]:
        """Training leaves out a last incomplete batch; an evaluation would lose samples, or all of them."""
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = True

    def stop_workers(self) -> None:
        """End the loader's worker processes; they wait for another epoch otherwise, as long as this process runs."""
        if self._loader is not None:
            self._loader._iterator = None
        forget_slots()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.stage.group_by == "none":
            return super()._get_train_sampler(dataset)
        return ModalityLengthSampler(
            dataset.sizes(),
            self.processing_class.num_image_tokens,
            self.stage.batch_size,
            self.stage.gradient_accumulation * self.args.world_size,
            self.args.seed,
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        # a cache, and the logits of prompts, would be filled and thrown away
        inputs = {**inputs, "use_cache": False, "loss_only": not return_outputs}
        glyphs_BG3 = inputs.pop("glyphs", None)
        if num_items_in_batch is not None:  # a step whose samples are all broken has nothing to learn, not 0 / 0
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if glyphs_BG3 is None or self.glyph_supervision is None:
            return result
        share = self.stage.glyph_loss / self.args.gradient_accumulation_steps
        glyph_loss = share * self.glyph_supervision.loss(glyphs_BG3)
        return (result[0] + glyph_loss, result[1]) if isinstance(result, tuple) else result + glyph_loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # the Trainer's own walks over every parameter at every step
        if self._parameter_count is None:
            self._parameter_count = self.model.num_parameters(exclude_embeddings=True)
        return 6 * self._parameter_count * inputs["input_ids"].numel()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _readable(resume_from_checkpoint):
            TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write beside the others and rename, so that a kill or a full disk never leaves half a checkpoint."""
        run_dir = Path(self.args.output_dir)
        self._staging = staging = run_dir / _STAGING
        try:
            with staged(staging, remove=self.args.should_save):
                if self.args.should_save:
                    shutil.rmtree(staging, ignore_errors=True)
                # every process writes its own random state: none before the folder is clean, none after it is renamed
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
        finally:
            self._staging = None
        if self.args.should_save:
            for folder in staging.iterdir():
                replace_folder(folder, run_dir / folder.name)
            staging.rmdir()
            rotate_checkpoints(output_dir=str(run_dir), save_total_limit=self.args.save_total_limit, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def save_result(self, folder: Path, finish: Callable[[Path], None]) -> None:
        """Write the trained model as an ordinary folder; every process calls it, the first one writes.

        Args:
            finish: adds what else belongs in the folder, before it appears.
        """
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        staging = folder.with_name(f"{folder.name}.{_STAGING}")
        with staged(staging, remove=self.args.should_save):
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self.save_model(str(staging))
            if self.args.should_save:
                # a pickle, which nobody needs to load the model
                (staging / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                finish(staging)
                replace_folder(staging, folder)
        self.accelerator.wait_for_everyone()

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only a share of the model, its gradients or its optimiser."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds only a share of the weights between their uses."""
        return self.is_fsdp_enabled or (
            self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # a run that was killed after its last step, before its model was written, has nothing left to learn
        if self.state.global_step >= self.state.max_steps or self.lr_scheduler.is_over:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

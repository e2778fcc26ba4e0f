"""Training recipes: what they hold, and what contradicts what."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ..data.recipe import LARGEST, DataRecipe, Fraction, Positive, Seed, check_mixtures, check_stage_data
from ..data.recipe import STRICT as _STRICT
from .freeze import PartName
from .settings import apply_override, parse_settings, read_tree

# What a run writes beside the folders of its stages.
RECIPE_FILE, LOG_FILE, SAMPLES_FILE = "recipe.yaml", "log.jsonl", "samples.json"
MOST_WORKERS = 1024


@dataclass(config=_STRICT, kw_only=True)
class TokenizerRecipe:
    """Where the tokenizer comes from."""

    source: str
    """`synthetic` trains a byte-level BPE on the text of the synthetic images; else a folder or hub name."""
    vocabulary_size: Positive | None = None
    """Vocabulary of the tokenizer trained by `synthetic`."""
    families: list[Literal["figures", "web", "pictures", "maps"]] = Field(default_factory=list)
    """Families of images whose words the tokenizer trained by `synthetic` holds whole, beside those of the project's
    own scenes, charts, texts and photographs."""
    eos_token: str | None = None
    """Token that ends an answer, added to the vocabulary where it is new; the tokenizer's own when absent."""
    pad_token: str | None = None
    """Token that fills short rows; the tokenizer's own when absent."""

    def __post_init__(self) -> None:
        if (self.source == "synthetic") != (self.vocabulary_size is not None):
            raise ValueError(
                f"tokenizer.source={self.source!r} contradicts tokenizer.vocabulary_size={self.vocabulary_size}: "
                "a size is needed for, and only for, source: synthetic"
            )
        if self.source != "synthetic" and self.families:
            raise ValueError("tokenizer.families is only for source: synthetic; remove it")
        for name in ("eos_token", "pad_token"):
            if self.source == "synthetic" and getattr(self, name) is not None:
                raise ValueError(f"tokenizer.{name} contradicts tokenizer.source: synthetic, which has its own")


@dataclass(config=_STRICT, kw_only=True)
class ModelRecipe:
    """What is trained: a FlashSloth checkpoint, or an encoder and a decoder to join."""

    checkpoint: str | None = None
    """FlashSloth folder or hub name to start from; excludes every other field of this section."""
    vision: str | dict[str, Any] | None = None
    """Encoder: folder or hub name (pretrained; of a FlashSloth model its encoder is taken), or a full
    sub-configuration with `model_type` (random weights)."""
    language: str | dict[str, Any] | None = None
    """Decoder, given like `vision`; of a FlashSloth model its language model is taken."""
    tokenizer: TokenizerRecipe | None = None
    """Defaults to the decoder's own folder."""
    chat_template: str | None = None
    """Path of a Jinja chat template, relative to the recipe; the authors' template when absent."""
    letterbox: bool = False
    """Pad images to a square, so that they keep their proportions; else they are squashed to the encoder's size."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention kernels while training; the result is the same. On a CPU `eager` is faster than `sdpa` backward."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of frozen weights; weights that learn are float32. `bfloat16` rounds published float16 weights."""
    quantization: Literal["4bit"] | None = None
    """`4bit`: the frozen matrices of the language model in NF4, by bitsandbytes; needs `checkpoint` and `lora`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Further fields of `FlashSlothConfig`: compressor, compressor_window, num_query_tokens, view_grid, ... Of a
    `checkpoint` only `compressor_windows` can be given anew: its weights then learn to serve all of them."""

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            fields = [
                name
                for name in ("vision", "language", "tokenizer", "chat_template", "letterbox")
                if getattr(self, name)
            ]
            fields += [f"config.{name}" for name in self.config if name != "compressor_windows"]
            for name in fields:
                raise ValueError(
                    f"model.checkpoint contradicts model.{name}, which the checkpoint already holds; remove one"
                )
        elif self.vision is None or self.language is None:
            raise ValueError("model needs either model.checkpoint, or both model.vision and model.language")
        if self.quantization is not None and self.checkpoint is None:
            raise ValueError(
                f"model.quantization: {self.quantization} needs model.checkpoint, which is quantized as it is read"
            )
        for name in ("vision", "language"):
            value = getattr(self, name)
            if isinstance(value, dict) and "model_type" not in value:
                raise ValueError(f"model.{name} is a sub-configuration and lacks model_type (siglip_vision_model)")
        if isinstance(self.language, dict) and self.tokenizer is None:
            raise ValueError("model.language has no tokenizer of its own: give model.tokenizer as well")


@dataclass(config=_STRICT, kw_only=True)
class LoraRecipe:
    """Low-rank adapters on the encoder's and the decoder's matrices, in place of training these two in full."""

    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    """The adapters' output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of linear layers (`q_proj`), or all linear layers of the encoder and decoder parts in `train`."""


@dataclass(config=_STRICT, kw_only=True)
class StageRecipe:
    """One training stage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    data: str
    """Key in the recipe's `data`."""
    template: Literal["plain", "chat"]
    """`plain`: image and caption, loss on the caption; `chat`: conversation, loss on the answers."""
    chat_template_kwargs: dict[str, bool | int | str] = Field(default_factory=dict)
    """Variables of the chat template; `space_before_query: true` is what the published weights were trained with."""
    train: Annotated[list[PartName], Field(min_length=1)]
    """Parts that receive gradients; every other part stays frozen."""
    lora: LoraRecipe | None = None
    """Train `language_model` and `vision_encoder` through adapters; the other parts in `train` are trained in full."""
    learning_rate: Annotated[float, Field(gt=0)]
    learning_rates: dict[PartName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Exceptions from `learning_rate`, by part."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the hidden matrices, AdamW for embeddings, norms, biases and heads."""
    muon_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the matrices under Muon (scaled to AdamW's update size); `learning_rate` when absent."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """0 switches clipping off."""
    schedule: Literal["cosine", "warmup_stable_decay", "constant"] = "cosine"
    warmup: Fraction = 0.03
    """Share of the stage in which the rate rises linearly."""
    decay: Fraction = 0.2
    """Share of the stage in which `warmup_stable_decay` falls linearly."""
    final_learning_rate: Fraction = 0.0
    """Where the schedule ends, as a share of the peak."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Positive | None = None
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall-clock budget; the schedule follows the elapsed time when it is given. Resuming keeps the time used."""
    batch_size: Positive
    """Per device."""
    gradient_accumulation: Positive = 1
    global_batch_size: Positive | None = None
    """Samples of one optimiser step over all devices; gradients are accumulated as often as that takes."""
    turns: Positive | None = None
    """Question-answer turns an image (synthetic data)."""
    glyph_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a loss that tells an encoder begun at random which characters its patches show (synthetic data). It is
    added to the loss that is logged."""
    max_length: Positive = 3072
    """Longest sequence in tokens; turns that do not fit are dropped whole."""
    group_by: Literal["none", "modality_length"] = "none"
    """`modality_length`: a batch holds samples of similar length, all with images or all without."""
    packing: bool = False
    """Lay the samples of a batch into as few rows of `max_length` tokens as they need, without attention between
    samples; the loss is the same. One single row with attention: flash_attention_2."""
    pad_to_multiple_of: Positive | None = None
    """Fewer distinct lengths mean fewer compilations."""

    def __post_init__(self) -> None:
        strays = [part for part in self.learning_rates if part not in self.train]
        if strays:
            raise ValueError(
                f"stage {self.name!r}: learning_rates.{strays[0]} contradicts train, which does not list {strays[0]!r}"
            )
        if self.epochs is None and self.max_steps is None and self.max_minutes is None:
            raise ValueError(f"stage {self.name!r} has no end: give epochs, max_steps or max_minutes")
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(f"stage {self.name!r}: epochs contradicts max_steps; give one of the two")
        if self.muon_learning_rate is not None and self.optimizer != "muon":
            raise ValueError(f"stage {self.name!r}: muon_learning_rate contradicts optimizer: {self.optimizer}")
        if self.template == "plain" and self.turns is not None:
            raise ValueError(f"stage {self.name!r}: turns contradicts template: plain, which has one caption an image")
        if self.glyph_loss and self.packing:
            raise ValueError(f"stage {self.name!r}: glyph_loss contradicts packing")
        if self.glyph_loss and "vision_encoder" not in self.train:
            raise ValueError(f"stage {self.name!r}: glyph_loss contradicts train, which does not list vision_encoder")
        if self.template == "plain" and self.chat_template_kwargs:
            raise ValueError(f"stage {self.name!r}: chat_template_kwargs contradicts template: plain")
        if self.schedule == "warmup_stable_decay" and self.warmup + self.decay > 1:
            raise ValueError(f"stage {self.name!r}: warmup and decay together exceed the stage")
        if self.lora is not None and not {"language_model", "vision_encoder"} & set(self.train):
            raise ValueError(
                f"stage {self.name!r}: lora contradicts train, which lists neither language_model nor vision_encoder"
            )
        if self.global_batch_size is not None:
            if self.gradient_accumulation != 1:
                raise ValueError(f"stage {self.name!r}: global_batch_size contradicts gradient_accumulation; give one")
            if self.global_batch_size % self.batch_size:
                raise ValueError(
                    f"stage {self.name!r}: global_batch_size {self.global_batch_size} is no multiple of batch_size "
                    f"{self.batch_size}"
                )
        if set(self.name) == {"."} or self.name in (RECIPE_FILE, LOG_FILE, SAMPLES_FILE):
            raise ValueError(f"stage {self.name!r}: the name is taken by the run's own files; choose another")
        if len(set(self.train)) != len(self.train):
            raise ValueError(f"stage {self.name!r}: train lists a part twice")


@dataclass(config=_STRICT, kw_only=True)
class LoggingRecipe:
    every_steps: Positive = 10
    tensorboard: bool = True
    """Event files in each stage's folder, for `tensorboard --logdir`."""
    wandb: bool = False
    """Log to Weights & Biases, which must be installed."""
    progress: bool = True
    """Draw a progress bar where the output is a terminal."""


@dataclass(config=_STRICT, kw_only=True)
class CheckpointRecipe:
    every_steps: Positive | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    keep: Positive = 2
    """Older ones are deleted."""


@dataclass(config=_STRICT, kw_only=True)
class LoaderRecipe:
    workers: Annotated[int, Field(ge=0, le=MOST_WORKERS)] = 0
    """Processes that read, render and tokenise."""
    prefetch: Positive = 4
    """Batches each worker prepares ahead."""
    cache_mb: Annotated[int, Field(ge=0, le=LARGEST)] = 512
    """Megabytes of encoded samples that are kept in shared memory for later epochs, where a stage draws more samples
    than its data hold; 0 keeps none. Each process of a distributed run has its own."""


@dataclass(config=_STRICT, kw_only=True)
class KernelRecipe:
    """Kernels of optional libraries (`flashsloth[kernels]`, GPUs only)."""

    liger: bool = False
    """Liger's norms, rotations and gated layers in the decoder."""
    cut_cross_entropy: bool = False
    """The loss without the logits in memory: worth it for large vocabularies."""


@dataclass(config=_STRICT, kw_only=True)
class Recipe:
    """A whole training run."""

    model: ModelRecipe
    data: Annotated[dict[str, DataRecipe], Field(min_length=1)]
    stages: Annotated[list[StageRecipe], Field(min_length=1)]
    output_dir: Path
    license: str | None = None
    """Licence of the trained weights for the model card (`apache-2.0`); you know what the data and the base allow."""
    seed: Seed = 0
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Weights are float32; `bfloat16` and `float16` compute under autocast, the latter with a scaled loss."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    torch_compile: bool = False
    kernels: KernelRecipe = Field(default_factory=KernelRecipe)
    logging: LoggingRecipe = Field(default_factory=LoggingRecipe)
    checkpoints: CheckpointRecipe = Field(default_factory=CheckpointRecipe)
    loader: LoaderRecipe = Field(default_factory=LoaderRecipe)

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ, got {', '.join(names)}")
        check_mixtures(self.data)
        for stage in self.stages:
            check_stage_data(stage, self.data)
        _check_adapters(self)


def _check_adapters(recipe: Recipe) -> None:
    """Adapters are saved beside a model that lies on the disk, so they come last."""
    for stage, following in zip(recipe.stages, [*recipe.stages[1:], None], strict=True):
        if stage.lora is not None and following is not None:
            raise ValueError(
                f"stage {stage.name!r}: lora contradicts stage {following.name!r} after it; end the recipe here, then "
                "`flashsloth merge` the adapter and give the result to another recipe as model.checkpoint"
            )
        if stage.lora is None and recipe.model.quantization is not None:
            raise ValueError(
                f"stage {stage.name!r}: model.quantization: {recipe.model.quantization} contradicts a stage without "
                "lora, since quantized weights cannot learn"
            )
    if recipe.stages[0].lora is not None and recipe.model.checkpoint is None:
        raise ValueError(
            f"stage {recipe.stages[0].name!r}: lora contradicts model.vision and model.language: an adapter needs a "
            "whole model to stand on; give model.checkpoint, or a stage without lora before it"
        )
    if recipe.stages[0].lora is not None and recipe.model.config:
        raise ValueError(
            f"stage {recipe.stages[0].name!r}: lora contradicts model.config: an adapter keeps the configuration of "
            "the model it stands on; train without lora, or leave compressor_windows as they are"
        )
    if recipe.model.dtype == "bfloat16" and recipe.precision != "bfloat16":
        raise ValueError(f"model.dtype: bfloat16 contradicts precision: {recipe.precision}")


def with_accumulation(stage: StageRecipe, num_processes: int) -> StageRecipe:
    """The stage with `gradient_accumulation` set so that all devices together see `global_batch_size` samples a step.

    Raises:
        ValueError: the devices do not divide the batch.
    """
    if stage.global_batch_size is None:
        return stage
    together = stage.batch_size * num_processes
    if stage.global_batch_size % together:
        raise ValueError(
            f"stage {stage.name!r}: global_batch_size {stage.global_batch_size} is no multiple of batch_size "
            f"{stage.batch_size} times {num_processes} devices"
        )
    return dataclasses.replace(
        stage, global_batch_size=None, gradient_accumulation=stage.global_batch_size // together
    )


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        path: YAML file. Relative paths in it are relative to the working directory; `chat_template` to the recipe.
        overrides: `a.b=value`, YAML values; a stage goes by name or index (`stages.finetune.max_steps=10`).

    Raises:
        ValueError: unreadable file, unknown key (with the nearest valid one), wrong type, contradicting fields.
    """
    path = Path(path)
    tree = read_tree(path)
    for override in overrides or []:
        apply_override(tree, override)
    recipe = parse_recipe(tree, source=str(path))
    if recipe.model.chat_template is not None:
        recipe.model.chat_template = str((path.parent / recipe.model.chat_template).resolve())
    return recipe


def parse_recipe(tree: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a nested mapping into a `Recipe`; see `load_recipe` for the errors."""
    return parse_settings(Recipe, tree, source)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(TypeAdapter(Recipe).dump_python(recipe, mode="json"), sort_keys=False)

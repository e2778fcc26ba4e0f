"""The `data` section of a recipe: strict dataclasses, one kind of source each; and what is read of the rest of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ..model.image_loading import DEFAULT_MAX_PIXELS

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

LARGEST = 2**31 - 1  # of counts: what every library beneath takes
MOST_BROKEN = 10_000_000  # 80 MB of memory remember which they were
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(config=STRICT, kw_only=True)
class SyntheticData:
    """Images and questions rendered by `flashsloth.synthetic`, a new one for every index."""

    kind: Literal["synthetic"]
    size: Positive
    """Images in one epoch."""
    seed: int = 0
    """Added to the split's own seed."""
    weights: dict[str, Annotated[float, Field(ge=0)]]
    """Share of each family."""
    photos: str | None = None
    """Folder (or environment variable, written `$NAME`) of the CIFAR-10 parquet files, for the photo family."""
    drawn: str | None = None
    """Folder (or environment variable, written `$NAME`) of `flashsloth data draw`; the families that it holds are read
    from there, the others rendered as they are needed."""
    absent_share: Fraction = 0.0
    """Of the questions about an image, the share that is about what is not there; the answer is "none"."""
    question_shares: dict[str, Fraction] = Field(default_factory=dict)
    """Of the questions of a task, the share that is asked: less of what is learned leaves room for the rest."""


@dataclass(config=STRICT, kw_only=True)
class _Limits:
    """What every source of recorded data is held to."""

    max_broken: Annotated[int, Field(ge=0, le=MOST_BROKEN)] = 0
    """Different broken samples that a process names and skips before the run stops."""
    max_images: Positive = 16
    """Images of one sample; a sample with more is broken."""
    max_pixels: Positive = DEFAULT_MAX_PIXELS
    """Pixels of one image; a larger one is refused from its header and its sample is broken."""


@dataclass(config=STRICT, kw_only=True)
class LlavaData(_Limits):
    """A LLaVA JSON or JSONL file with an image folder."""

    kind: Literal["llava"]
    path: Path
    image_folder: Path


@dataclass(config=STRICT, kw_only=True)
class MessagesData(_Limits):
    """A Hugging Face data set with a column `messages` and, where there are images, a column `images`."""

    kind: Literal["messages"]
    path: str
    """A parquet, arrow, json or jsonl file, a folder of them or of `save_to_disk`, or the name of a data set on the
    hub."""
    config: str | None = None
    """Configuration of a data set on the hub."""
    split: str = "train"
    image_folder: Path | None = None
    """Where images given by name lie; without it a name is a path."""
    streaming: bool = False
    """Read from the beginning while training instead of by index. The stage then ends by max_steps or max_minutes."""
    shuffle_buffer: Positive = 1000
    """Samples among which a stream draws the next one."""

    def __post_init__(self) -> None:
        if self.config is not None and Path(self.path).exists():
            raise ValueError(
                f"data: config={self.config!r} contradicts path={self.path!r}, a local file or folder without any"
            )


@dataclass(config=STRICT, kw_only=True)
class WebdatasetData(_Limits):
    """Tar shards read from the beginning while training; the stage ends by max_steps or max_minutes."""

    kind: Literal["webdataset"]
    shards: str
    """Paths or URLs with braces (`shards/{000..127}.tar`), or a local pattern (`shards/*.tar`)."""
    shuffle_buffer: Positive = 1000
    """Samples among which the next one is drawn, beside the order of shards."""


@dataclass(config=STRICT, kw_only=True)
class MixtureData:
    """Several sources of the same recipe, mixed by weight."""

    kind: Literal["mixture"]
    sources: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=2)]
    """Weight of each source, by its name in `data`; they need not sum to one."""
    size: Positive | None = None
    """Samples in one epoch; the sources' sizes together when absent."""


DataRecipe = Annotated[
    SyntheticData | LlavaData | MessagesData | WebdatasetData | MixtureData, Field(discriminator="kind")
]


class StageSettings(Protocol):
    """What preparing data reads of a stage (`train.recipe.StageRecipe`)."""

    @property
    def name(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def template(self) -> str: ...
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...
    @property
    def epochs(self) -> float | None: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def gradient_accumulation(self) -> int: ...
    @property
    def turns(self) -> int | None: ...
    @property
    def glyph_loss(self) -> float: ...
    @property
    def max_length(self) -> int: ...
    @property
    def group_by(self) -> str: ...
    @property
    def packing(self) -> bool: ...
    @property
    def pad_to_multiple_of(self) -> int | None: ...


class ModelSettings(Protocol):
    """What preparing data reads of the section `model`."""

    @property
    def attention(self) -> str: ...


class RecipeSettings(Protocol):
    """What preparing data reads of a recipe (`train.recipe.Recipe`)."""

    @property
    def model(self) -> ModelSettings: ...
    @property
    def data(self) -> dict[str, Any]: ...
    @property
    def stages(self) -> Sequence[StageSettings]: ...
    @property
    def seed(self) -> int: ...


def is_streamed(source: Any, data: dict[str, Any]) -> bool:
    """Whether a source has a beginning but neither a length nor an index."""
    if isinstance(source, MixtureData):
        return any(is_streamed(data[name], data) for name in source.sources)
    return isinstance(source, WebdatasetData) or (isinstance(source, MessagesData) and source.streaming)


def check_mixtures(data: dict[str, Any]) -> None:
    """Refuse mixtures of what is not there.

    Raises:
        ValueError: a mixture names an unknown source or another mixture, or an epoch's size for a stream.
    """
    for name, source in data.items():
        if not isinstance(source, MixtureData):
            continue
        for part in source.sources:
            if part not in data:
                raise ValueError(f"data.{name}.sources names {part!r}, but data defines {', '.join(data)}")
            if isinstance(data[part], MixtureData):
                raise ValueError(f"data.{name}.sources names {part!r}, which is a mixture itself; list its sources")
        if source.size is not None and is_streamed(source, data):
            raise ValueError(
                f"data.{name}.size contradicts a streamed source in data.{name}.sources: it has no epochs"
            )


def check_stage_data(stage: StageSettings, data: dict[str, Any]) -> None:
    """Refuse what a stage asks of a source that cannot give it.

    Raises:
        ValueError: the message names both fields.
    """
    where = f"stage {stage.name!r}"
    if stage.data not in data:
        raise ValueError(
            f"{where}: data={stage.data!r} contradicts the recipe's data, which defines {', '.join(data)}"
        )
    source = data[stage.data]
    parts = [data[name] for name in source.sources] if isinstance(source, MixtureData) else [source]
    rendered = [isinstance(part, SyntheticData) for part in parts]
    if stage.turns is not None and not any(rendered):
        raise ValueError(f"{where}: turns contradicts data.{stage.data}.kind: {source.kind} has its own")
    if stage.glyph_loss and not all(rendered):
        raise ValueError(
            f"{where}: glyph_loss contradicts data.{stage.data}: only rendered images know where characters stand"
        )
    if is_streamed(source, data) and stage.epochs is not None:
        raise ValueError(f"{where}: epochs contradicts data.{stage.data}, which is streamed; give max_steps")
    if stage.group_by != "none":
        if is_streamed(source, data):
            raise ValueError(f"{where}: group_by contradicts data.{stage.data}, which is streamed and has no index")
        if any(rendered):
            raise ValueError(
                f"{where}: group_by contradicts data.{stage.data}: the length of a rendered sample is not known "
                "before it is drawn"
            )

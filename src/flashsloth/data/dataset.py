"""The training data of a stage, from the recipe."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from .cache import SampleCache
from .collator import Collator
from .mixture import BLOCK, MixedSamples, MixedStream
from .recipe import (
    DataRecipe,
    LlavaData,
    MessagesData,
    MixtureData,
    RecipeSettings,
    StageSettings,
    SyntheticData,
    is_streamed,
)
from .sources import LlavaSamples, MessagesSamples, RecordedSamples, SyntheticSamples
from .streams import MessagesStream, RecordStream, WebdatasetStream

if TYPE_CHECKING:
    from ..model.processing_flashsloth import FlashSlothProcessor


TEMPLATE_WITHOUT_ANSWERS = (
    "the chat template marks nothing as an answer, so there is nothing to learn; put {% generation %} and "
    "{% endgeneration %} around the assistant's text in it"
)


def build_dataset(recipe: RecipeSettings, stage: StageSettings, image_size: int) -> Any:
    """The training data of a stage, map-style or a stream; items are `Record` or `Sample`.

    Args:
        image_size: width and height of rendered images, in pixels.

    Raises:
        ValueError: data that is not there; the message names it.
    """
    source = recipe.data[stage.data]
    if not isinstance(source, MixtureData):
        return build_source(source, stage.data, recipe.seed, image_size, stage.turns)
    parts = {
        name: build_source(recipe.data[name], name, recipe.seed, image_size, stage.turns) for name in source.sources
    }
    if is_streamed(source, recipe.data):
        return MixedStream(parts, source.sources, recipe.seed)
    return MixedSamples(parts, source.sources, recipe.seed, source.size)


def build_source(source: DataRecipe, name: str, seed: int, image_size: int, turns: int | None = None) -> Dataset:
    """One source that is not a mixture. See `build_dataset`."""
    if isinstance(source, SyntheticData):
        return SyntheticSamples(source, name, "train", seed, image_size, turns=turns or 1)
    if isinstance(source, LlavaData):
        return LlavaSamples(source, name)
    if isinstance(source, MessagesData):
        return MessagesStream(source, name, seed) if source.streaming else MessagesSamples(source, name)
    if isinstance(source, MixtureData):
        raise ValueError(f"data.{name} is a mixture; its sources are built one by one")
    return WebdatasetStream(source, name, seed)


def build_collator(
    recipe: RecipeSettings, stage: StageSettings, processor: "FlashSlothProcessor", slots: int | None = None
) -> Collator:
    """What makes the batches of a stage.

    Args:
        slots: of a loader's worker, as `Batch`.
    """
    packing = None
    if stage.packing:  # the kernels of flash attention know where samples end in a single row only
        packing = "single_row" if recipe.model.attention == "flash_attention_2" else "rows"
    return Collator(
        processor,
        stage.template,
        stage.max_length,
        stage.pad_to_multiple_of,
        packing,
        stage.chat_template_kwargs,
        with_glyphs=stage.glyph_loss > 0,
        slots=slots,
    )


def keep_encoded_samples(dataset: Any, samples: int | None, megabytes: int, workers: int) -> None:
    """Have recorded sources with an index keep encoded samples, where they are drawn more than once.

    Args:
        samples: drawn from the data set by all processes; None where only the clock ends it.
        megabytes: kept by all sources together, shared by the workers of a loader.
    """
    shares = [(dataset, 1.0)]
    if isinstance(dataset, (MixedSamples, MixedStream)):
        shares = list(zip(dataset.sources, dataset.order.counts / BLOCK, strict=True))
    repeated = [
        source
        for source, share in shares
        if isinstance(source, RecordedSamples) and (samples is None or samples * share > len(source))
    ]
    if megabytes:
        for source in repeated:
            source.cache = SampleCache(len(source), megabytes // len(repeated), workers)


def check_learnable(dataset: Any, stage: StageSettings, collator: Collator) -> None:
    """Refuse data of which nothing can be learned.

    Args:
        dataset: of the stage. Of each source, samples are read up to the first one that can be used.

    Raises:
        ValueError: the template marks no answers, or a source has no sample that can be used, or more broken ones
            than it allows.
    """
    if not collator.marks_answers():
        raise ValueError(f"stage {stage.name!r}: {TEMPLATE_WITHOUT_ANSWERS}")
    for source in dataset.sources if isinstance(dataset, (MixedSamples, MixedStream)) else [dataset]:
        if isinstance(source, RecordStream):
            items: Iterable[Any] = source.one_pass()
        else:
            items = (source[index] for index in range(len(source)))
        if not any(map(collator.is_usable, items)):
            raise ValueError(
                f"stage {stage.name!r}: nothing can be learned from data.{source.name}: it has no sample that can be "
                f"used ({source.num_broken} broken ones); flashsloth data check names every defect"
            )

"""Tables of the static tier: rows of strings, drawn on the terminal or written as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .tokens import ModelCost

BASELINE = "flashsloth"
TERA, GIGA, MEBI, KIBI = 1e12, 1e9, 2**20, 2**10


@dataclass(frozen=True)
class TableData:
    """A table.

    Attributes:
        title: one line.
        columns: headings; the first column is text, the others are numbers.
        rows: as many strings as columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """The table in the dialect of GitHub, under its title in bold."""
        ruler = ["---", *["---:"] * (len(self.columns) - 1)]
        return "\n".join([f"**{self.title}**", "", *map(_line, [self.columns, ruler, *self.rows])])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count else "-"


def _published(cost: ModelCost) -> str:
    if cost.published_parameters is None:
        return "-"
    difference = cost.total_parameters - cost.published_parameters
    return f"{difference:+,}" if difference else "exact"


def model_table(costs: Sequence[ModelCost], dtype: str) -> TableData:
    """Parameters by part in millions, and what one more token takes."""
    rows = [
        (
            cost.title,
            cost.origin,
            *(_millions(count) for count in cost.parameters.values()),
            f"{cost.total_parameters:,}",
            _published(cost),
            f"{cost.cache_bytes_per_token / KIBI:,.0f}",
            f"{cost.decode_bytes / GIGA:.2f}",
        )
        for cost in costs
    ]
    columns = (
        "model", "built", "vision M", "connector M", "EmbQ M", "LLM M", "head M", "parameters", "published",
        "KV KiB/token", "decode reads GB",
    )  # fmt: skip
    return TableData(f"Parameters, and the cost of one more token in {dtype}", columns, rows)


def image_table(costs: Sequence[ModelCost], index: int, text_tokens: int, dtype: str, batch: int) -> TableData:
    """Tokens, operations (tera to the first token, giga per token after it) and memory, at the size of that index."""
    baseline = next((cost.images[index].flops.to_first_token for cost in costs if cost.name == BASELINE), None)
    rows = []
    for cost in costs:
        image = cost.images[index]
        flops, memory = image.flops, image.memory
        row = [
            cost.title,
            f"{image.views}",
            f"{image.patches}",
            f"{image.visual_tokens}",
            *(f"{part / TERA:.2f}" for part in (flops.vision, flops.compressor, flops.prefill, flops.to_first_token)),
            f"{flops.decode_token / GIGA:.2f}",
            f"{memory.weights / GIGA:.2f}",
            f"{memory.cache / MEBI:,.0f}",
            f"{memory.activations / MEBI:,.0f}",
        ]
        if baseline is not None:
            row.insert(8, f"{flops.to_first_token / baseline:.2f}")
        rows.append(tuple(row))
    columns = [
        "model", "views", "patches", "tokens", "vision T", "compressor T", "prefill T", "total TFLOP", "decode G",
        "weights GB", "KV MiB", "activations MiB",
    ]  # fmt: skip
    if baseline is not None:
        columns.insert(8, "/ FlashSloth")
    first = costs[0].images[index]
    prompts = "" if batch == 1 else f", batch of {batch}"
    title = f"An image of {first.width}x{first.height} and {text_tokens} text tokens, {dtype}{prompts}"
    return TableData(title, tuple(columns), rows)


def tables(costs: Sequence[ModelCost], text_tokens: int, dtype: str, batch: int) -> list[TableData]:
    """The table of models, then one table per image size."""
    sizes = range(len(costs[0].images))
    return [model_table(costs, dtype), *(image_table(costs, index, text_tokens, dtype, batch) for index in sizes)]


def notes(costs: Sequence[ModelCost]) -> list[str]:
    """One line per model about which something is assumed."""
    return [f"{cost.title}: {cost.notes}" for cost in costs if cost.notes]

"""Keys and values of the rows that are being answered together: rows join and leave between two steps.

Shape suffixes: R rows there is room for, B rows, H heads, C columns there is room for, T tokens, S width of a head.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Room is made for so many columns at a time: all rows are moved once for so many steps.
COLUMN_STEP = 64

# Keys and values of every layer for one row, (H, T, S) each.
RowStates = list[tuple[Tensor, Tensor]]


@dataclass
class _Window:
    """Which part of the buffers is in use: the first rows, and the columns from `first` up to `last`."""

    rows: int = 0
    first: int = 0
    last: int = 0


class _BufferedLayer(DynamicLayer):
    """A layer whose tokens are written behind each other in a buffer (R, H, C, S), of which a window is in use."""

    def __init__(self, window: _Window, like: Tensor, like_values: Tensor, rows: int, columns: int) -> None:
        super().__init__()
        self.window = window
        # zeros: what padding holds is masked, but must be finite
        self.keys = like.new_zeros(rows, like.shape[1], columns, like.shape[-1])
        self.values = like.new_zeros(rows, like_values.shape[1], columns, like_values.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        window, end = self.window, self.window.last + key_states.shape[-2]
        self.keys[: window.rows, :, window.last : end] = key_states
        self.values[: window.rows, :, window.last : end] = value_states
        used = slice(window.first, end)
        return self.keys[: window.rows, :, used], self.values[: window.rows, :, used]

    def get_seq_length(self) -> int:
        return self.window.last - self.window.first


class RunningCache(Cache):
    """The cache of a batch whose rows end in the same column, each as long as it is, with padding on its left.

    Sliding windows are left to the mask: every layer keeps every token.

    Args:
        max_rows: rows at once.
    """

    def __init__(self, max_rows: int) -> None:
        super().__init__(layers=[])
        self.max_rows = max_rows
        self.lengths: list[int] = []
        self._window = _Window()
        self._shape = (0, 0)  # rows and columns of the buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def join(self, cache: Cache, lengths: Sequence[int]) -> None:
        """Add rows behind the others.

        Args:
            cache: of a prompt that was run, rows padded on the left.
            lengths: tokens of each of its rows.
        """
        window, new, longest = self._window, len(lengths), max(lengths)
        self._make_room(window.rows + new, max([longest, *self.lengths]), cache)
        rows, columns = slice(window.rows, window.rows + new), slice(window.last - longest, window.last)
        for own, other in zip(self.layers, cache.layers, strict=True):
            own.keys[rows, :, columns] = other.keys[:, :, -longest:]
            own.values[rows, :, columns] = other.values[:, :, -longest:]
        window.rows += new
        self.lengths += lengths
        self._trim()

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        window, last = self._window, len(self.lengths) - 1
        if row != last:
            columns = slice(window.first, window.last)
            for layer in self.layers:
                layer.keys[row, :, columns] = layer.keys[last, :, columns]
                layer.values[row, :, columns] = layer.values[last, :, columns]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        window.rows -= 1
        self._trim()

    def clear(self) -> None:
        """Forget every row and give the memory back."""
        self.layers, self.lengths, self._shape = [], [], (0, 0)
        self._window = _Window()

    def next_inputs(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Attention mask (B, T) with one more token a row, None where there is no padding, and positions (B, 1)."""
        self._make_room(len(self.lengths), max(self.lengths))
        width = self._window.last - self._window.first
        lengths_B1 = torch.tensor(self.lengths, device=device).unsqueeze(1)
        if min(self.lengths) == width:
            return None, lengths_B1
        return (torch.arange(width + 1, device=device) >= width - lengths_B1).long(), lengths_B1

    def advance(self) -> None:
        """Count the token of every row that a step has written."""
        self._window.last += 1
        self.lengths = [length + 1 for length in self.lengths]

    def row(self, row: int) -> RowStates:
        """A copy of what a row has."""
        columns = slice(self._window.last - self.lengths[row], self._window.last)
        return [(layer.keys[row, :, columns].clone(), layer.values[row, :, columns].clone()) for layer in self.layers]

    def _trim(self) -> None:
        self._window.first = self._window.last - max(self.lengths, default=0)

    def _make_room(self, rows: int, longest: int, cache: Cache | None = None) -> None:
        """Room for so many rows, for the longest of them left of the common end, and for one token behind it.

        Args:
            cache: of rows that join, whose shapes the first buffers take.
        """
        window = self._window
        if rows <= self._shape[0] and longest <= window.last < self._shape[1]:
            return
        used_rows, width = window.rows, window.last - window.first
        columns = (-(-longest // COLUMN_STEP) + 1) * COLUMN_STEP
        old, place = self.layers, slice(window.first, window.last)
        if rows > self._shape[0] or columns > self._shape[1]:
            capacity = min(self.max_rows, 1 << (rows - 1).bit_length())
            self._shape = (capacity, columns)
            like = old if cache is None else cache.layers
            self.layers = [_BufferedLayer(window, layer.keys, layer.values, *self._shape) for layer in like]
        window.last = self._shape[1] - COLUMN_STEP
        window.first = window.last - width
        if used_rows:
            target = slice(window.first, window.last)
            for source, own in zip(old, self.layers, strict=True):
                # the two may overlap
                own.keys[:used_rows, :, target] = source.keys[:used_rows, :, place].clone()
                own.values[:used_rows, :, target] = source.values[:used_rows, :, place].clone()


def prompt_cache(states: RowStates, tokens: int) -> DynamicCache:
    """A cache for running prompts, which keeps every token in every layer; with the first `tokens` of a row in it."""
    cache = DynamicCache()
    for index, (keys_HTS, values_HTS) in enumerate(states if tokens else []):
        cache.update(keys_HTS[None, :, :tokens], values_HTS[None, :, :tokens], index)
    return cache


def check_layers(config: PreTrainedConfig) -> None:
    """Raises:
    ValueError: a language model that keeps something else than keys and values.
    """
    kinds: Iterable[type] = {type(layer) for layer in DynamicCache(config=config).layers}
    others = sorted(kind.__name__ for kind in kinds if kind not in (DynamicLayer, DynamicSlidingWindowLayer))
    if others:
        raise ValueError(
            f"{config.model_type!r} keeps {', '.join(others)}, whose rows cannot be joined while they are answered; "
            "ask it with `flashsloth run`, which answers batch by batch"
        )

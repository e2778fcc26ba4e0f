"""Several samples in one row, each as if it were alone."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..model.prompt_encoding import IGNORED_LABEL

ABSENT_POSITION = -1
_PROBE_TOKENS = 4


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Spread samples over rows, first fit, the longest first.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row.

    Returns:
        indices of the samples of each row, in order.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, free in enumerate(room) if free >= lengths[index]), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    return sorted(sorted(row) for row in rows)


def pack(
    batch: Mapping[str, Tensor],
    max_length: int,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    single_row: bool = False,
) -> dict[str, Tensor]:
    """Lay the rows of a right-padded batch into fewer rows.

    There is no attention mask in the result: `position_ids` start from 0 at every sample, by which transformers and
    the embedded query module know where one ends. Padding at the end of a row is one more sample, without labels.

    Args:
        batch: as the processor makes it, with labels: input_ids, attention_mask, labels (B, T); question_ids (B, T),
            image_positions (B, K), query_positions (B, G), pixel_values (I, V, C, H, W), image_token_counts (I,) where
            there are any.
        max_length: tokens of a row at most; no sample is longer.
        single_row: one row for the whole batch, however long: what flash attention's kernels for packed samples take.
    """
    lengths = batch["attention_mask"].sum(-1).tolist()
    rows = [list(range(len(lengths)))] if single_row else fill_rows(lengths, max_length)
    target = max(sum(lengths[index] for index in row) for row in rows)
    if pad_to_multiple_of:
        target += -target % pad_to_multiple_of
    fills = {"input_ids": pad_token_id, "labels": IGNORED_LABEL, "question_ids": 0}
    fills = {name: fill for name, fill in fills.items() if name in batch}
    packed: dict[str, list[Tensor]] = {name: [] for name in (*fills, "position_ids")}
    positions: dict[str, list[Tensor]] = {name: [] for name in ("image_positions", "query_positions") if name in batch}
    for row in rows:
        pad = target - sum(lengths[index] for index in row)
        parts: dict[str, list[Tensor]] = {name: [] for name in packed}
        places: dict[str, list[Tensor]] = {name: [] for name in positions}
        start = groups = 0
        for index in row:
            length = lengths[index]
            for name in fills:
                parts[name].append(batch[name][index, :length].clone())
            parts["labels"][-1][0] = IGNORED_LABEL  # nothing in the row predicts a sample's first token
            parts["position_ids"].append(torch.arange(length))
            if "question_ids" in parts:
                questions = parts["question_ids"][-1]
                questions[questions > 0] += groups
            for name in positions:
                own = batch[name][index]
                places[name].append(own[own >= 0] + start)
            start += length
            groups += len(places["query_positions"][-1]) if "query_positions" in places else 0
        for name, fill in fills.items():
            packed[name].append(torch.cat([*parts[name], torch.full((pad,), fill)]))
        packed["position_ids"].append(torch.cat([*parts["position_ids"], torch.arange(pad)]))
        for name in positions:
            positions[name].append(torch.cat(places[name]))
    result = {name: torch.stack(values) for name, values in packed.items()}
    for name, values in positions.items():
        result[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=ABSENT_POSITION)
    by_image = [name for name in ("pixel_values", "image_token_counts") if name in batch]
    if by_image:
        counts = (batch["image_positions"] >= 0).sum(-1).tolist()
        order = torch.arange(sum(counts)).split(counts)
        packed_order = torch.cat([order[index] for row in rows for index in row])
        result.update({name: batch[name][packed_order] for name in by_image})
    return result


@torch.no_grad()
def check_packing(language_model: nn.Module) -> None:
    """Make sure that packed samples do not see each other in a language model, by trying.

    Args:
        language_model: the base language model (`model.model.language_model`); it runs over a few tokens.

    Raises:
        ValueError: a change in one sample changes the next one.
    """
    embeddings = language_model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    rows_BTD = torch.randn((2, 2 * _PROBE_TOKENS, embeddings.shape[1]), generator=generator)
    rows_BTD = rows_BTD.to(embeddings.device, embeddings.dtype)
    rows_BTD[1, _PROBE_TOKENS:] = rows_BTD[0, _PROBE_TOKENS:]
    position_ids_BT = torch.arange(_PROBE_TOKENS, device=embeddings.device).repeat(2)[None]
    was_training = language_model.training
    language_model.eval()
    # one row at a time: how a row is grouped with others must not matter
    first, second = (
        language_model(inputs_embeds=row_TD[None], position_ids=position_ids_BT, use_cache=False).last_hidden_state
        for row_TD in rows_BTD
    )
    language_model.train(was_training)
    if not torch.equal(first[:, _PROBE_TOKENS:], second[:, _PROBE_TOKENS:]):
        raise ValueError(
            f"packing: {type(language_model).__name__} lets packed samples see each other; set packing to false"
        )

"""Where placeholders stand in a row. Shape suffixes: B rows, T tokens, K runs (images) and G query groups at most."""

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices


def placeholder_positions(input_ids_BT: Tensor, token_id: int, run_length: int) -> Tensor | None:
    """First index of each run of `run_length` placeholder tokens.

    Args:
        input_ids_BT: int64 token ids.
        token_id: id of the placeholder.
        run_length: tokens that make one image, or one query group.

    Returns:
        positions_BK int64, in reading order, -1 where a row has fewer; None when there is no placeholder at all.

    Raises:
        ValueError: a row whose number of placeholders is not a multiple of `run_length`.
    """
    is_placeholder_BT = input_ids_BT == token_id
    counts_B = is_placeholder_BT.sum(dim=1)
    broken = counts_B % run_length != 0
    if broken.any():
        row = int(broken.nonzero()[0, 0])
        raise ValueError(
            f"row {row} has {int(counts_B[row])} placeholder tokens with id {token_id}, not a multiple of "
            f"{run_length}; the prompt was truncated or not expanded by the processor saved beside the model."
        )
    most = int(counts_B.max()) // run_length if counts_B.numel() else 0
    if most == 0:
        return None
    order_BT = is_placeholder_BT.cumsum(dim=1) - 1
    is_first_BT = is_placeholder_BT & (order_BT % run_length == 0)
    positions_BK = torch.full((input_ids_BT.shape[0], most), -1, dtype=torch.long, device=input_ids_BT.device)
    rows, columns = is_first_BT.nonzero(as_tuple=True)
    positions_BK[rows, order_BT[rows, columns] // run_length] = columns
    return positions_BK


def in_same_sample(position_ids_BT: Tensor, query_positions_BG: Tensor, image_positions_BK: Tensor) -> Tensor:
    """Whether query groups and images belong to the same sample of a packed row.

    Samples are told apart by the rule of transformers' causal masks: positions that do not go on by one begin another.

    Returns:
        (B, G, K) bool; anything where a group or an image is absent.
    """
    samples_BT = find_packed_sequence_indices(position_ids_BT.expand(query_positions_BG.shape[0], -1))
    if samples_BT is None:  # every row is one sample
        shape = (*query_positions_BG.shape, image_positions_BK.shape[1])
        return torch.ones(shape, dtype=torch.bool, device=query_positions_BG.device)
    groups_BG = samples_BT.gather(1, query_positions_BG.clamp(min=0))
    images_BK = samples_BT.gather(1, image_positions_BK.clamp(min=0))
    return groups_BG[:, :, None] == images_BK[:, None, :]

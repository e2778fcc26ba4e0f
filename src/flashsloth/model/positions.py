"""Where placeholders stand in a row, and putting embeddings there.

Shape suffixes: B rows, T tokens of this call, D width of the language model, K runs of a row at most (images, or query
groups), L tokens of a run, G query groups of a row at most.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.masking_utils import find_packed_sequence_indices

from .configuration_flashsloth import FlashSlothConfig


def is_placeholder(
    token_id: int, input_ids_BT: Tensor | None, inputs_embeds_BTD: Tensor | None, embeddings: nn.Module
) -> Tensor:
    """Where a token stands, (B, T) bool; without ids, wherever an embedding equals the token's."""
    if input_ids_BT is not None:
        return input_ids_BT == token_id
    assert inputs_embeds_BTD is not None, "the caller has checked it"
    with torch.no_grad():
        embedding_D = embeddings(torch.tensor([token_id], device=inputs_embeds_BTD.device))[0]
        return (inputs_embeds_BTD == embedding_D.to(inputs_embeds_BTD)).all(dim=-1)


def placeholder_positions(is_placeholder_BT: Tensor, token_id: int, run_length: int | Tensor) -> Tensor | None:
    """First index of each run of `run_length` placeholder tokens.

    Args:
        is_placeholder_BT: bool, where the placeholder stands.
        token_id: id of the placeholder, for messages.
        run_length: tokens that make one image, or one query group; (R,) where they differ, in reading order.

    Returns:
        positions_BK int64, in reading order, -1 where a row has fewer; None when there is no placeholder at all.

    Raises:
        ValueError: a row whose placeholders do not form whole runs.
    """
    if isinstance(run_length, Tensor):
        return _positions_of_runs(is_placeholder_BT, token_id, run_length)
    counts_B = is_placeholder_BT.sum(dim=1)
    order_BT = is_placeholder_BT.cumsum(dim=1) - 1
    is_first_BT = is_placeholder_BT & (order_BT % run_length == 0)
    # the last token of a whole run is as far from its first in the row as it is among the placeholders
    last_BT = functional.pad(order_BT, (0, run_length - 1), value=-1)[:, run_length - 1 :]
    torn_BT = is_first_BT & (last_BT != order_BT + run_length - 1)
    broken = (counts_B % run_length != 0) | torn_BT.any(dim=1)
    if broken.any():
        row = int(broken.nonzero()[0, 0])
        whole = "" if counts_B[row] % run_length else " that stand together"
        raise ValueError(
            f"row {row} has {int(counts_B[row])} placeholder tokens with id {token_id}, not a multiple of "
            f"{run_length}{whole}; the prompt was truncated or not expanded by the processor saved beside the model."
        )
    most = int(counts_B.max()) // run_length if counts_B.numel() else 0
    if most == 0:
        return None
    shape = (is_placeholder_BT.shape[0], most)
    positions_BK = torch.full(shape, -1, dtype=torch.long, device=is_placeholder_BT.device)
    rows, columns = is_first_BT.nonzero(as_tuple=True)
    positions_BK[rows, order_BT[rows, columns] // run_length] = columns
    return positions_BK


def _positions_of_runs(is_placeholder_BT: Tensor, token_id: int, lengths_R: Tensor) -> Tensor | None:
    rows, columns = is_placeholder_BT.nonzero(as_tuple=True)
    lengths_R = lengths_R.to(rows.device)
    last_R = lengths_R.cumsum(0) - 1
    total = int(lengths_R.sum())
    is_whole = total == len(rows)
    if is_whole and total:
        first_R = last_R - lengths_R + 1
        together_R = columns[last_R] - columns[first_R] == lengths_R - 1
        is_whole = bool(((rows[first_R] == rows[last_R]) & together_R).all())
    if not is_whole:
        raise ValueError(
            f"the prompt has {len(rows)} placeholder tokens with id {token_id}, but its images are "
            f"{lengths_R.tolist()!s:.80} tokens that stand together; prepare text and images in one call of the "
            "processor saved beside the model, and do not truncate its output."
        )
    if not total:
        return None
    starts, images_B = rows[first_R], torch.bincount(rows[first_R], minlength=is_placeholder_BT.shape[0])
    positions_BK = torch.full((len(images_B), int(images_B.max())), -1, dtype=torch.long, device=rows.device)
    order_R = torch.arange(len(starts), device=rows.device) - (images_B.cumsum(0) - images_B)[starts]
    positions_BK[starts, order_R] = columns[first_R]
    return positions_BK


def in_rows(values_I: Tensor, positions_BK: Tensor) -> Tensor:
    """Values of the images of the batch as (B, K); those of absent images mean nothing."""
    index_BK = (positions_BK >= 0).flatten().cumsum(0).sub(1).clamp(min=0).view_as(positions_BK)
    return values_I[index_BK.to(values_I.device)].to(positions_BK.device)


def _lengths_of_call(counts_I: Tensor, given_BK: Tensor | None, at_BT: Tensor) -> Tensor:
    """Tokens of each image that stands in this call: the last ones of each row, as many as its placeholders make."""
    if given_BK is None:
        return counts_I
    counts_BK = torch.where(given_BK >= 0, in_rows(counts_I, given_BK), 0)
    to_the_end_BK = counts_BK.flip(1).cumsum(1).flip(1)
    return counts_BK[(given_BK >= 0) & (to_the_end_BK <= at_BT.sum(1, keepdim=True).to(given_BK.device))]


def locate(found_BK: Tensor | None, given_BK: Tensor | None, past_length: int | Tensor) -> Tensor | None:
    """Positions in the whole row of runs of which some stand in this call and the others in the cache.

    Padding and virtual tokens that were put before a row after the processor has run move its runs: what this call
    shows decides, and the positions that were given tell only how many runs are past.

    Args:
        found_BK: first indices in this call, -1 where a row has fewer.
        given_BK: first indices in the whole row, past runs included.
        past_length: tokens in the cache.
    """
    if found_BK is None:
        return given_BK
    present_BK = torch.where(found_BK >= 0, found_BK + past_length, found_BK)
    if given_BK is None:
        return present_BK
    given_BK = given_BK.to(found_BK.device)
    known_B1 = (given_BK >= 0).sum(dim=1, keepdim=True)
    past_B1 = known_B1 - (found_BK >= 0).sum(dim=1, keepdim=True)
    if (past_B1 < 0).any():
        return present_BK  # more than were named: the caller compares numbers
    order_BK = torch.arange(given_BK.shape[1], device=given_BK.device) - past_B1
    moved_BK = present_BK.gather(1, order_BK.clamp(min=0, max=present_BK.shape[1] - 1))
    return torch.where((order_BK >= 0) & (given_BK >= 0), moved_BK, given_BK)


def complete_positions(
    config: FlashSlothConfig,
    embeddings: nn.Module,
    images: int,
    token_counts_I: Tensor | None,
    image_positions_BK: Tensor | None,
    query_positions_BG: Tensor | None,
    past_length: int | Tensor,
    input_ids_BT: Tensor | None,
    inputs_embeds_BTD: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Find the placeholders of a prompt in its ids or embeddings, and check counts.

    Positions that were given are used for what the prompt alone does not tell: a beginning that is in the cache,
    embeddings that hold something else. Otherwise the prompt decides, since padding and virtual tokens that were
    added after the processor has run move placeholders.

    Args:
        images: how many come with the prompt.
        token_counts_I: visual tokens of each; None where all have the configuration's number.

    Returns:
        positions of images and of query groups in the whole row.

    Raises:
        ValueError: numbers of images and placeholders that differ.
    """
    is_whole = input_ids_BT is not None and isinstance(past_length, int) and past_length == 0

    def find(token_id: int, run_length: int | Tensor, given_BK: Tensor | None) -> tuple[Tensor | None, Tensor]:
        at_BT = is_placeholder(token_id, input_ids_BT, inputs_embeds_BTD, embeddings)
        if isinstance(run_length, Tensor):
            run_length = _lengths_of_call(run_length, None if is_whole else given_BK, at_BT)
        found_BK = placeholder_positions(at_BT, token_id, run_length)
        return (found_BK if is_whole else locate(found_BK, given_BK, past_length)), at_BT.sum()

    if config.num_query_tokens and config.query_token_id is not None:
        query_positions_BG, _ = find(config.query_token_id, config.num_query_tokens, query_positions_BG)
    if config.image_token_id is None:
        if images and (input_ids_BT is not None or image_positions_BK is None):  # embeddings may come with places
            raise ValueError("images were given but the configuration has no image_token_id.")
        return image_positions_BK, query_positions_BG
    num_tokens = config.num_image_tokens if token_counts_I is None else token_counts_I
    image_positions_BK, found = find(config.image_token_id, num_tokens, image_positions_BK)
    if image_positions_BK is None:
        if images:
            raise ValueError(f"{images} images were given but the prompt has no image placeholder.")
    elif input_ids_BT is not None or found:
        placed = (image_positions_BK >= 0).sum()
        is_here_BK = image_positions_BK >= past_length
        if placed != images:
            expected = None
        elif isinstance(num_tokens, Tensor):
            expected = in_rows(num_tokens, image_positions_BK)[is_here_BK].sum()
        else:
            expected = is_here_BK.sum() * num_tokens
        if expected is None or found != expected:
            make = num_tokens.tolist() if isinstance(num_tokens, Tensor) else num_tokens
            raise ValueError(
                f"the prompt has {int(found)} image placeholder tokens ({make!s:.80} make one image) and names "
                f"{int(placed)} image positions, but {images} images were given; prepare text and images in one "
                "call of the processor saved beside the model, and do not truncate its output."
            )
    return image_positions_BK, query_positions_BG


def check_uncut(positions_BK: Tensor, run_length: int, position_ids_BT: Tensor) -> None:
    """Refuse runs that are made of the end of one request and the beginning of another.

    Args:
        positions_BK: first indices of runs, -1 where there is none.
        position_ids_BT: (1, T) where continuous batching lays pieces of requests one behind the other.

    Raises:
        ValueError: such a run.
    """
    first_BK = positions_BK.clamp(min=0)
    length_BK = position_ids_BT.gather(1, first_BK + run_length - 1) - position_ids_BT.gather(1, first_BK)
    if ((positions_BK >= 0) & (length_BK != run_length - 1)).any():
        raise ValueError(
            f"continuous batching has cut a prompt inside {run_length} placeholder tokens that belong together; let "
            "max_batch_tokens be at least the length of all prompts together, or use generate."
        )


def place(
    embeds_BTD: Tensor,
    values_BKLD: Tensor,
    positions_BK: Tensor,
    past_length: int | Tensor,
    lengths_BK: Tensor | None = None,
) -> Tensor:
    """Write runs of L embeddings at the positions that lie in this part of the sequence, as a new tensor.

    Args:
        lengths_BK: embeddings of each run that are written, where they are not all.
    """
    rows, tokens, width = embeds_BTD.shape
    length = values_BKLD.shape[2]
    first_BK1 = torch.where(positions_BK >= past_length, positions_BK - past_length, tokens).unsqueeze(-1)
    index_BKL = first_BK1 + torch.arange(length, device=positions_BK.device)
    if lengths_BK is not None:
        in_run_L = torch.arange(length, device=positions_BK.device)
        index_BKL = torch.where(in_run_L < lengths_BK.unsqueeze(-1), index_BKL, tokens)
    index_BL1 = index_BKL.clamp(max=tokens).reshape(rows, -1, 1).to(embeds_BTD.device)
    # one spare position at the end takes what is absent or past
    spare_BTD = torch.cat([embeds_BTD, embeds_BTD.new_zeros(rows, 1, width)], dim=1)
    values_BLD = values_BKLD.reshape(rows, -1, width).to(embeds_BTD.device, embeds_BTD.dtype)
    return spare_BTD.scatter(1, index_BL1.expand(-1, -1, width), values_BLD)[:, :tokens]


def is_mask_of_row(attention_mask: Tensor | dict | None, past_length: int | Tensor, tokens: int) -> bool:
    """Whether a mask tells of every token of the row so far and of no other."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or not isinstance(past_length, int):
        return False
    return attention_mask.shape[1] == past_length + tokens


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

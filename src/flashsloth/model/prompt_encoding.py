"""From the pieces of prompts to token tensors: ids, question spans, labels, positions; truncation and padding.

Shape suffixes: B rows, T tokens, K images of a row, G query groups of a row.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .chat_text import Kind, Piece

IGNORED_LABEL = -100
ABSENT_POSITION = -1
# Per token, with the value that fills padding; `None` stands for the tokenizer's padding token.
TOKEN_FILLS: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "question_ids": 0,
    "labels": IGNORED_LABEL,
    "assistant_masks": 0,
    "mm_token_type_ids": 0,
}
# Tokenizers without a limit of their own say something like 1e30.
NO_LIMIT = int(1e9)
# Put before a text, and taken away again with its tokens: what follows is then not the beginning of a text.
GUARDS = ("\n", "|")
POSITION_NAMES = ("image_positions", "query_positions")
Features = dict[str, np.ndarray]


@dataclass(frozen=True)
class Expansion:
    """What placeholders become.

    `token_ids` are the ids of special tokens by text; `num_image_tokens` is for images without a number of their own.
    """

    image_token_id: int
    num_image_tokens: int
    query_token_id: int | None
    num_query_tokens: int
    token_ids: Mapping[str, int]
    prefix_ids: Sequence[int] = ()


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    questions: list[tuple[int, int, int]] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)


def tokenize_pieces(rows: Sequence[Sequence[Piece]], tokenizer: Any, opens_texts: bool) -> None:
    """Sets `ids` and `ends` of all text pieces, with one call of the tokenizer for all their different texts.

    Args:
        opens_texts: the tokenizer puts a token of its own before a text, but not before text that follows a special
            token; then only a row's first piece may have it.
    """
    pieces: dict[str, list[Piece]] = {}
    inner: dict[str, list[Piece]] = {}
    for row in rows:
        for index, piece in enumerate(row):
            if piece.kind is Kind.TEXT and piece.text:
                (inner if opens_texts and index else pieces).setdefault(piece.text, []).append(piece)
    for guard in GUARDS:
        if inner:
            texts = [guard, *(guard + text for text in inner)]
            encoded_guard, *encodings = _tokenize(texts, tokenizer)
            skip = len(encoded_guard.ids)
            for text, encoding in zip(list(inner), encodings, strict=True):
                if encoding.ids[:skip] == encoded_guard.ids:
                    ends = [stop - len(guard) for _, stop in encoding.offsets[skip:]]
                    _assign(inner.pop(text), encoding.ids[skip:], ends)
    for text, same in inner.items():  # no guard stays apart from these
        pieces.setdefault(text, []).extend(same)
    if pieces:
        for same, encoding in zip(pieces.values(), _tokenize(list(pieces), tokenizer), strict=True):
            needs_ends = same[0].text.startswith("\n") or any(piece.marks for piece in same)
            _assign(same, encoding.ids, [stop for _, stop in encoding.offsets] if needs_ends else ())


def _assign(pieces: list[Piece], ids: Sequence[int], ends: Sequence[int]) -> None:
    for piece in pieces:
        piece.ids, piece.ends = ids, ends


def _tokenize(texts: list[str], tokenizer: Any) -> list[Any]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded.encodings


def encode_pieces(
    pieces: Sequence[Piece], expansion: Expansion, image_tokens: Sequence[int] | None = None
) -> Features:
    """One row, unpadded.

    Args:
        pieces: the prompt; texts tokenised, answers and questions marked.
        image_tokens: visual tokens of each image of the row.

    Returns:
        input_ids, attention_mask, question_ids, labels (T,), image_positions, image_token_counts (K,), query_positions
        (G,); int64.

    Raises:
        ValueError: an empty question.
    """
    row = _Row()
    if not _begins_with_prefix(pieces, expansion):
        row.ids += expansion.prefix_ids
    asking = answering = asked = False
    pending: list[tuple[int, int]] = []
    previous: Kind | None = None
    for piece in pieces:
        start = len(row.ids)
        if piece.kind is Kind.TEXT:
            row.ids += piece.ids
            # A newline after an image inside a question ends the placeholder's line and is not asked.
            is_line_end = asking and previous is Kind.IMAGE and piece.text.startswith("\n")
            first = _token_at(piece, 1, inclusive=False) if is_line_end else 0
            at, text_at = 0, 0
            for offset, kind in (*piece.marks, (len(piece.text), None)):
                stop = _token_at(piece, offset, inclusive=kind is Kind.ANSWER_END)
                if asking and max(at, first) < stop:
                    pending.append((start + max(at, first), start + stop))
                    asked = asked or bool(piece.text[text_at:offset].strip())
                if answering and at < stop:
                    row.answers.append((start + at, start + stop))
                asking = asking or kind is Kind.QUESTION
                answering = kind is Kind.ANSWER_START or (answering and kind is not Kind.ANSWER_END)
                at, text_at = stop, offset
        elif piece.kind is Kind.IMAGE:
            tokens = expansion.num_image_tokens if image_tokens is None else image_tokens[len(row.images)]
            row.images.append(start)
            row.image_tokens.append(tokens)
            row.ids += [expansion.image_token_id] * tokens
        elif piece.kind is Kind.QUERY:
            if expansion.num_query_tokens:
                row.queries.append(start)
                group = len(row.queries)
                if not asked:
                    raise ValueError(f"question {group} is empty; write what is asked")
                row.questions += [(begin, stop, group) for begin, stop in pending]
                assert expansion.query_token_id is not None, "the processor has checked it"
                row.ids += [expansion.query_token_id] * expansion.num_query_tokens
            asking = asked = False
            pending = []
        else:
            row.ids.append(expansion.token_ids[piece.text])
            if answering:
                row.answers.append((start, start + 1))
        previous = piece.kind
    return _to_features(row)


def _begins_with_prefix(pieces: Sequence[Piece], expansion: Expansion) -> bool:
    if not expansion.prefix_ids or not pieces or pieces[0].kind is not Kind.TOKEN:
        return False
    return expansion.token_ids[pieces[0].text] == expansion.prefix_ids[0]


def _token_at(piece: Piece, offset: int, inclusive: bool) -> int:
    """Index of the first token that reaches beyond a character offset (`inclusive`: that begins at or after it)."""
    if offset == 0:
        return 0
    if offset == len(piece.text):
        return len(piece.ids)
    if inclusive:
        return min(bisect_left(piece.ends, offset) + 1, len(piece.ids))
    return bisect_right(piece.ends, offset)


def _to_features(row: _Row) -> Features:
    input_ids = np.array(row.ids, dtype=np.int64)
    question_ids = np.zeros_like(input_ids)
    for start, stop, group in row.questions:
        question_ids[start:stop] = group
    labels = np.full_like(input_ids, IGNORED_LABEL)
    for start, stop in row.answers:
        labels[start:stop] = input_ids[start:stop]
    return {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "question_ids": question_ids,
        "labels": labels,
        "image_positions": np.array(row.images, dtype=np.int64),
        "image_token_counts": np.array(row.image_tokens, dtype=np.int64),
        "query_positions": np.array(row.queries, dtype=np.int64),
    }


def fit_to_length(
    features: Features, limit: int, truncation: bool, side: str, expansion: Expansion, limit_name: str
) -> Features:
    """Truncates a row where that loses only text that nothing depends on.

    Raises:
        ValueError: too long without truncation, or the cut would fall on images, queries or questions.
    """
    length = len(features["input_ids"])
    if length <= limit:
        return features
    question = int((features["question_ids"] > 0).sum())
    counts = features["image_token_counts"]
    sizes = (
        f"{length} tokens ({len(counts)} images of {', '.join(map(str, np.unique(counts)[::-1])) or 'none'}, "
        f"{question} of questions, {len(features['query_positions'])} query groups of {expansion.num_query_tokens})"
    )
    if not truncation:
        raise ValueError(f"the prompt has {sizes}, more than {limit_name} {limit}; shorten it or raise max_length")
    kept = slice(0, limit) if side == "right" else slice(length - limit, length)
    needed = features["question_ids"] > 0
    for name, runs in (
        ("image_positions", counts),
        ("query_positions", [expansion.num_query_tokens] * len(features["query_positions"])),
    ):
        for position, run in zip(features[name], runs, strict=True):
            needed[position : position + run] = True
    if needed.sum() != needed[kept].sum():
        raise ValueError(
            f"the prompt has {sizes}; truncating it to {limit_name} {limit} would cut into an image, a question or "
            "its query tokens; shorten the text or raise max_length"
        )
    return {
        name: value[kept] if name in TOKEN_FILLS else value - kept.start if name in POSITION_NAMES else value
        for name, value in features.items()
    }


def pad_features(
    features: Sequence[Mapping[str, Any]],
    pad_token_id: int | None,
    length: int | None,
    multiple_of: int | None,
    side: str,
) -> Features:
    """Stacks rows of different lengths.

    Args:
        features: rows as `encode_pieces` makes them; each key in all rows or in none.
        length: target number of tokens, `None` for the longest row's.

    Returns:
        (B, T) arrays; positions (B, K) and (B, G), shifted by the padding; image_token_counts (I,). What no row has is
        left out.
    """
    lengths = np.array([len(row["input_ids"]) for row in features])
    target = max(int(lengths.max()), length or 0)
    if multiple_of:
        target += -target % multiple_of
    if pad_token_id is None and (lengths < target).any():
        raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token, for instance to its eos_token")
    shifts = target - lengths if side == "left" else np.zeros_like(lengths)
    batch: Features = {}
    for name, fill in TOKEN_FILLS.items():
        if name not in features[0]:
            continue
        filler = (pad_token_id or 0) if fill is None else fill
        values_BT = np.full((len(features), target), filler, dtype=np.int64)
        for values_T, row, shift, count in zip(values_BT, features, shifts, lengths, strict=True):
            values_T[shift : shift + count] = row[name]
        batch[name] = values_BT
    for name in POSITION_NAMES:
        rows = [np.asarray(row.get(name, ()), dtype=np.int64) for row in features]
        most = max(len(positions) for positions in rows)
        if not most:
            continue
        positions_BK = np.full((len(rows), most), ABSENT_POSITION, dtype=np.int64)
        for target_K, positions, shift in zip(positions_BK, rows, shifts, strict=True):
            target_K[: len(positions)] = positions + shift
        batch[name] = positions_BK
    if "query_positions" not in batch:
        batch.pop("question_ids", None)
    counts = [row["image_token_counts"] for row in features if "image_token_counts" in row]
    if any(map(len, counts)):
        batch["image_token_counts"] = np.concatenate(counts)
    return batch


@contextmanager
def naming_row(row: int, rows: int) -> Iterator[None]:
    """Errors of one row of several say which it is."""
    try:
        yield
    except ValueError as error:
        if rows == 1:
            raise
        raise ValueError(f"row {row}: {error}") from error

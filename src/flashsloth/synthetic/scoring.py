"""Exact match after normalisation."""


def answer_normalised(text: str) -> str:
    """Lower case, single spaces, no surrounding blanks and no trailing full stop."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both texts are the same after `answer_normalised`."""
    return answer_normalised(prediction) == answer_normalised(answer)

"""Text of answers, sent piece by piece."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashsloth.serve.answers import AnswerText, TokenTexts
from flashsloth.serve.requests import Piece


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte of UTF-8, after two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1} | {character: index for index, character in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "stopped"),
    [
        ("  ab c \n", [], ["a", "b", " c"], False),
        ("é€🦥!", [], ["é", "€", "🦥", "!"], False),
        ("abcabd.", ["abd"], ["a", "b", "c"], True),  # a beginning that comes to nothing is sent after all
        ("aaab", ["aab"], ["a"], True),
        ("ab", ["abc"], ["ab"], False),
        ("a 🦥b", ["🦥", "b"], ["a"], True),
        ("x END y", ["END"], ["x"], True),
        ("END", ["E"], [], True),
        ("one\n\ntwo", ["\n\n"], ["o", "n", "e"], True),
    ],
)
def test_text_is_sent_when_it_can_no_longer_change(text, stop, pieces, stopped):
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    answer, sent = AnswerText(texts, stop), []
    for token in tokenizer(text)["input_ids"]:
        sent.append(answer.add(token))
        if answer.stopped:
            break
    sent.append(answer.finish())
    found = [piece.text for piece in sent if piece is not None]
    assert "".join(found) == "".join(pieces)
    assert found == pieces or stop
    assert answer.stopped == stopped


def test_the_bytes_of_a_part_of_a_character_are_its_own():
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    sloth = [texts.token(token)[1] for token in tokenizer(" 🦥")["input_ids"]]
    assert sloth == [(byte,) for byte in " 🦥".encode()]
    half = AnswerText(texts, [])
    for token in tokenizer("a🦥")["input_ids"][:3]:
        half.add(token, "logprob")
    assert half.finish() == Piece("\ufffd", ["logprob"] * 2)

"""The bytes that each token of a vocabulary stands for, as a grammar library needs them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cache
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_UNREADABLE = "\ufffd"


class TokenBytes:
    """A fast tokenizer of transformers as bytes; what `llguidance.TokenizerWrapper` asks for.

    Texts are tokenized without the tokenizer's normalizer: a grammar asks for the bytes that it names, and lower case
    in their place would contradict it.

    Args:
        tokenizer: fast; byte-level, with byte fallback, or anything whose tokens decode to text.
        excluded: ids that spell no text, such as special tokens.
        end_of_sequence: id that ends an answer.

    Attributes:
        tokens: bytes of each id; empty for one that spells no text.
    """

    bos_token_id = None
    special_token_ids: list[int] = []

    def __init__(self, tokenizer: Any, excluded: Collection[int], end_of_sequence: int) -> None:
        self.eos_token_id = end_of_sequence
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        self._plain = Tokenizer.from_str(
            json.dumps(spec | dict.fromkeys(("normalizer", "truncation", "padding", "post_processor")))
        )
        vocabulary = tokenizer.get_vocab()
        self.tokens = [b""] * (max(vocabulary.values()) + 1)
        spell = _spell_byte_level if _decoder_parts(spec["decoder"]) & {"ByteLevel"} else _speller(self._plain)
        for token, index in vocabulary.items():
            if index not in excluded:
                self.tokens[index] = spell(token, index)
        self._ids = {spelled: index for index, spelled in enumerate(self.tokens) if spelled}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens that spell a text: as the tokenizer cuts it, else the longest ones; up to where none goes on."""
        with_replacements = text.decode("utf-8", "replace")
        ids = self._plain.encode(with_replacements, add_special_tokens=False).ids
        if b"".join(self.tokens[index] for index in ids) == text:
            return ids
        ids, start = [], 0
        while start < len(text):
            lengths = range(min(self._longest, len(text) - start), 0, -1)
            length = next((n for n in lengths if text[start : start + n] in self._ids), None)
            if length is None:
                break
            ids.append(self._ids[text[start : start + length]])
            start += length
        return ids


def _decoder_parts(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_decoder_parts, decoder.get("decoders", ())))


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: printable ones for themselves, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _spell_byte_level(token: str, index: int) -> bytes:
    characters = _bytes_of_characters()
    if all(character in characters for character in token):
        return bytes(characters[character] for character in token)
    return token.encode("utf-8", "replace")  # an added token stands in the vocabulary as it is written


def _speller(plain: Tokenizer) -> Any:
    """Bytes of tokens of any other tokenizer: what each adds to a text when it is decoded behind another token."""
    size = plain.get_vocab_size(with_added_tokens=True)
    texts = ((index, plain.decode([index], skip_special_tokens=False)) for index in range(size))
    first, before = next(((index, text) for index, text in texts if text.isalnum()), (None, ""))

    def spell(token: str, index: int) -> bytes:
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        if first is None:
            return b""
        text = plain.decode([first, index], skip_special_tokens=False)
        if not text.startswith(before) or _UNREADABLE in text:
            return b""
        return text[len(before) :].encode()

    return spell

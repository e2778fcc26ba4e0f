"""The bytes that each token of a vocabulary stands for, as a grammar library needs them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_UNREADABLE = "\ufffd"


class TokenBytes:
    """A fast tokenizer of transformers as bytes; what `llguidance.TokenizerWrapper` asks for.

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
        backend, vocabulary = tokenizer.backend_tokenizer, tokenizer.get_vocab()
        is_byte_level = "ByteLevel" in _parts(json.loads(backend.to_str())["decoder"])
        spell = _spell_byte_level if is_byte_level else _by_decoding(backend)
        self.tokens = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            if index not in excluded:
                self.tokens[index] = spell(token, index)

    def __call__(self, text: bytes) -> list[int]:
        raise AssertionError("a grammar with no_forcing tokenizes nothing")


def _parts(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_parts, decoder.get("decoders", ())))


@cache
def _byte_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: printable ones for themselves, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _spell_byte_level(token: str, index: int) -> bytes:
    characters = _byte_characters()
    if all(character in characters for character in token):
        return bytes(characters[character] for character in token)
    return token.encode("utf-8", "replace")  # an added token stands in the vocabulary as it is written


def _by_decoding(backend: Tokenizer) -> Callable[[str, int], bytes]:
    """Bytes of tokens of any other tokenizer: what each adds to a text when it is decoded behind another token."""
    size = backend.get_vocab_size(with_added_tokens=True)
    texts = ((index, backend.decode([index], skip_special_tokens=False)) for index in range(size))
    first, before = next((index, text) for index, text in texts if text.isalnum())

    def spell(token: str, index: int) -> bytes:
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        text = backend.decode([first, index], skip_special_tokens=False)
        if not text.startswith(before) or _UNREADABLE in text:
            return b""
        return text[len(before) :].encode()

    return spell

"""From logits to tokens, and from tokens to text that can be sent: every row by itself.

Shape suffixes: B rows, T tokens, V vocabulary; 1 a single row.
"""

import copy
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..inference.session import FlashSloth
from .requests import Piece, Sampling, TokenLogprob

_UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Choice:
    """How the tokens of one answer are chosen: a generator, a grammar, the model's own rules that look at its tokens.

    Args:
        rules: of the model's generation configuration, in their order.
        has_own_rules: some of them look at the tokens of a row.
    """

    def __init__(self, sampling: Sampling, rules: LogitsProcessorList, has_own_rules: bool, device: torch.device):
        self.rules, self.has_own_rules = rules, has_own_rules
        self.notes_probability = sampling.confidence
        self.log_probability = 0.0  # of the tokens chosen so far, where it is noted
        self.grammar = None if sampling.grammar is None else sampling.grammar.start()
        self._warpers = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
            if sampling.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    @property
    def is_plain(self) -> bool:
        """The likeliest token that the rules for every row leave."""
        return not (self._generator or self.grammar or self.has_own_rules or self.notes_probability)

    def choose(self, logits_1V: Tensor, ids: Sequence[int]) -> int:
        """The next token.

        Args:
            logits_1V: float32, of the model. ids: of the row so far.

        Raises:
            ValueError: a grammar that allows no token.
        """
        ids_1T = torch.tensor([ids], device=logits_1V.device)
        scores_1V = self.rules(ids_1T, logits_1V.clone())
        if self.grammar is not None:
            self.grammar.mask_logits(scores_1V)
            if not torch.isfinite(scores_1V).any():
                raise ValueError("the grammar allows none of the tokens that the model may write here")
        token = self._draw(ids_1T, scores_1V)
        if self.notes_probability:
            self.log_probability += float(scores_1V.log_softmax(dim=-1)[0, token])
        return token

    def _draw(self, ids_1T: Tensor, scores_1V: Tensor) -> int:
        if self._generator is None:
            return int(scores_1V.argmax(dim=-1))
        probabilities_1V = self._warpers(ids_1T, scores_1V.clone()).softmax(dim=-1)
        return int(torch.multinomial(probabilities_1V, 1, generator=self._generator))


class Choosing:
    """Chooses tokens as the model's `generate` would, greedy unless a request says otherwise.

    Attributes:
        end_tokens: which end an answer.
    """

    def __init__(self, session: FlashSloth) -> None:
        self.model, self.device = session.model, session.device
        self._config = copy.deepcopy(session.model.generation_config)
        self._config.update(do_sample=False)
        # what `generate` itself makes of its configuration
        self.model._prepare_special_tokens(self._config, kwargs_has_attention_mask=True, device=self.device)
        ends = self._config._eos_token_tensor
        self.end_tokens: frozenset[int] = frozenset([] if ends is None else ends.tolist())
        rules = self._rules(1)
        self._common = LogitsProcessorList(rule for rule in rules if _is_common(rule))
        self._has_own_rules = len(self._common) < len(rules)

    def choice(self, sampling: Sampling, prompt_tokens: int) -> Choice:
        """How the tokens of one answer are chosen."""
        rules = self._rules(prompt_tokens) if self._has_own_rules else self._common
        return Choice(sampling, rules, self._has_own_rules, self.device)

    def likeliest(self, logits_BV: Tensor) -> list[int]:
        """The token of every row that is plain."""
        return self._common(None, logits_BV).argmax(dim=-1).tolist()

    def _rules(self, prompt_tokens: int) -> LogitsProcessorList:
        return self.model._get_logits_processor(
            self._config, input_ids_seq_length=prompt_tokens, device=self.device, model_kwargs={}
        )


def _is_common(rule: Any) -> bool:
    """Whether a rule does the same with every row, whatever its tokens."""
    return isinstance(rule, SuppressTokensLogitsProcessor)


class TokenTexts:
    """Tokens as text, alone and in answers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # the tokenizer's own decoding, without the work of its wrapper, where that changes nothing
        plain = not getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._decode = tokenizer.backend_tokenizer.decode if plain else tokenizer.decode
        self._probe = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._probe_text = self.decode(self._probe)
        self._bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
        self.token = lru_cache(maxsize=None)(self._token)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._decode(ids, skip_special_tokens=skip_special_tokens)

    def _token(self, token: int) -> tuple[str, tuple[int, ...]]:
        """Text and bytes of a token inside an answer; a part of a character has bytes of its own."""
        text = self.decode([*self._probe, token], skip_special_tokens=False)[len(self._probe_text) :]
        if _UNFINISHED in text:
            name = str(self.tokenizer.convert_ids_to_tokens(token))
            if match := _BYTE_TOKEN.fullmatch(name):
                return text, (int(match[1], 16),)
            if all(character in self._bytes_of for character in name):
                return text, tuple(self._bytes_of[character] for character in name)
        return text, tuple(text.encode())

    def logprobs(self, logits_V: Tensor, chosen: int, top: int) -> tuple[TokenLogprob, list[TokenLogprob]]:
        """Log-probabilities of the chosen token and of the likeliest ones.

        Args:
            logits_V: float32, of the model.
        """
        logprobs_V = logits_V.log_softmax(dim=-1)
        values, tokens = logprobs_V.topk(min(top, len(logprobs_V)))
        pairs = [(chosen, float(logprobs_V[chosen])), *zip(tokens.tolist(), values.tolist(), strict=True)]
        first, *others = [TokenLogprob(self.token(token)[0], value, self.token(token)[1]) for token, value in pairs]
        return first, others


class AnswerText:
    """The text of an answer as far as it is certain: without its last characters where these may begin a stop text.

    White space around an answer is left out, as templates put their own there.

    Args:
        texts: of the model's tokens. stop: texts that end the answer.

    Attributes:
        stopped: one of them was met.
    """

    def __init__(self, texts: TokenTexts, stop: Sequence[str]) -> None:
        self.texts, self.stop, self.stopped = texts, tuple(stop), False
        self._ids: list[int] = []
        # what is decoded again with the next token: text depends on the tokens around it
        self._from, self._until = 0, 0
        self._text = ""
        self._sent = 0
        self._logprobs: list[tuple[int, Any]] = []

    def add(self, token: int, logprob: Any = None) -> Piece | None:
        """What is certain with one more token, if that is more than before."""
        if logprob is not None:
            self._logprobs.append((len(self._text), logprob))
        self._ids.append(token)
        self._decode(final=False)
        return self._release(final=False)

    def finish(self) -> Piece | None:
        """What is left at the end of the answer."""
        if not self.stopped:
            self._decode(final=True)
        return self._release(final=True)

    def _decode(self, final: bool) -> None:
        text = self.texts.decode(self._ids[self._from :])
        if text.endswith(_UNFINISHED) and not final:
            return
        before = self.texts.decode(self._ids[self._from : self._until])
        if len(text) > len(before):
            self._text += text[len(before) :]
            self._from, self._until = self._until, len(self._ids)

    def _release(self, final: bool) -> Piece | None:
        longest = max(map(len, self.stop), default=0)
        found = [self._text.find(stop, self._sent) for stop in self.stop] if longest else []
        if places := [place for place in found if place >= 0]:
            self._text, self.stopped, final = self._text[: min(places)], True, True
        end = len(self._text)
        if not final:
            held = (self._text[-length:] for length in range(min(longest, end), 0, -1))
            end -= next((len(text) for text in held if any(stop.startswith(text) for stop in self.stop)), 0)
        text = self._text[self._sent : end].rstrip()
        begun = bool(self._text[: self._sent].strip())
        self._sent += len(text)
        text = text if begun else text.lstrip()
        # what was cut off with a stop text has no place in the answer
        ready = [pair for pair in self._logprobs if pair[0] < self._sent or (final and not self.stopped)]
        self._logprobs = self._logprobs[len(ready) :]  # in the order of their places
        return Piece(text, [logprob for _, logprob in ready]) if text or ready else None

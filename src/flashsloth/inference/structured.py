"""Answers that have a form: a JSON schema, one of several choices, or a regular expression.

A form is compiled for a processor (`compile_form`), once for all answers. Each answer then has a `GrammarState`, which
says after every token which ones may follow: an engine asks it directly, `generate` of transformers through
`FormProcessor`.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from ..model.image_decoding import shorten
from ..model.processing_flashsloth import FlashSlothProcessor
from .token_bytes import TokenBytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LLGUIDANCE_HINT = "structured answers need the `llguidance` library: pip install 'flashsloth[structured]'"
FORMS_KEPT = 256  # compiled forms of a tokenizer; those used last
LONGEST_MESSAGE = 300  # characters of what the grammar library says
# white space between the parts of JSON as json.dumps writes it; any number of blanks would let an answer never end
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# every token that spells an allowed text may come; else the library would tokenize what has to come by itself, through
# the tokenizer's normalizer, and in lower case it would not be what has to come
GRAMMAR_OPTIONS = '%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True)
class AnswerForm:
    """What an answer must look like, and whether its probability is wanted.

    At most one of the first three is given; without any, answers are free.

    Attributes:
        schema: JSON schema that the answer, a JSON text laid out as `json.dumps` does, must satisfy. Keywords that
            cannot be enforced are refused.
        choices: texts of which the answer is one.
        regex: regular expression of the whole answer, in the syntax of Rust's `regex`: no look-around, no references
            to groups, `\\d` is 0 to 9.
        confidence: note the probability of each answer (`Answer.confidence`).

    Raises:
        ValueError: two forms at once, an empty or unusable one.
    """

    schema: Mapping[str, Any] | None = None
    choices: Sequence[str] | None = None
    regex: str | None = None
    confidence: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("schema", "choices", "regex") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: an answer has one form")
        if self.schema is not None:
            object.__setattr__(self, "schema", _plain_schema(self.schema))
        if self.choices is not None:
            object.__setattr__(self, "choices", _checked_choices(self.choices))
        if self.regex is not None and (not isinstance(self.regex, str) or not self.regex):
            raise ValueError(f"regex must be a regular expression as text, got {self.regex!r:.100}")

    @property
    def is_free(self) -> bool:
        return self.schema is None and self.choices is None and self.regex is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        choices = None if self.choices is None else list(self.choices)
        return {"schema": self.schema, "choices": choices, "regex": self.regex, "confidence": self.confidence}


FREE = AnswerForm()
FORM_FIELDS = {field.name for field in fields(AnswerForm)}


def _plain_schema(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, Mapping):
        raise ValueError(f"a JSON schema is an object such as {{'type': 'object'}}, got {schema!r:.100}")
    try:
        return json.loads(json.dumps(dict(schema), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the schema is no JSON: {shorten(str(error), LONGEST_MESSAGE)}") from error


def _checked_choices(choices: Any) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise ValueError(f"choices must be a list of texts, got {choices!r:.100}")
    if not choices:
        raise ValueError("choices is empty; give at least one")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"choice {index + 1} is {choice!r:.100}; each must be a text that is not empty")
        if choice != choice.strip():
            raise ValueError(
                f"the choice {choice!r:.100} begins or ends with a blank, which no answer keeps; strip it"
            )
        if choice in choices[:index]:
            raise ValueError(f"the choice {choice!r:.100} comes twice")
    return tuple(choices)


class GrammarState:
    """How far one answer is in its form; made by `Grammar.start`."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._ended = False
        self.tokens = 0
        """Tokens accepted, the end of the sequence included."""

    @property
    def complete(self) -> bool:
        """Whether the tokens up to now are an answer of the form, though it may go on."""
        return self._ended or (not self._matcher.is_error() and self._matcher.is_accepting())

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing but the end of the sequence can follow."""
        return self._ended or (self.complete and self._matcher.is_stopped())

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may come next: (V,) bool on the CPU.

        Raises:
            ValueError: none may, since no token of the vocabulary spells what the form asks for.
        """
        size = len(self.grammar.token_bytes)
        allowed_V = np.zeros(max(vocabulary, size), dtype=bool)
        if not self.done:
            mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed_V[:size] = np.unpackbits(mask, bitorder="little")[:size]
        allowed_V[list(self.grammar.end_ids)] = self.complete
        if not allowed_V[:vocabulary].any():
            raise ValueError(
                f"the {self.grammar.kind} cannot be answered: no token of the vocabulary spells what has to follow "
                f"after {self.tokens} tokens"
            )
        return torch.from_numpy(allowed_V[:vocabulary])

    def mask_logits(self, logits_1V: Tensor) -> None:
        """Set to minus infinity, in place, what may not come next; (1, V) or (V,), on any device.

        Raises:
            ValueError: as `allowed`.
        """
        logits_1V.masked_fill_(~self.allowed(logits_1V.shape[-1]).to(logits_1V.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        """Go on by a token.

        Raises:
            ValueError: it may not come here; the state is of no use afterwards.
        """
        if token_id in self.grammar.end_ids:
            accepted = self.complete
            self._ended = accepted
        else:
            accepted = not self._ended and self._matcher.consume_token(token_id)
        if not accepted:
            raise ValueError(f"token {token_id} is not one that may come next in the {self.grammar.kind}")
        self.tokens += 1


@dataclass(frozen=True)
class Grammar:
    """A form compiled for a processor; made by `compile_form`, used by any number of answers at once.

    Attributes:
        kind: what the form is, for messages.
        lead: white space between prompt and answer, as the chat template writes it.
        choices: tokens of each choice, without the end; None for other forms.
        end_ids: tokens that end a sequence.
        token_bytes: bytes of each token.
    """

    kind: str
    lead: str
    choices: tuple[tuple[int, ...], ...] | None
    end_ids: frozenset[int]
    token_bytes: Sequence[bytes]
    _matcher: LLMatcher

    def start(self) -> GrammarState:
        """The state of a new answer."""
        return GrammarState(self, self._matcher.deep_copy())


class FormProcessor(LogitsProcessor):
    """Keeps the rows of one call of transformers' `generate` to a form.

    For greedy search and sampling, in batches of any size. Beams and assistants exchange or take back tokens, which
    is refused when it is noticed. Give each call a new one.

    Args:
        grammar: as `compile_form` makes it.

    Attributes:
        states: of each row, once generation has begun.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.states: list[GrammarState] = []
        self._width = 0

    def follow(self, input_ids_BT: Tensor) -> None:
        """Take note of what was generated since the last call: nothing, or one token a row.

        Raises:
            ValueError: rows that do not go on from the last call.
        """
        rows, width = input_ids_BT.shape
        if not self.states:
            self.states = [self.grammar.start() for _ in range(rows)]
        elif rows != len(self.states) or width not in (self._width, self._width + 1):
            raise ValueError(
                "a FormProcessor serves one call of generate that adds one token a step: make a new one for each "
                "call, and leave out beams and assistants"
            )
        elif width > self._width:
            for state, token in zip(self.states, input_ids_BT[:, -1].tolist(), strict=True):
                if not state.done:
                    state.accept(token)
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with minus infinity where a token may not come next.

        Raises:
            ValueError: as `follow`; or nothing is left, since what may come next is ruled out by other settings.
        """
        self.follow(input_ids)
        allowed_BV = torch.stack([state.allowed(scores.shape[-1]) for state in self.states])
        scores = scores.masked_fill(~allowed_BV.to(scores.device), -torch.inf)
        is_empty_B = (scores == -torch.inf).all(dim=-1)
        if is_empty_B.any():
            for row in is_empty_B.nonzero().flatten().tolist():
                if not self.states[row].done:
                    raise ValueError(
                        f"the {self.grammar.kind} cannot be answered: settings of generation such as suppress_tokens "
                        "or min_new_tokens rule out every token that may come next"
                    )
                scores[row, list(self.grammar.end_ids)] = 0  # padding follows; without one, sampling would fail
        return scores


class _Compiler:
    """Compiled forms of one tokenizer."""

    def __init__(self, processor: FlashSlothProcessor, end_ids: frozenset[int]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer = processor.tokenizer
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        placeholders = [id for id in (processor.image_token_id, processor.query_token_id) if id is not None]
        self.excluded: set[int] = special.union(tokenizer.all_special_ids, placeholders, end_ids)
        spelled = TokenBytes(tokenizer, self.excluded, min(end_ids))
        self.token_bytes: Sequence[bytes] = spelled.tokens
        self.tokenizer: LLTokenizer = LLTokenizer(TokenizerWrapper(spelled))
        self.grammars: OrderedDict[str, Grammar] = OrderedDict()


_compilers: WeakKeyDictionary[Any, dict[Any, _Compiler]] = WeakKeyDictionary()
_lock = threading.Lock()


def compile_form(form: AnswerForm, processor: FlashSlothProcessor, generation_config: GenerationConfig) -> Grammar:
    """A form for a processor; the same form again costs nothing, another one little.

    The first form of a tokenizer takes about a second for a vocabulary of 50,000.

    Args:
        form: one that is not free.
        generation_config: its `eos_token_id` ends an answer, else that of the tokenizer.

    Raises:
        ValueError: a schema or regular expression that is wrong or cannot be enforced, a choice that the tokenizer
            cannot spell.
        ImportError: without llguidance.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise ImportError(LLGUIDANCE_HINT) from error
    assert not form.is_free
    tokenizer = processor.tokenizer
    ends = generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        raise ValueError("the model has no token that ends an answer; set eos_token_id in its generation_config.json")
    end_ids = frozenset([ends] if isinstance(ends, int) else ends)
    key = json.dumps([form.schema, form.choices, form.regex, processor.chat_template])
    with _lock:
        compilers = _compilers.setdefault(tokenizer, {})
        compiler = compilers.get((len(tokenizer), end_ids))
        if compiler is None:
            compiler = compilers[(len(tokenizer), end_ids)] = _Compiler(processor, end_ids)
        grammar = compiler.grammars.get(key)
        if grammar is None:
            grammar = compiler.grammars[key] = _compile(form, processor, compiler, end_ids)
            if len(compiler.grammars) > FORMS_KEPT:
                compiler.grammars.popitem(last=False)
        compiler.grammars.move_to_end(key)
    return grammar


def _compile(
    form: AnswerForm, processor: FlashSlothProcessor, compiler: _Compiler, end_ids: frozenset[int]
) -> Grammar:
    from llguidance import LLMatcher, regex_to_lark

    lead, choices = _lead(processor), None
    start = f"start: {json.dumps(lead)} answer\n" if lead else "start: answer\n"
    if form.choices is not None:
        kind = "list of choices"
        choices = tuple(_choice_ids(choice, lead, processor, compiler.excluded) for choice in form.choices)
        spelled = [" ".join(f"<[{index}]>" for index in ids) for ids in choices]
        text = "start: " + " | ".join(spelled)
    elif form.schema is not None:
        kind = "JSON schema"
        text = f"{start}answer: %json {json.dumps(dict(form.schema) | {'x-guidance': JSON_LAYOUT})}"
    else:
        assert form.regex is not None
        kind = "regular expression"
        text = f"{start}answer: /{regex_to_lark(form.regex, use_ascii='d')}/"
    matcher = LLMatcher(compiler.tokenizer, LLMatcher.grammar_from_lark(GRAMMAR_OPTIONS + text), log_level=0)
    if matcher.is_error():
        raise ValueError(f"the {kind} cannot be used: {_reason(matcher.get_error())}")
    grammar = Grammar(kind, lead, choices, end_ids, compiler.token_bytes, matcher)
    grammar.start().allowed(len(compiler.token_bytes))
    return grammar


def _reason(message: str) -> str:
    """What the grammar library complains of, without its state and the place in a grammar that nobody wrote."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines()]
    found = next((line.removeprefix("error:") for line in lines if line.startswith("error:")), lines[0])
    found = re.sub(r"^at \d+\(\d+\): ", "", found).removeprefix("failed to compile JSON schema:")
    return shorten(found.strip(), LONGEST_MESSAGE)


def _render(processor: FlashSlothProcessor, answer: str | None, **options: Any) -> Any:
    messages = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return processor.apply_chat_template(messages, add_generation_prompt=answer is None, **options)


def _lead(processor: FlashSlothProcessor) -> str:
    """White space that the chat template puts between a prompt and its answer, which a trained model writes first."""
    probe = "answer"
    prompt, whole = _render(processor, None), _render(processor, probe)
    if not whole.startswith(prompt):
        return ""
    lead = whole[len(prompt) :].partition(probe)[0]
    return "" if lead.strip() else lead


def _choice_ids(choice: str, lead: str, processor: FlashSlothProcessor, excluded: set[int]) -> tuple[int, ...]:
    """The tokens of a choice as training shows them: as the answer of a conversation, without its end."""
    tokenizer = processor.tokenizer
    prompt: list[int] = _render(processor, None, tokenize=True)[0]
    whole: list[int] = _render(processor, choice, tokenize=True)[0]
    if whole[: len(prompt)] == prompt:
        rest = whole[len(prompt) :]
        end = next((place for place, index in enumerate(rest) if index in excluded), len(rest))
        ids = rest[:end]
    else:
        ids = tokenizer(lead + choice, add_special_tokens=False)["input_ids"]
    spelled = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    if spelled != choice or not ids or excluded.intersection(ids):
        raise ValueError(
            f"the choice {choice!r:.100} cannot be spelled by the model's tokenizer, which writes {spelled!r:.100}; "
            "give choices as the model writes them"
        )
    return tuple(ids)

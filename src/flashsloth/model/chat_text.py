"""Prompts as text: the chat templates, escaping of what users type, and the reading of a rendered prompt.

A rendered prompt holds placeholders (image, query group), special tokens, and the zero-width question marker. Text
that a user typed is escaped before rendering, so none of these can be forged by it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

DEFAULT_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# The conversation of the published checkpoints. Variables: image_token, query_token ("" for a model without queries),
# question_marker, eos_token, default_system_prompt, space_before_query (their training data had that space).
DEFAULT_CHAT_TEMPLATE = (
    """\
{%- set image_token = image_token | default('<image>') -%}
{%- set query_token = query_token | default('<learnable>') -%}
{%- set question_marker = question_marker | default('<question>') -%}
{%- set default_system_prompt = default_system_prompt | default("""
    + '"'
    + DEFAULT_SYSTEM_PROMPT
    + '"'
    + """) -%}
{%- set state = namespace(turn=0, asked=false) -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] if messages[0]['content'] is string
        else messages[0]['content'] | map(attribute='text') | join -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {%- set system = default_system_prompt -%}
{%- endif -%}
{{- system + ' ' if system else '' -}}
{%- for message in messages -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('roles must alternate user, assistant, user, ... after an optional system message, but '
            ~ 'message ' ~ loop.index ~ ' has role ' ~ message['role']) -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' -}}
        {%- if message['content'] is string -%}
            {{- question_marker + message['content'] -}}
        {%- else -%}
            {%- set state.asked = false -%}
            {%- for part in message['content'] -%}
                {%- if part['type'] == 'image' -%}
                    {{- image_token + '\\n' -}}
                {%- else -%}
                    {{- ('' if state.asked else question_marker) + part['text'] -}}
                    {%- set state.asked = true -%}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- ' ' if space_before_query and query_token else '' -}}
        {{- query_token -}}
    {%- else -%}
        {{- ' ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' + (message['content'] if message['content'] is string
                else message['content'] | map(attribute='text') | join) + eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{{- ' ASSISTANT:' if add_generation_prompt else '' -}}
"""
)

# Captions of pretraining: no roles, no queries.
PLAIN_CHAT_TEMPLATE = """\
{%- set image_token = image_token | default('<image>') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {%- for part in message['content'] -%}{{- image_token -}}{%- endfor -%}
    {%- else -%}
        {%- generation -%}{{- message['content'] + '\\n' -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""

# A Unicode noncharacter: never text, left alone by templates and JSON.
ESCAPE = "\ufdd0"
SEPARATOR = "/"
# Half of a surrogate pair, as a cut emoji leaves it: no text, and no tokenizer takes it.
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
_ESCAPED = re.compile(f"{ESCAPE}([{ESCAPE}{SEPARATOR}])")


class Kind(Enum):
    """What a piece of a prompt, or a mark inside a piece of text, is."""

    TEXT = "text"
    IMAGE = "image"
    QUERY = "query"
    TOKEN = "token"
    QUESTION = "question"
    ANSWER_START = "answer start"
    ANSWER_END = "answer end"


@dataclass
class Piece:
    """A stretch of text to tokenise as a whole, or one token.

    `marks` are (offset in `text`, kind), in order; `ids` the token ids of a text and `ends` where in it each ends.
    """

    kind: Kind
    text: str
    marks: list[tuple[int, Kind]] = field(default_factory=list)
    ids: Sequence[int] = ()
    ends: Sequence[int] = ()


class PromptText:
    """Escapes typed text and splits rendered prompts.

    Args:
        image_token, query_token, question_marker: how the template writes them.
        special_tokens: the tokenizer's special tokens, each with whether it swallows space to its left and right.
    """

    def __init__(
        self,
        image_token: str,
        query_token: str,
        question_marker: str,
        special_tokens: Mapping[str, tuple[bool, bool]],
    ):
        self.kinds = dict.fromkeys(special_tokens, Kind.TOKEN) | {
            image_token: Kind.IMAGE,
            query_token: Kind.QUERY,
            question_marker: Kind.QUESTION,
        }
        longest_first = sorted(self.kinds, key=len, reverse=True)
        self._splitter = re.compile(
            "|".join(_swallowing(token, *special_tokens.get(token, (False, False))) for token in longest_first)
        )
        # The first character of a token is followed by a separator wherever the token, or at the end of the text a
        # beginning of it, stands: text that follows cannot complete it either.
        beginnings = {token[:length] for token in self.kinds for length in range(1, len(token))}
        first_characters = "".join(re.escape(character) for character in sorted({token[0] for token in self.kinds}))
        whole = "|".join(map(re.escape, longest_first))
        partial = "|".join(map(re.escape, sorted(beginnings, key=len, reverse=True))) or "(?!)"
        self._suspicious = re.compile(f"[{first_characters}{ESCAPE}]")
        self._forged = re.compile(f"(?=[{first_characters}])(?=(?:{whole})|(?:{partial})\\Z)(.)", re.DOTALL)

    def escape(self, text: str) -> str:
        """Typed text, so that it stays text inside a prompt."""
        text = _well_formed(text)
        if self._suspicious.search(text) is None:
            return text
        return self._forged.sub(rf"\1{ESCAPE}{SEPARATOR}", text.replace(ESCAPE, ESCAPE * 2))

    @staticmethod
    def unescape(text: str) -> str:
        """Inverse of `escape`."""
        if ESCAPE not in text:
            return text
        return _ESCAPED.sub(lambda match: match[1].removeprefix(SEPARATOR), text)

    def split(self, prompt: str, answer_spans: Iterable[Sequence[int]] = ()) -> list[Piece]:
        """Cuts a rendered prompt at its placeholders and special tokens; `answer_spans` are (start, stop) in it."""
        prompt = _well_formed(prompt)  # what was not escaped: prompts written by hand, variables of the template
        cuts: list[tuple[int, int, str, Kind]] = []
        for match in self._splitter.finditer(prompt):
            text = match.group() if match.group() in self.kinds else match.group().strip()
            cuts.append((match.start(), match.end(), text, self.kinds[text]))
        for start, stop in answer_spans:
            cuts += [(start, start, "", Kind.ANSWER_START), (stop, stop, "", Kind.ANSWER_END)]
        if answer_spans:
            cuts.sort(key=lambda cut: cut[:2])
        pieces: list[Piece] = []
        current = Piece(Kind.TEXT, "")
        position = 0
        for start, stop, text, kind in cuts:
            current.text += self.unescape(prompt[position:start])
            position = stop
            if kind in (Kind.QUESTION, Kind.ANSWER_START, Kind.ANSWER_END):
                current.marks.append((len(current.text), kind))
                continue
            if current.text or current.marks:
                pieces.append(current)
                current = Piece(Kind.TEXT, "")
            pieces.append(Piece(kind, text))
        current.text += self.unescape(prompt[position:])
        if current.text or current.marks:
            pieces.append(current)
        return pieces


def _well_formed(text: str) -> str:
    return _LONE_SURROGATES.sub(_REPLACEMENT, text)


def _swallowing(token: str, left: bool, right: bool) -> str:
    return (r"\s*" if left else "") + re.escape(token) + (r"\s*" if right else "")


def mark_questions(pieces: list[Piece], user_header: str) -> None:
    """Marks the questions of a prompt written without markers, by its placeholders and role headers.

    A question begins after the newline that follows the turn's last image, or without image after the user header.

    Raises:
        ValueError: neither is found.
    """
    turn_start = 0
    group = 0
    for index, piece in enumerate(pieces):
        if piece.kind is not Kind.QUERY:
            continue
        group += 1
        turn = pieces[turn_start:index]
        turn_start = index + 1
        if any(kind is Kind.QUESTION for part in turn for _, kind in part.marks):
            continue
        images = [place for place, part in enumerate(turn) if part.kind is Kind.IMAGE]
        if images:
            rest = [part for part in turn[images[-1] + 1 :] if part.kind is Kind.TEXT]
            if rest:
                _mark(rest[0], len(rest[0].text) - len(rest[0].text.removeprefix("\n")))
            continue
        texts = [part for part in turn if part.kind is Kind.TEXT]
        for part in reversed(texts):
            at = part.text.find(user_header)
            if at >= 0:
                _mark(part, at + len(user_header))
                break
        else:
            raise ValueError(
                f"cannot tell where the question of query group {group} begins: there is no question marker, no image "
                f"and no {user_header!r} before it"
            )


def mark_answers(pieces: list[Piece], assistant_header: str, eos_token: str | None) -> None:
    """Marks the answers of a prompt that came without answer spans: from the assistant header that follows a query
    group to the end-of-sequence token.

    Raises:
        ValueError: a query group is not followed by the header.
    """
    for index, piece in enumerate(pieces):
        if piece.kind is not Kind.QUERY:
            continue
        after = pieces[index + 1] if index + 1 < len(pieces) else None
        if after is None or not after.text.lstrip().startswith(assistant_header):
            raise ValueError(f"labels need {assistant_header!r} after every query group of a prompt written by hand")
        _mark(after, after.text.index(assistant_header) + len(assistant_header), Kind.ANSWER_START)
        for later in range(index + 2, len(pieces)):
            if pieces[later].kind is Kind.QUERY:
                break
            if pieces[later].kind is Kind.TOKEN and pieces[later].text == eos_token:
                if later + 1 == len(pieces) or pieces[later + 1].kind is not Kind.TEXT:
                    pieces.insert(later + 1, Piece(Kind.TEXT, ""))
                _mark(pieces[later + 1], 0, Kind.ANSWER_END)
                break


def _mark(piece: Piece, offset: int, kind: Kind = Kind.QUESTION) -> None:
    piece.marks.append((offset, kind))
    piece.marks.sort(key=lambda mark: mark[0])

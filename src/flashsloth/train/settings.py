"""YAML files of settings: read as they are written, changed by `key=value`, validated into strict dataclasses."""

import dataclasses
import difflib
import json
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from yaml.composer import ComposerError

from ..data.text_files import read_text

Settings = TypeVar("Settings")

MAX_BYTES = 2**20
MAX_DEPTH = 40
# Characters of all values where every alias is written out: a few lines can stand for gigabytes.
MAX_SIZE = 2**22
MAX_ERRORS = 20
MAX_SHOWN, MAX_MESSAGE = 200, 2000  # characters of a value, and of a whole sentence
_TEXT_TAG = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """YAML whose text stays text: what is no number, truth value or null in YAML 1.2 is read as it is written.

    YAML 1.1 makes 10 of 0012, 45,045 of 12:30:45 and an object of 2024-01-01. Numbers may have an exponent without a
    point (1e-3). Keys are text. Keys that appear twice, tags, and aliases that repeat too much are refused.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        tag, mark = getattr(event, "tag", None), event.start_mark
        if tag not in (None, "!", _TEXT_TAG):
            raise ComposerError(None, None, f"tags such as {_shorten(tag)} are not read", mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise ComposerError(None, None, f"alias {event.anchor!r} refers to itself", mark)
        elif node is not None:
            self._sizes[id(node)] = self._check(node)
        return node

    def _check(self, node: Any) -> int:
        """Characters of a node with all that is below it."""
        if isinstance(node, yaml.ScalarNode):
            node.value = _joined(node.value)
            if not is_text(node.value):
                raise ComposerError(None, None, "text with NUL or half a surrogate pair", node.start_mark)
            return 1 + len(node.value)
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
            keys: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ComposerError(None, None, "a key is no single word", key.start_mark)
                if key.value in keys:
                    raise ComposerError(None, None, f"key {key.value!r} appears twice", key.start_mark)
                keys.add(key.value)
        size = 1 + sum(self._sizes[id(child)] for child in children)
        if size > MAX_SIZE:
            raise ComposerError(None, None, "aliases repeat too much", node.start_mark)
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    # bool as in YAML 1.1, since a word that comes to mean text would turn a switch on
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+|0b[01]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+(?:_[0-9]+)*(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


def _joined(value: str) -> str:
    """Text in which pairs of surrogates, as JSON escapes them, are the characters that they stand for."""
    if value.isascii():
        return value
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def is_text(value: str) -> bool:
    """Whether a string can be written to a file and named in a path: no NUL, no half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def read_tree(path: Path) -> dict[str, Any]:
    """The nested mapping in a YAML file.

    Raises:
        ValueError: an unreadable file, bad YAML, a key that appears twice, or no mapping.
    """
    try:
        text = read_text(path, MAX_BYTES)
    except ValueError as error:
        raise ValueError(f"cannot read recipe {error}") from error
    try:
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {_shorten(_one_line(error))}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys, got {type(tree).__name__}")
    return _unshared(tree)


def _unshared(value: Any) -> Any:
    """Copies of what YAML's aliases share, so that an override changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def parse_settings(kind: type[Settings], tree: dict[str, Any], source: str) -> Settings:
    """Validate a nested mapping into a strict dataclass; errors name the keys of `source`."""
    try:
        text = json.dumps(tree)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{source}: only text, numbers, truth values, lists and mappings are settings: {error}"
        ) from error
    try:
        # JSON mode is what makes strict validation accept mappings for dataclasses and text for paths.
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        lines = [f"{source}: {_explain(kind, item)}" for item in error.errors()]
        rest = [f"{source}: and {len(lines) - MAX_ERRORS} more"] if len(lines) > MAX_ERRORS else []
        raise ValueError("\n".join(lines[:MAX_ERRORS] + rest)) from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Change one value of a tree of settings.

    Args:
        override: `a.b=value`, a YAML value; an element of a list goes by its `name` or its index.

    Raises:
        ValueError: it has another form, its value is not valid YAML, or its place is not there.
    """
    key, separator, text = override.partition("=")
    shown = _shorten(override)
    if not separator or not key:
        raise ValueError(f"override {shown!r} is not of the form key=value")
    steps = key.split(".")
    if "" in steps or not is_text(key) or len(steps) > MAX_DEPTH:
        raise ValueError(f"override {shown!r}: a key is words with a point between them, such as stages.0.batch_size")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"override {shown!r}: the value is not valid YAML: {_shorten(_one_line(error))}") from error
    *parents, last = steps
    node: Any = tree
    for depth, step in enumerate(parents):
        prefix = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_list_index(node, step, prefix)]
        elif isinstance(node, dict):
            node = node.setdefault(step, {})
        if not isinstance(node, (dict, list)):
            raise ValueError(f"override {shown!r}: {_shorten(prefix)} is a single value and has no fields")
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _list_index(items: list[Any], step: str, where: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if step in names:
        return names.index(step)
    if step in map(str, range(len(items))):
        return int(step)
    raise ValueError(
        f"override: no {_shorten(where)!r}; choose an index below {len(items)} or one of {[n for n in names if n]}"
    )


def _explain(kind: type, item: Mapping[str, Any]) -> str:
    where = _shorten(".".join(str(part) for part in item["loc"]))
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        valid = _valid_keys(kind, item["loc"][:-1])
        nearest = difflib.get_close_matches(_shorten(str(item["loc"][-1])), valid, n=1, cutoff=0.0)
        hint = f"; the nearest valid key is {nearest[0]!r}" if nearest else ""
        return f"unknown key {where!r}{hint} (valid: {', '.join(valid)})"
    message = _shorten(item["msg"].removeprefix("Value error, "), MAX_MESSAGE)
    if item["type"] == "value_error":
        return message
    if item["type"] == "json_invalid":  # what was given is the whole tree
        return f"text with half a surrogate pair ({message})"
    if item["type"] == "missing":
        return f"{where}: {message}"
    is_guessed = item["type"] in ("string_type", "path_type") and isinstance(item["input"], (bool, int, float))
    hint = "; write text that looks like something else in quotes" if is_guessed else ""
    return f"{where}: {message}, got {_shorten(repr(item['input']))}{hint}"


def _valid_keys(kind: type, location: tuple[int | str, ...]) -> list[str]:
    """Field names of the dataclass found at a pydantic error location below `kind`."""
    current: Any = kind
    for step in location:
        current = _child(current, step)
    options = [option for option in _options(current) if dataclasses.is_dataclass(option)]
    return [field.name for field in dataclasses.fields(options[0])] if len(options) == 1 else []


def _options(annotation: Any) -> list[Any]:
    """The members of a (possibly annotated) union; a single type is a union of one."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _child(annotation: Any, step: int | str) -> Any:
    """The annotation one location step below: a field, an element, or the member of a tagged union."""
    for option in _options(annotation):
        if dataclasses.is_dataclass(option):
            fields = {field.name: field.type for field in dataclasses.fields(option)}
            if step in get_args(fields.get("kind")):
                return option
            if step in fields:
                return fields[str(step)]
        elif get_origin(option) in (list, dict):
            return get_args(option)[-1]
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _shorten(text: str, length: int = MAX_SHOWN) -> str:
    return text if len(text) <= length else f"{text[:length]}..."

"""From a chat of OpenAI's to what the engine is asked."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from .errors import BAD_REQUEST, NOT_FOUND, UNPROCESSABLE, ApiError
from .requests import Request, Sampling
from .schemas import MOST_FORM_CHARACTERS, ChatRequest, ImagePart
from .settings import Settings

# From a kind ("choice", "regex", "json_object", "json_schema") and its value (list of texts, text, None, schema) to a
# constraint on one answer. It raises ValueError for a value that is none.
MakeGrammar = Callable[[str, Any], Any]

SEEDS = 2**63


@dataclass(frozen=True)
class Source:
    """Of an image: its URL, and the field that it stands in."""

    url: str
    field: str


def read_messages(chat: ChatRequest, max_images: int) -> tuple[list[dict[str, Any]], list[Source]]:
    """Messages as `apply_chat_template` takes them, and the images of all of them in reading order.

    What users type stays text: the processor escapes whatever looks like a special token in it.

    Raises:
        ApiError: there is no question, or there are too many images.
    """
    messages: list[dict[str, Any]] = []
    sources: list[Source] = []
    for index, message in enumerate(chat.messages):
        parts: list[dict[str, str]] = []
        if isinstance(message.content, str):
            parts.append({"type": "text", "text": message.content})
        else:
            for place, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    field = f"messages.{index}.content.{place}.image_url.url"
                    sources.append(Source(part.image_url.url, field))
                    parts.append({"type": "image"})
                else:
                    parts.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": parts})
    if len(sources) > max_images:
        cause = f"{len(sources)} images are more than this server's limit of {max_images} a request"
        raise ApiError(UNPROCESSABLE, cause, sources[max_images].field, "too_many_images")
    last = len(messages) - 1
    if messages[last]["role"] != "user":
        raise ApiError(BAD_REQUEST, "the last message must be the user's question", f"messages.{last}.role")
    if not any(part["type"] == "text" and part["text"].strip() for part in messages[last]["content"]):
        raise ApiError(BAD_REQUEST, "the question has no text", f"messages.{last}.content")
    return messages, sources


def check_chat(chat: ChatRequest, settings: Settings) -> None:
    """Refuse what no schema can tell: another model, fields that contradict, numbers beyond this server's limits.

    Raises:
        ApiError: names the field.
    """
    if chat.model != settings.model_name:
        message = f"there is no model {chat.model!r:.200}; this server has {settings.model_name!r}"
        raise ApiError(NOT_FOUND, message, "model", "model_not_found")
    if None not in (chat.max_tokens, chat.max_completion_tokens) and chat.max_tokens != chat.max_completion_tokens:
        raise ApiError(BAD_REQUEST, "max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")
    if chat.top_logprobs is not None and not chat.logprobs:
        raise ApiError(BAD_REQUEST, "top_logprobs needs logprobs: true", "top_logprobs")
    if chat.stream_options is not None and not chat.stream:
        raise ApiError(BAD_REQUEST, "stream_options needs stream: true", "stream_options")
    if (chat.n or 1) > settings.max_answers:
        raise ApiError(BAD_REQUEST, f"n is {chat.n}; this server gives at most {settings.max_answers} answers", "n")


def constraint(chat: ChatRequest) -> tuple[str, str, Any] | None:
    """The field that constrains the answer, the kind of constraint and its value; None for free text.

    Raises:
        ApiError: two fields do, or one holds no JSON.
    """
    found: list[tuple[str, str, Any]] = []
    if chat.response_format is not None and chat.response_format.type != "text":
        schema = getattr(chat.response_format, "json_schema", None)
        value = None if schema is None else schema.schema_
        found.append(("response_format", chat.response_format.type, value))
    if chat.guided_choice is not None:
        found.append(("guided_choice", "choice", chat.guided_choice))
    if chat.guided_regex is not None:
        found.append(("guided_regex", "regex", chat.guided_regex))
    if chat.guided_json is not None:
        found.append(("guided_json", "json_schema", _schema(chat.guided_json, "guided_json")))
    if (outputs := chat.structured_outputs) is not None:
        if outputs.choice is not None:
            found.append(("structured_outputs", "choice", outputs.choice))
        elif outputs.regex is not None:
            found.append(("structured_outputs", "regex", outputs.regex))
        elif outputs.json_ is not None:
            found.append(("structured_outputs", "json_schema", _schema(outputs.json_, "structured_outputs.json")))
        else:
            found.append(("structured_outputs", "json_object", None))
    if len(found) > 1:
        fields = " and ".join(field for field, *_ in found)
        raise ApiError(BAD_REQUEST, f"{fields} exclude each other; give one", found[1][0])
    return found[0] if found else None


def _schema(value: dict[str, Any] | str, field: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ApiError(BAD_REQUEST, f"{field} is no JSON: {error}", field) from error
    if not isinstance(value, dict):
        raise ApiError(BAD_REQUEST, f"{field} must be a JSON schema, an object", field)
    return value


def read_grammar(chat: ChatRequest, make_grammar: MakeGrammar | None) -> Any:
    """The constraint on the answer; None for free text. It may take a while to make.

    Raises:
        ApiError: the constraint is none, or there is nothing to make it with.
    """
    if (wanted := constraint(chat)) is None:
        return None
    field, kind, value = wanted
    if make_grammar is None:
        message = f"{field} needs a library that this server lacks: pip install 'flashsloth[structured]'"
        raise ApiError(BAD_REQUEST, message, field)
    try:
        size = len(value) if isinstance(value, str) else len(json.dumps(value))
        if size > MOST_FORM_CHARACTERS:
            raise ValueError(f"it has {size:,} characters; a form has at most {MOST_FORM_CHARACTERS:,}")
        return make_grammar(kind, value)
    except (ValueError, RecursionError) as error:
        raise ApiError(BAD_REQUEST, f"{field}: {error}", field) from error


def make_requests(
    chat: ChatRequest,
    messages: list[dict[str, Any]],
    images: Sequence[Image.Image],
    grammar: Any,
    settings: Settings,
) -> list[Request]:
    """One request for each of the answers that are asked for, under one constraint or None."""
    stop = [chat.stop] if isinstance(chat.stop, str) else chat.stop or ()
    sampling = Sampling(
        max_tokens=chat.max_tokens or chat.max_completion_tokens or settings.max_tokens,
        temperature=0.0 if chat.temperature is None else chat.temperature,
        top_p=1.0 if chat.top_p is None else chat.top_p,
        seed=chat.seed,
        stop=tuple(stop),
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        confidence=bool(chat.confidence),
    )
    visual_tokens = None
    if images:
        visual_tokens = settings.visual_tokens if chat.visual_tokens is None else chat.visual_tokens
    requests = []
    for index in range(chat.n or 1):
        seed = None if chat.seed is None else (chat.seed + index) % SEEDS
        requests.append(Request(messages, images, replace(sampling, seed=seed, grammar=grammar), visual_tokens))
    return requests

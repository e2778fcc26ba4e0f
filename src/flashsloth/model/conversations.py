"""Conversations as users write them: checked, escaped and rendered, their images taken out and counted."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from .chat_text import PromptText
from .image_processing_flashsloth import flatten_images
from .prompt_encoding import naming_row


def as_batch(conversation: Any) -> tuple[Sequence[Any], bool]:
    if hasattr(conversation, "messages"):
        return [conversation], False
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError("a conversation is a non-empty list of messages, each a dict with role and content")
    batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    return (conversation, True) if batched else ([conversation], False)


def render_conversations(
    conversations: Sequence[Any],
    template: str,
    prompt_text: PromptText,
    with_spans: bool,
    tools: list | None,
    documents: list | None,
    variables: dict[str, Any],
) -> tuple[list[str], list[Sequence], list[list[Any]]]:
    """Prompts, answer spans (start, stop) in each, and the image sources of each.

    Raises:
        ValueError: messages of a wrong shape, and whatever the template, which is the user's program, raises.
    """
    messages, sources = [], []
    try:
        for row, conversation in enumerate(conversations):
            with naming_row(row, len(conversations)):
                normalized, images = normalize_conversation(conversation, prompt_text)
            messages.append(normalized)
            sources.append(images)
        texts = {"tools": _escape_nested(tools, prompt_text), "documents": _escape_nested(documents, prompt_text)}
        prompts, spans = render_jinja_template(
            messages, chat_template=template, return_assistant_tokens_mask=with_spans, **texts, **variables
        )
    except ValueError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template refuses the conversation: {cause:.300}") from error
    # an answer that is to be continued has lost its end after the spans were noted
    spans = (
        [
            [(start, min(stop, len(prompt))) for start, stop in row if start < len(prompt)]
            for row, prompt in zip(spans, prompts, strict=True)
        ]
        if spans
        else [()] * len(prompts)
    )
    return prompts, spans, sources


def normalize_conversation(messages: Any, prompt_text: PromptText) -> tuple[list[dict[str, Any]], list[Any]]:
    """Escapes a conversation and takes its images out.

    Args:
        messages: [{"role": ..., "content": text, or parts {"type": "text", "text": ...}, {"type": "image", "image" |
            "url" | "path" | "base64": ...}, {"type": "image_url", "image_url": ...}}, ...].

    Returns:
        The messages for the template, and the sources of their images in order; `None` for an image part without one.
    """
    images: list[Any] = []
    normalized = []
    messages = getattr(messages, "messages", messages)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"a conversation is a non-empty list of messages, got {messages!r:.100}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'a message must be a dict with "role" and "content", got {message!r:.100}')
        clean: dict[str, Any] = {"role": prompt_text.escape(message["role"])}
        if len(message) > 2:
            others = {key: value for key, value in message.items() if key not in ("role", "content")}
            clean.update(_escape_nested(others, prompt_text))
        content = message.get("content")
        if isinstance(content, str) or content is None:
            clean["content"] = prompt_text.escape(content or "")
        elif isinstance(content, (Mapping, bytes)) or not isinstance(content, Iterable):
            raise ValueError(f"content must be text or a list of parts, got {content!r:.100}")
        else:
            clean["content"] = [_normalize_part(part, images, prompt_text) for part in content]
        normalized.append(clean)
    return normalized, images


def _normalize_part(part: Any, images: list[Any], prompt_text: PromptText) -> dict[str, str]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"a part of a message's content must be text or a dict, got {part!r:.100}")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f'the "text" of a content part must be a string, got {part.get("text")!r:.100}')
        return {"type": "text", "text": prompt_text.escape(part["text"])}
    if kind not in ("image", "image_url"):
        raise ValueError(f'content parts are of type "text" or "image", got {kind!r:.80}')
    source = next((part[key] for key in ("image", "url", "path", "image_url") if part.get(key) is not None), None)
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None and part.get("base64") is not None:
        if not isinstance(part["base64"], str):
            raise ValueError(f'the "base64" of an image must be a string, got {part["base64"]!r:.100}')
        source = "data:;base64," + part["base64"]
    images.append(source)
    return {"type": "image"}


def _escape_nested(value: Any, prompt_text: PromptText) -> Any:
    if isinstance(value, str):
        return prompt_text.escape(value)
    if isinstance(value, Mapping):
        return {_escape_nested(key, prompt_text): _escape_nested(item, prompt_text) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escape_nested(item, prompt_text) for item in value]
    return value


def merge_sources(sources: list[list[Any]], images: Any) -> list[list[Any]] | None:
    """Puts images that were given apart into the image parts that name no source."""
    given = list(flatten_images(images))
    wanted = sum(source is None for row in sources for source in row)
    if wanted != len(given):
        raise ValueError(
            f"the conversations have {wanted} image parts that name no image, and {len(given)} images were given apart"
        )
    rest = iter(given)
    merged = [[next(rest) if source is None else source for source in row] for row in sources]
    return merged if any(merged) else None


def match_images(images: Any, counts: Sequence[int], image_token: str) -> list[Any]:
    """The images as a flat list, after comparing their number with the placeholders of each row."""
    if isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images):
        given = [len(list(flatten_images(row))) for row in images]
        if len(given) != len(counts):
            raise ValueError(f"images has {len(given)} rows, text has {len(counts)}")
        for row, (expected, found) in enumerate(zip(counts, given, strict=True)):
            if expected != found:
                raise ValueError(f"row {row} has {expected} {image_token} placeholders but {found} images")
        return list(flatten_images(images))
    flat = list(flatten_images(images))
    if len(flat) != sum(counts):
        rows = f" ({', '.join(f'row {row}: {count}' for row, count in enumerate(counts))})" if len(counts) > 1 else ""
        raise ValueError(f"text has {sum(counts)} {image_token} placeholders{rows} but {len(flat)} images were given")
    return flat

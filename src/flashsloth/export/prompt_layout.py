"""The chat template of a processor, cut into the pieces between what users write, so that no template is needed later.

The pieces are found by rendering marks, and put together again for many conversations: a template that does more than
put texts side by side is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from flashsloth_edge.manifest import PromptLayout
from flashsloth_edge.prompts import Prompts, Turns

from ..model.processing_flashsloth import FlashSlothProcessor
from ..model.prompt_encoding import NO_LIMIT

MARKS = ("Qfirstq", "Afirsta", "Qsecondq", "Aseconda", "Qthirdq")
SYSTEM_MARK = "Smarks"
MOST_IMAGES = 3


def prompt_layout(processor: FlashSlothProcessor) -> PromptLayout:
    """The pieces of the processor's default chat template, and what its tokenizer does around texts.

    Raises:
        ValueError: a template whose text depends on what users write.
    """
    question, answer, second = MARKS[:3]
    takes_system = _takes_system(processor)
    system_start = ""
    ends: dict[int, list[str]] = {}
    for images in (1, 0):
        default, question_end = _split(_render(processor, [question], images), question)
        ends[images] = [default]
        if takes_system:
            system_start, rest = _split(_render(processor, [question], images, SYSTEM_MARK), SYSTEM_MARK)
            ends[images] += [_split(text, question)[0] for text in (rest, _render(processor, [question], images, ""))]
    token = processor.image_token
    for place, text in enumerate(ends[1]):
        before, image_end = _split(text, token)
        ends[1][place] = before
    two, _ = _split(_render(processor, [question], 2), question)
    separator, _ = _split(_split(two, token)[1], token)
    history, rest = _split(_render(processor, MARKS[:3], 0), answer)
    question_to_answer = _split(history, question)[1]
    answer_to_question = _split(rest, second)[0]
    limit = processor.tokenizer.model_max_length
    return PromptLayout(
        default_opening=[ends[1][0], ends[0][0]],
        takes_system=takes_system,
        system_start=system_start,
        system_end=[ends[1][1], ends[0][1]] if takes_system else [],
        empty_opening=[ends[1][2], ends[0][2]] if takes_system else [],
        image=token,
        image_separator=separator,
        image_end=image_end,
        question_end=question_end,
        question_to_answer=question_to_answer,
        answer_to_question=answer_to_question,
        strips=_strips(processor),
        image_token=token,
        query_token=processor.query_token,
        question_marker=processor.question_marker,
        user_header=processor.user_header,
        image_token_id=processor.image_token_id,
        query_token_id=processor.query_token_id,
        prefix_ids=processor.find_prefix_ids(),
        opens_texts=processor.opens_texts(),
        limit=limit if limit < NO_LIMIT else None,
    )


def check_layout(processor: FlashSlothProcessor, prompts: Prompts) -> int:
    """Compare what the runtime writes and tokenises with what the processor does; returns the number of prompts.

    Raises:
        ValueError: the first that differs.
    """
    tried = 0
    typed = ("  what is\n this? ", "a  tree", processor.image_token + "?", "<|x|> é 木", "and\tnow ")
    systems = (None, "", "Be brief.") if prompts.layout.takes_system else (None,)
    for texts, images, turns, system in itertools.product((MARKS, typed), range(MOST_IMAGES + 1), (1, 3, 5), systems):
        expected = processor.apply_chat_template(
            _messages(texts[:turns], images, system),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "np", "return_pixel_values": False},
        )
        row = Turns(texts[:turns], [processor.num_image_tokens] * images, system)
        found = prompts.encode([row])
        for name in ("input_ids", "image_positions", "query_positions", "question_ids"):
            if name in expected and expected[name].tolist() != found[name].tolist():
                written = _render(processor, texts[:turns], images, system)
                raise ValueError(
                    f"the chat template of this model cannot be cut into pieces ({name} differ): for {texts[:turns]} "
                    f"with {images} images and the system prompt {system!r} it writes {written!r}, the runtime "
                    f"{prompts.render(row)!r}; export a model whose template puts texts side by side"
                )
        tried += 1
    return tried


def save_tokenizer(processor: FlashSlothProcessor, file: Path) -> None:
    """Write the tokenizer as one file that the `tokenizers` libraries read."""
    processor.tokenizer.backend_tokenizer.save(str(file))


def _messages(texts: Sequence[str], images: int, system: str | None) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for index, text in enumerate(texts):
        content = [{"type": "text", "text": text}]
        if index == 0:
            content = [{"type": "image"}] * images + content
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    return messages


def _render(processor: FlashSlothProcessor, texts: Sequence[str], images: int, system: str | None = None) -> str:
    return processor.apply_chat_template(_messages(texts, images, system), add_generation_prompt=True)


def _takes_system(processor: FlashSlothProcessor) -> bool:
    try:
        return SYSTEM_MARK in _render(processor, MARKS[:1], 0, SYSTEM_MARK)
    except ValueError:  # the template refuses it
        return False


def _strips(processor: FlashSlothProcessor) -> bool:
    mark = MARKS[0]
    return f" {mark} " not in _render(processor, [f" {mark} "], 0)


def _split(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError(f"the chat template does not write {mark!r} as it is; its prompts cannot be exported")
    return before, after

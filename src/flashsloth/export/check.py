"""What was written against the model: prompts, logits and greedy answers, by the very runtime that will run it.

A part that got lost while a graph was traced (the embedded query module, the compressor's weights, a query token)
changes the logits; such an export is refused.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import flashsloth_edge
from flashsloth_edge.engines import select_tokens
from flashsloth_edge.prompts import Turns

from ..checkpoints.hub import ASSETS
from ..inference.session import FlashSloth
from .prompt_layout import check_layout

# between float32 in torch and in the graphs, which add up in another order
MOST_LOGIT_DIFFERENCE = 1e-4
# of weights of fewer bits: the least correlation of the logits of a prompt
LEAST_CORRELATION = 0.9
NEW_TOKENS = 12
SECOND_QUESTION = "and what else?"


def check_export(session: FlashSloth, folder: Path, exact: bool) -> dict[str, Any]:
    """Compare an exported folder with the model it was made from.

    Args:
        session: the model, in float32.
        exact: logits must agree within 1e-4 of their largest value or 1, and all answers; otherwise logits must
            correlate by 0.9, and differences are only counted.

    Returns:
        what was found: prompts, the largest difference and the least correlation of logits, answers and equal ones.

    Raises:
        ValueError: they disagree.
    """
    exported = flashsloth_edge.load(folder)
    prompts = check_layout(session.processor, exported.prompts)
    largest, least, answers, equal = 0.0, 1.0, 0, 0
    for images, questions in _cases():
        expected_V, found_V = _logits(session, exported, images, questions[0])
        scale = max(1.0, float(np.abs(expected_V).max()))
        largest = max(largest, float(np.abs(expected_V - found_V).max()) / scale)
        least = min(least, float(np.corrcoef(expected_V, found_V)[0, 1]))
        theirs, ours = session.conversation(images), exported.conversation(images)
        for question in questions:
            expected = theirs.ask(question, max_new_tokens=NEW_TOKENS, do_sample=False).text
            found = ours.ask(question, max_new_tokens=NEW_TOKENS, do_sample=False).text
            answers, equal = answers + 1, equal + (expected == found)
            if expected != found and exact:
                raise ValueError(
                    f"the exported graphs answer {found!r} to {question!r} about {len(images)} images, the model "
                    f"{expected!r}; nothing was written"
                )
            if expected != found:
                break  # what follows has another beginning
    if exact and not largest <= MOST_LOGIT_DIFFERENCE:
        raise ValueError(
            f"logits of the exported graphs differ from the model's by {largest:.2g} (at most "
            f"{MOST_LOGIT_DIFFERENCE:g}); a part of the model is missing or changed in them, so nothing was written"
        )
    if not least >= LEAST_CORRELATION:
        raise ValueError(
            f"logits of the exported graphs correlate with the model's by {least:.3f} (at least {LEAST_CORRELATION}); "
            "a part of the model is missing in them, or these weights have too few bits for it"
        )
    return {
        "prompts": prompts,
        "logit_difference": largest,
        "logit_correlation": least,
        "answers": answers,
        "equal_answers": equal,
    }


def _cases() -> list[tuple[list[Image.Image], list[str]]]:
    """Images and questions: one image, two turns, two images, text alone."""
    samples = json.loads((ASSETS / "samples" / "samples.json").read_text(encoding="utf-8"))
    images = [Image.open(ASSETS / "samples" / sample["image"]).convert("RGB") for sample in samples]
    asked = [sample["question"] for sample in samples]
    cases = [([image], [question]) for image, question in zip(images, asked, strict=True)]
    cases[0] = (cases[0][0], [asked[0], SECOND_QUESTION])
    return [*cases, (images[:2], [asked[1], SECOND_QUESTION]), ([], [asked[0]])]


@torch.inference_mode()
def _logits(
    session: FlashSloth, exported: flashsloth_edge.EdgeModel, images: list[Image.Image], question: str
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the first token of the answer, by the model and by the graphs, (V,) each."""
    counts = exported.image_tokens(len(images), None)
    prompt = exported.prompts.encode([Turns([question], counts)])
    described = exported.engine.no_images
    inputs = {name: torch.from_numpy(value) for name, value in prompt.items() if name != "image_token_counts"}
    if images:
        pixels_IVCHW = exported.pixels(images)
        described = select_tokens(exported.engine.encode(pixels_IVCHW), counts)
        inputs["pixel_values"] = torch.from_numpy(pixels_IVCHW)
    else:
        del inputs["image_positions"]
    if not session.config.num_query_tokens:
        inputs = {name: value for name, value in inputs.items() if name not in ("query_positions", "question_ids")}
    found_BV, _ = exported.engine.decode({**prompt, **described}, exported.engine.empty_cache(1))
    expected_BTV = session.model(**inputs, logits_to_keep=1).logits
    return expected_BTV[0, -1].float().numpy(), found_BV[0]

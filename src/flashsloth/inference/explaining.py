"""Reading an answer once more, to say where it comes from."""

from collections.abc import Sequence
from typing import Any

import torch

from .attention import attention_maps
from .explanation import Explanation, words_of
from .runtime import Runtime


@torch.inference_mode()
def explain_answer(
    session: Runtime,
    images: Sequence[Any],
    messages: Sequence[dict[str, Any]],
    answer: str,
    visual_tokens: int | Sequence[int] | None = None,
) -> Explanation:
    """What the model attends to when it gives an answer, whoever gave it.

    Args:
        images: as in `FlashSloth.ask`; at least one.
        messages: chat up to the question, as `apply_chat_template` takes it, `{"type": "image"}` parts without source.
        answer: text.
        visual_tokens: as in `FlashSloth.ask`.

    Raises:
        ValueError, OSError: a bad image, none at all, or a prompt that does not fit the context.
    """
    if not images:
        raise ValueError("there is nothing to explain without an image")
    processor, config = session.processor, session.config
    counts = session.image_tokens(len(images), visual_tokens)
    loader = processor.image_processor
    loaded = [loader.fetch_images(image) for image in images]
    pixels_IVCHW = loader(loaded, return_tensors="pt")["pixel_values"]
    features_IPE = session.encode_views(pixels_IVCHW)

    def encode(chat: Sequence[dict[str, Any]], asks: bool) -> Any:
        options = {"return_tensors": "pt", "return_pixel_values": False, "visual_tokens": counts}
        return processor.apply_chat_template(
            list(chat), add_generation_prompt=asks, tokenize=True, return_dict=True, processor_kwargs=options
        ).to(session.device)

    prompt_1T = encode(messages, True)["input_ids"]
    answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    inputs = encode([*messages, answered], False)
    ids_1T, prompt_tokens = inputs["input_ids"], prompt_1T.shape[1]
    if ids_1T.shape[1] <= prompt_tokens or not torch.equal(ids_1T[:, :prompt_tokens], prompt_1T):
        raise ValueError(
            f"the chat template of {session.name} writes an answered question otherwise than an open one, so that the "
            "answer cannot be told from the prompt; give it add_generation_prompt"
        )
    if ids_1T.shape[1] > (context := config.text_config.max_position_embeddings):
        raise ValueError(f"question and answer have {ids_1T.shape[1]} tokens, {session.name} a context of {context}")
    with session.readable_model() as model:
        maps = attention_maps(model, features_IPE, counts, dict(inputs), prompt_tokens)
    tiles = config.view_grid or (1, 1)
    return Explanation(
        question=processor.tokenizer.decode(maps.question_ids).strip(),
        answer=answer,
        images=tuple(loaded),
        rectangles=tuple(tuple(loader.view_rectangles(image.size)) for image in loaded),
        cells=(config.grid_height * tiles[0], config.grid_width * tiles[1]),
        maps=maps,
        question_words=words_of(processor.tokenizer, maps.question_ids),
        answer_words=words_of(processor.tokenizer, maps.answer_ids),
        visual_tokens=sum(counts or [config.num_image_tokens] * len(loaded)),
    )

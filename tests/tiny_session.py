"""A tiny random model with a character tokenizer, saved as an ordinary folder, and sample images."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashsloth import FlashSlothProcessor
from tiny_models import EOS, IMAGE, PAD, QUERY, VOCABULARY, tiny_model

SPECIAL = {"<pad>": PAD, "</s>": EOS, "<image>": IMAGE, "<learnable>": QUERY}
TEMPLATE = (
    "{%- for message in messages -%}{%- if message.role == 'user' -%}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}{{ image_token }}{%- endif -%}{%- endfor -%}"
    "Q:{{ question_marker }}"
    "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}"
    "{{ query_token }}"
    "{%- else -%}"
    "A:{% generation %}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}{{ eos_token }}"
    "{% endgeneration %}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}A:{%- endif -%}"
)


def character_tokenizer(without: str = "\t\r\x0b\x0c^`~|{}@") -> PreTrainedTokenizerFast:
    """One token per character; what does not fit into the vocabulary becomes padding."""
    characters = [c for c in string.printable if c not in without][: VOCABULARY - len(SPECIAL)]
    vocabulary = SPECIAL | {character: len(SPECIAL) + index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<learnable>"]})
    return fast


def tiny_folder(
    folder: Path, decoder: str = "phi", tokenizer: PreTrainedTokenizerFast | None = None, **overrides
) -> Path:
    """Saves a model and its processor; the tokenizer must have the ids of `character_tokenizer`'s special tokens."""
    model = tiny_model(decoder, **overrides)
    # Characters only: the answer of a random model must survive decoding and encoding.
    model.generation_config.suppress_tokens = [PAD, EOS, IMAGE, QUERY]
    model.save_pretrained(folder)
    processor = FlashSlothProcessor.from_config(
        model.config, tokenizer or character_tokenizer(), chat_template=TEMPLATE
    )
    processor.save_pretrained(folder)
    return folder


def noise_image(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A random RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)

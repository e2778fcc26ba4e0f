"""Tiny random models: every decoder family and every encoder family, small enough for a test."""

import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolLM3Config,
)

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration
from flashsloth.model.conv_stem import ConvStemVisionConfig

VOCABULARY = 96
PAD, EOS, IMAGE, QUERY = 0, 1, 2, 3
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": EOS,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}

DECODERS: dict[str, PreTrainedConfig] = {
    "phi": PhiConfig(**_TEXT, partial_rotary_factor=0.5, resid_pdrop=0.0, embd_pdrop=0.0),
    "llama": LlamaConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
    "smollm3": SmolLM3Config(**_GROUPED, no_rope_layers=[1, 1, 0]),
}
ENCODERS: dict[str, PreTrainedConfig] = {
    "siglip": SiglipVisionConfig(**_VISION, intermediate_size=40),
    "siglip2": Siglip2VisionConfig(
        **{key: value for key, value in _VISION.items() if key != "image_size"}, intermediate_size=40, num_patches=36
    ),
    "clip": CLIPVisionConfig(**_VISION, intermediate_size=40),
    "dinov2": Dinov2Config(**_VISION, mlp_ratio=2),
    "conv_stem": ConvStemVisionConfig(**_VISION, intermediate_size=40, stem_widths=[8, 24], stem_strides=[2, 2]),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**_VISION, mlp_ratio=2, num_register_tokens=2),
}


def tiny_config(decoder: str = "phi", encoder: str = "siglip", **overrides) -> FlashSlothConfig:
    """A configuration of two known families; sizes as small as the wiring allows."""
    settings = {
        "image_token_id": IMAGE,
        "query_token_id": QUERY,
        "num_query_tokens": 2,
        "embedded_query_layer": 1,
        "embedded_query_hidden_size": 12,
        "embedded_query_num_heads": 4,
        **overrides,
    }
    return FlashSlothConfig(
        vision_config=ENCODERS[encoder].to_dict(), text_config=DECODERS[decoder].to_dict(), **settings
    )


def tiny_model(decoder: str = "phi", encoder: str = "siglip", **overrides) -> FlashSlothForConditionalGeneration:
    """A random model in evaluation mode whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    model = FlashSlothForConditionalGeneration(tiny_config(decoder, encoder, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.eos_token_id = None  # random weights: never stop early
    return model.eval()


def build_rows(
    config: FlashSlothConfig,
    rows: list[list[tuple[int, int, int]]],
    *,
    padding_side: str = "left",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch without a tokenizer. Each row is a list of turns (images, question tokens, answer tokens)."""
    encoded = []
    for index, turns in enumerate(rows):
        generator = torch.Generator().manual_seed(seed + index)

        def words(count: int, generator: torch.Generator = generator) -> list[int]:
            return torch.randint(10, VOCABULARY, (count,), generator=generator).tolist()

        ids, questions, images, queries = [], [], [], []
        for turn, (num_images, num_question, num_answer) in enumerate(turns, start=1):
            head = words(2)
            ids += head
            questions += [0] * len(head)
            for _ in range(num_images):
                images.append(len(ids))
                ids += [IMAGE] * config.num_image_tokens
                questions += [0] * config.num_image_tokens
            ids += words(num_question)
            questions += [turn] * num_question
            queries.append(len(ids))
            ids += [QUERY] * config.num_query_tokens
            questions += [0] * config.num_query_tokens
            tail = words(1 + num_answer)
            ids += tail
            questions += [0] * len(tail)
        encoded.append((ids, questions, images, queries))
    longest = max(len(ids) for ids, *_ in encoded)
    most_images = max(len(images) for _, _, images, _ in encoded)
    most_queries = max(len(queries) for *_, queries in encoded)
    batch = {
        "input_ids": torch.full((len(rows), longest), PAD),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "question_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "image_positions": torch.full((len(rows), most_images), -1),
        "query_positions": torch.full((len(rows), most_queries), -1),
    }
    for row, (ids, questions, images, queries) in enumerate(encoded):
        offset = longest - len(ids) if padding_side == "left" else 0
        span = slice(offset, offset + len(ids))
        batch["input_ids"][row, span] = torch.tensor(ids)
        batch["attention_mask"][row, span] = 1
        batch["question_ids"][row, span] = torch.tensor(questions)
        batch["image_positions"][row, : len(images)] = torch.tensor(images, dtype=torch.long) + offset
        batch["query_positions"][row, : len(queries)] = torch.tensor(queries, dtype=torch.long) + offset
    if most_images == 0:
        del batch["image_positions"]
    total = sum(turn[0] for turns in rows for turn in turns)
    if total:
        generator = torch.Generator().manual_seed(seed + 1000)
        shape = (total, config.num_views, 3, config.image_height, config.image_width)
        batch["pixel_values"] = torch.randn(shape, generator=generator)
    return batch

"""Conversion between the authors' released checkpoints and ordinary FlashSloth folders, both ways and exact.

Weights are streamed shard by shard. The only tensor whose values change is that of the learned query tokens: the
authors' code adds the embedding of one token to them at every forward, here it is folded in once.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import AddedToken

from ..model.configuration_flashsloth import FlashSlothConfig
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from .files import read_json, write_json
from .folder import TensorFolder, check_destination, size_of, write_folder
from .official_format import (
    EMBEDDING,
    OFFICIAL_FACTS,
    PREFIXES,
    QUERY_TOKENS,
    config_from_official,
    config_to_official,
    is_official,
    to_ours,
    to_theirs,
)
from .pretrained import DTYPES, load_config, load_tokenizer, reading
from .untrusted import INDEX, check_folder

logger = logging.getLogger(__name__)

# What a converted folder remembers of the authors' one, for the way back.
RECORD = "official_checkpoint.json"
RECORD_VERSION = 1
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

Progress = Callable[[int, int], None]


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    to_official: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str = "2GB",
    tokenizer: str | os.PathLike | None = None,
    vision_num_attention_heads: int | None = None,
    image_size: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint folder of the authors' format to an ordinary FlashSloth folder, or back.

    A folder that already is in the wanted format is copied as it is. `destination` appears only when it is complete.

    Args:
        source: folder with config.json and safetensors (one file or shards).
        destination: folder to make.
        to_official: convert from ours to the authors' format.
        overwrite: replace a destination that is not empty.
        max_shard_size: of the files written, in bytes or like "2GB"; bounds the memory that is used.
        tokenizer: folder with the tokenizer when `source` has none.
        vision_num_attention_heads: of the encoder; default one per 72 channels, as in SigLIP so400m.
        image_size: side in pixels of the encoder's input; default 384.
        progress: called with the bytes written so far and in all.

    Returns:
        `destination`.

    Raises:
        ValueError: the source cannot be converted (every missing, unexpected and misshapen tensor is named), or the
            destination exists.
        OSError: writing failed, e.g. the disk is full; nothing is left behind.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder.")
    check_folder(source)
    config = read_json(source / "config.json")
    ours = config.get("model_type") == FlashSlothConfig.model_type
    if not ours and not is_official(config):
        raise ValueError(
            f"{source / 'config.json'} is neither of FlashSloth nor of an authors' checkpoint: model_type is "
            f"{config.get('model_type')!r}, architectures {config.get('architectures')!r}."
        )
    if ours != to_official and destination.resolve() == source.resolve():
        logger.info("%s already is in the wanted format.", source)
        return destination
    check_destination(source, destination, overwrite)
    tensors = TensorFolder(source)
    if ours != to_official:
        logger.info("%s already is in the wanted format; copying it.", source)
        return write_folder(destination, overwrite, lambda folder: _copy(source, folder), size_of(source))
    plan: _Plan
    with reading(source):
        if to_official:
            plan = _ToOfficial(source, tensors)
        else:
            plan = _FromOfficial(source, tensors, config, tokenizer, vision_num_attention_heads, image_size)

    def write(folder: Path) -> None:
        _write_weights(folder, plan, max_shard_size, progress)
        with reading(source):
            plan.write_settings(folder)

    return write_folder(destination, overwrite, write, plan.num_bytes)


class _Plan:
    """What is written: `layout` as meta tensors by target name, `read` gives one for real."""

    layout: dict[str, Tensor]
    names: dict[str, str]

    def __init__(self, source: Path, tensors: TensorFolder) -> None:
        self.source, self.tensors = source, tensors

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.layout.values())

    def read(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def write_settings(self, folder: Path) -> None:
        raise NotImplementedError

    def _lay_out(self, changed_dtypes: Mapping[str, torch.dtype]) -> None:
        self.layout = {
            name: torch.empty(
                self.tensors.shapes[read], dtype=changed_dtypes.get(name, self.tensors.dtypes[read]), device="meta"
            )
            for name, read in self.names.items()
        }


class _FromOfficial(_Plan):
    def __init__(
        self,
        source: Path,
        tensors: TensorFolder,
        official: dict[str, Any],
        tokenizer: str | os.PathLike | None,
        vision_num_attention_heads: int | None,
        image_size: int | None,
    ) -> None:
        super().__init__(source, tensors)
        self.official = official
        self.config = config_from_official(
            official, tensors.shapes, vision_num_attention_heads=vision_num_attention_heads, image_size=image_size
        )
        expected = _expected_shapes(self.config)
        self.names = {to_ours(name) or name: name for name in tensors.shapes}
        _account(
            source,
            {name: tensors.shapes[name] for name in self.names.values()},
            {to_theirs(name) or name: shape for name, shape in expected.items()},
        )
        self.names = {name: self.names[name] for name in expected}
        self.folded_name = PREFIXES[QUERY_TOKENS]
        self.tokenizer_folder = Path(tokenizer) if tokenizer else source
        self.tokenizer = _load_tokenizer(self.tokenizer_folder, self.config)
        self.inexact: list[tuple[int, float, float, float]] = []
        # float32 holds the sum of two float16 numbers but for rare last bits; those are recorded.
        self._lay_out({self.folded_name: torch.float32})

    def read(self, name: str) -> Tensor:
        if name != self.folded_name:
            return super().read(name)
        queries, embedding = self.tensors[QUERY_TOKENS], _folded_embedding(self.tensors, EMBEDDING)
        folded = queries.float() + embedding.float()
        lost = (folded - embedding.float()).to(queries.dtype) != queries
        self.inexact = [
            (index, folded.flatten()[index].item(), embedding.expand_as(queries).flatten()[index].item(), value)
            for index, value in zip(lost.flatten().nonzero().flatten().tolist(), queries[lost].tolist(), strict=True)
        ]
        self.query_dtype = queries.dtype
        return folded

    def write_settings(self, folder: Path) -> None:
        self.config.architectures = [FlashSlothForConditionalGeneration.__name__]
        self.config.dtype = self.tensors.dtypes[EMBEDDING]
        self.config.save_pretrained(folder)
        facts = OFFICIAL_FACTS
        GenerationConfig(
            bos_token_id=facts["bos_token_id"],
            eos_token_id=facts["eos_token_id"],
            pad_token_id=facts["pad_token_id"],
        ).save_pretrained(folder)
        record: dict[str, Any] = {
            "version": RECORD_VERSION,
            "config": self.official,
            "query_tokens": {"dtype": _dtype_name(self.query_dtype), "inexact": self.inexact},
        }
        if (self.source / "generation_config.json").is_file():
            record["generation_config"] = read_json(self.source / "generation_config.json")
        if self.tokenizer is not None:
            files = [self.tokenizer_folder / name for name in TOKENIZER_SETTINGS]
            record["tokenizer_settings"] = {file.name: read_json(file) for file in files if file.is_file()}
            _build_processor(self.config, self.tokenizer).save_pretrained(folder)
        write_json(folder / RECORD, record)


class _ToOfficial(_Plan):
    def __init__(self, source: Path, tensors: TensorFolder) -> None:
        super().__init__(source, tensors)
        self.config = load_config(source)
        self.record = _read_record(source)
        stored = {to_ours(to_theirs(name) or "") or name: name for name in tensors.shapes}
        self.embedding_name = stored.get(to_ours(EMBEDDING) or "", "")
        dtype = tensors.dtypes.get(self.embedding_name, torch.float32)
        self.official = config_to_official(self.config, self.record.get("config", {}), _dtype_name(dtype))
        expected = _expected_shapes(self.config)
        _account(source, {name: tensors.shapes[read] for name, read in stored.items()}, expected)
        self.names = {to_theirs(name) or name: stored[name] for name in expected}
        recorded = self.record.get("query_tokens", {})
        self.query_dtype = DTYPES.get(recorded.get("dtype"), dtype)
        num_queries = math.prod(tensors.shapes[self.names[QUERY_TOKENS]])
        self.inexact = [
            (index, float(folded), float(embedding), float(value))
            for index, folded, embedding, value in recorded.get("inexact", [])
            if 0 <= index < num_queries
        ]
        self._lay_out({QUERY_TOKENS: self.query_dtype})

    def read(self, name: str) -> Tensor:
        if name != QUERY_TOKENS:
            return super().read(name)
        folded = super().read(name).float()
        embedding = _folded_embedding(self.tensors, self.embedding_name).float().expand_as(folded)
        queries = (folded - embedding).to(self.query_dtype)
        for index, was_folded, was_embedding, value in self.inexact:
            # trained further, the recorded value is no longer the answer
            if folded.flatten()[index].item() == was_folded and embedding.flatten()[index].item() == was_embedding:
                queries.view(-1)[index] = value
        return queries

    def write_settings(self, folder: Path) -> None:
        write_json(folder / "config.json", self.official)
        facts = OFFICIAL_FACTS
        generation = {"bos_token_id": facts["bos_token_id"], "eos_token_id": self.official["eos_token_id"]}
        write_json(folder / "generation_config.json", self.record.get("generation_config", generation))
        if (self.source / "tokenizer.json").is_file():
            _write_official_tokenizer(self.source, folder, self.record.get("tokenizer_settings", {}))


def _read_record(folder: Path) -> dict[str, Any]:
    """What the folder remembers of the authors' one; {} where it was never one."""
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    for key in ("config", "generation_config", "query_tokens", "tokenizer_settings"):
        if not isinstance(record.get(key, {}), dict):
            raise ValueError(f"{folder / RECORD}: {key} is {record[key]!r}, not a JSON object")
    # they become the names of files
    if unknown := sorted(record.get("tokenizer_settings", {}).keys() - set(TOKENIZER_SETTINGS)):
        raise ValueError(f"{folder / RECORD}: {unknown[0]!r} is no file of tokenizer settings")
    return record


def _expected_shapes(config: FlashSlothConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _account(source: Path, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"missing {name}" for name in expected.keys() - stored.keys()]
    problems += [f"unexpected {name}" for name in stored.keys() - expected.keys()]
    problems += [
        f"misshapen {name}: {list(stored[name])}, expected {list(expected[name])}"
        for name in stored.keys() & expected.keys()
        if stored[name] != expected[name]
    ]
    if problems:
        raise ValueError(f"{source} does not hold the tensors of its model: " + "; ".join(sorted(problems)) + ".")


def _folded_embedding(tensors: TensorFolder, name: str) -> Tensor:
    """Embedding (D,) that the authors' code adds to each learned query token."""
    return tensors[name][OFFICIAL_FACTS["folded_token_id"]].clone()


def _load_tokenizer(folder: Path, config: FlashSlothConfig) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        logger.warning("%s has no tokenizer: the converted folder gets no processor either.", folder)
        return None
    tokenizer = load_tokenizer(folder)
    facts = OFFICIAL_FACTS
    for role in ("query", "eos", "image"):
        token, token_id = facts[f"{role}_token"], facts[f"{role}_token_id"]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)
        found = tokenizer.convert_tokens_to_ids(token)
        if found != token_id:
            raise ValueError(f"The tokenizer in {folder} gives {token} the id {found}, the weights expect {token_id}.")
    tokenizer.eos_token = facts["eos_token"]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(facts["pad_token_id"])
    # decoding gives back what was generated, spaces before punctuation included
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    return tokenizer


def _build_processor(config: FlashSlothConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    from ..model.processing_flashsloth import FlashSlothProcessor

    return FlashSlothProcessor.from_config(config, tokenizer)


def _write_official_tokenizer(source: Path, folder: Path, settings: Mapping[str, dict[str, Any]]) -> None:
    """The tokenizer without the image placeholder, which the authors' vocabulary lacks."""
    image_token = OFFICIAL_FACTS["image_token"]
    content = read_json(source / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != image_token]
    # the authors' releases of tokenizers read merges as "a b" only
    bpe = content["model"]
    bpe["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    bpe.pop("ignore_merges", None)
    write_json(folder / "tokenizer.json", content)
    if not settings:
        ours = read_json(source / "tokenizer_config.json")
        dropped = ("processor_class", "extra_special_tokens", "backend", "is_local", "added_tokens_decoder")
        plain = {key: value for key, value in ours.items() if key not in dropped}
        plain["tokenizer_class"] = "PreTrainedTokenizerFast"
        plain["additional_special_tokens"] = [OFFICIAL_FACTS["query_token"]]
        settings = {"tokenizer_config.json": plain}
    for name, value in settings.items():
        write_json(folder / name, value)


def _write_weights(folder: Path, plan: _Plan, max_shard_size: int | str, progress: Progress | None) -> None:
    split = split_torch_state_dict_into_shards(plan.layout, max_shard_size=max_shard_size)
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard = {name: plan.read(name).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        done += sum(tensor.nbytes for tensor in shard.values())
        del shard
        if progress is not None:
            progress(done, plan.num_bytes)
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


__all__ = ["convert_checkpoint"]

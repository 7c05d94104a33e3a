"""A GGUF file to a directory in HuggingFace format: config, dequantized weights and tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rave_jax.checkpoint.gguf_file import GgufFile
from rave_jax.checkpoint.gguf_tokenizer import tokenizer_files
from rave_jax.checkpoint.hf_export import DTYPE_NAMES, MAX_SHARD_BYTES, divide, write_index
from rave_jax.checkpoint.hf_files import CONFIG, GENERATION_CONFIG
from rave_jax.checkpoint.safetensors_file import CheckpointError, Planned, write_header, write_tensor
from rave_jax.checkpoint.verify import refusal
from rave_jax.checkpoint.written_whole import written_whole
from rave_jax.config import ConfigError
from rave_jax.families import FAMILIES, Family
from rave_jax.families.gguf import WHERE, GgufTensor
from rave_jax.families.hf import integer, need, only
from rave_jax.typing import NpArray

ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
"""Ids that end an answer: of a text, and of a turn."""

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Item(NamedTuple):
    """A tensor to be written, and which of the file's it is."""

    planned: Planned
    tensor: GgufTensor


def write_hf(file: GgufFile, destination: Path, dtype: str = "float32", max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Write the directory, whole or not at all.

    Args:
        file: the GGUF file.
        destination: not there yet, or an empty directory.
        dtype: number type of the weights, "float32" or "bfloat16".
        max_shard_bytes: a weight file takes no more, unless one tensor alone does.

    Returns:
        how many weight files there are.

    Raises:
        CheckpointError: the model is of another architecture, metadata or tensors are missing or unknown, or the
            destination is not free.
    """
    try:
        config = hf_config(file)
        family = _family(file)
        assert family.gguf is not None
        tokenizer, stated = tokenizer_files(file.metadata, family.gguf)
        rows, tokens = config["vocab_size"], tokenizer.get_vocab_size()
        if tokens > rows:
            raise ConfigError(f"{WHERE}: 'tokenizer.ggml.tokens' has {tokens} tokens, expected at most {rows}")
        items = planned(file, family, config, np.dtype(DTYPE_NAMES[dtype]))
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    files = divide(items, max_shard_bytes)
    small = {
        CONFIG: {**config, "dtype": dtype},
        GENERATION_CONFIG: {key: config[key] for key in IDS if key in config},
        "tokenizer_config.json": {**stated, "model_max_length": config["max_position_embeddings"]},
    }
    with written_whole(destination, sum(item.planned.nbytes for item in items)) as folder:
        if folder is None:
            return len(files)
        for name, group in files.items():
            _write(folder / name, group, file)
        write_index(folder, files)
        for name, data in small.items():
            (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(str(folder / "tokenizer.json"))
    return len(files)


def _family(file: GgufFile) -> Family:
    families = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None}
    key = "general.architecture"
    only({key: need(file.metadata, key, WHERE)}, key, tuple(families), WHERE)
    return families[file.metadata[key]]


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The HF config of a file.

    Raises:
        ConfigError: the model is of another architecture, or its metadata are missing or ask for what is not computed.
    """
    gguf = _family(file).gguf
    assert gguf is not None
    config = gguf.config(file.metadata, file.tensors)
    most = config["vocab_size"] - 1
    stated = [key for key in ENDS if file.metadata.get(key) is not None]
    ends = list(dict.fromkeys(integer(file.metadata, key, most, least=0, where=WHERE) for key in stated))
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    for ours, theirs in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        key = f"tokenizer.ggml.{theirs}"
        if file.metadata.get(key) is not None:
            config[ours] = integer(file.metadata, key, most, least=0, where=WHERE)
    return config


def planned(file: GgufFile, family: Family, config: Mapping[str, Any], dtype: np.dtype) -> list[Item]:
    """The tensors of the directory, each with its source.

    Raises:
        CheckpointError: names every tensor that is missing, unknown or of another shape.
    """
    assert family.gguf is not None
    model = family.parse(config)
    sources = family.gguf.tensors(model)
    items, problems, known = [], [], set()
    for rule in family.tensors(model):
        source = sources[rule.hf_key]
        known.add(source.name)
        found = file.tensors.get(source.name)
        if found is None:
            problems.append(f"{source.name}: missing")
        elif found.shape != rule.shape:
            problems.append(f"{source.name}: its shape is {list(found.shape)}, expected {list(rule.shape)}")
        items.append(Item(Planned(rule.hf_key, dtype, rule.shape), source))
    for name in file.tensors:
        if name not in known:
            why = "; take the release in safetensors, whose config states it" if name.startswith("rope_") else ""
            problems.append(f"{name}: no parameter of the model belongs to it{why}")
    if problems:
        raise CheckpointError(refusal(file.path, problems))
    return items


def _write(path: Path, items: list[Item], file: GgufFile) -> None:
    with path.open("wb") as opened:
        write_header(opened, [item.planned for item in items])
        for planned, tensor in items:
            numbers = file.tensors[tensor.name].read()
            numbers = by_halves(numbers, tensor.heads) if tensor.heads else numbers
            write_tensor(opened, numbers.astype(planned.dtype, copy=False))
        opened.flush()
        os.fsync(opened.fileno())


def by_halves(weight: NpArray, heads: int) -> NpArray:
    """The rows of a projection in the order of HuggingFace: of each head first those that turn as first of their pair.

    llama.cpp rotates neighbouring rows with each other, so its files hold the pairs side by side.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)

"""A vision tower and a text model, each a HuggingFace directory, as one HuggingFace directory of a model with pictures.

The numbers of both are copied as they are stored. What joins them has no numbers yet and begins fresh from a seed, as
`Vlm` makes it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from rave_jax.checkpoint.explain import check_quantization
from rave_jax.checkpoint.hf_export import MAX_SHARD_BYTES
from rave_jax.checkpoint.hf_files import CONFIG, INDEX, SINGLE, carried_files, hf_config, read_json, read_weights
from rave_jax.checkpoint.safetensors_file import (
    DTYPES,
    CheckpointError,
    Planned,
    Slice,
    Stored,
    read_into,
    write_header,
    write_tensor,
)
from rave_jax.checkpoint.target import fresh_parameters
from rave_jax.checkpoint.verify import refusal
from rave_jax.checkpoint.written_whole import written_whole
from rave_jax.config import ConfigError
from rave_jax.families import FAMILIES, Family
from rave_jax.families.base import TensorRule
from rave_jax.families.joining import Join
from rave_jax.models.config import ModelOptions
from rave_jax.typing import NpArray

TOKENIZER, TOKENIZER_CONFIG, PREPROCESSOR = "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"
LEFT = ("config.json", "README.md", "processor_config.json", "chat_template.json", "chat_template.jinja", PREPROCESSOR)
"""Files of the text model's directory that are not carried along: the joined model has its own."""


class Joined(NamedTuple):
    """What was made of two checkpoints.

    Fields:
        family: of the joined model.
        fresh: keys of the tensors that begin fresh.
        left_out: keys of the tower's checkpoint that it does not have.
    """

    family: str
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]


def join(tower: Path, text: Path, destination: Path, seed: int = 0, max_shard_bytes: int = MAX_SHARD_BYTES) -> Joined:
    """Write the joined model.

    Args:
        tower: HuggingFace directory of a vision tower, with its preprocessor_config.json.
        text: HuggingFace directory of a text model, with its tokenizer.
        destination: a directory to make; it must not exist or must be empty.
        seed: of what joins them.
        max_shard_bytes: a file takes no more, unless one tensor alone does.

    Raises:
        CheckpointError: the two make no model that we compute, a tensor is missing, of another shape or one too many,
            or the destination cannot be written. Lists everything; nothing is left there.
    """
    family, how = _joiner()
    joined = _config(tower, text, how)
    try:
        config = family.parse(joined)
    except ConfigError as error:
        raise CheckpointError(f"{tower} and {text} make no {family.model_type} model: {error}") from error
    rules = family.tensors(config)
    sources, left_out = _sources(rules, how, tower, text)
    dtype = DTYPES[next(sources[rule.hf_key] for rule in rules if rule.path == "embed.weight").dtype]
    fresh = [rule for rule in rules if rule.hf_key not in sources]
    options = ModelOptions(param_dtype="float32")
    place = SingleDeviceSharding(jax.local_devices()[0])
    places: dict[str, Sharding] = {rule.path: place for rule in fresh}
    values = fresh_parameters(config, options, jax.random.key(seed), places)
    made = {rule.hf_key: np.asarray(values[rule.path], np.float32).astype(dtype) for rule in fresh}
    types = {key: DTYPES[stored.dtype] for key, stored in sources.items()} | dict.fromkeys(made, dtype)
    planned = [Planned(rule.hf_key, types[rule.hf_key], rule.shape) for rule in rules]
    with written_whole(destination, sum(one.nbytes for one in planned)) as folder:
        if folder is not None:
            _write_weights(folder, planned, sources, made, max_shard_bytes)
            _write_files(folder, joined, how, tower, text, str(dtype))
    return Joined(family.model_type, tuple(made), tuple(left_out))


def _joiner() -> tuple[Family, Join]:
    return next((family, family.join) for family in FAMILIES.values() if family.join is not None)


def _config(tower: Path, text: Path, how: Join) -> dict[str, Any]:
    """The HF config of the joined model."""
    stated = {}
    for folder in (tower, text):
        stated[folder] = hf_config(folder)
        try:
            check_quantization(stated[folder])
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    try:
        return how.config(stated[tower], stated[text], _token_ids(text, how.tokens))
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{tower} and {text}: {error}") from error


def _token_ids(text: Path, tokens: Iterable[str]) -> dict[str, int]:
    """Ids of special tokens in the tokenizer of the text model."""
    if not (text / TOKENIZER).exists():
        raise CheckpointError(f"{text / TOKENIZER}: no such file; it has to name the special tokens of the text model")
    added = read_json(text / TOKENIZER).get("added_tokens") or []
    ids = {entry["content"]: entry["id"] for entry in added}
    missing = [token for token in tokens if token not in ids]
    if missing:
        raise CheckpointError(
            f"{text / TOKENIZER}: has no special tokens {', '.join(missing)}, which the chat format of the joined "
            "model needs; take a text model whose tokenizer has them"
        )
    return ids


def _sources(rules: Iterable[TensorRule], how: Join, tower: Path, text: Path) -> tuple[dict[str, Stored], list[str]]:
    """Where the numbers of each tensor are stored, by its key in the joined checkpoint; and what is left out."""
    sources: dict[str, Stored] = {}
    left_out: list[str] = []
    rules = list(rules)
    for folder, prefix, allowed in ((tower, how.tower, how.left_out), (text, how.text, ())):
        weights = read_weights(folder)
        problems, found = list(weights.problems), dict(weights.tensors)
        for rule in (rule for rule in rules if rule.hf_key.startswith(prefix)):
            key = rule.hf_key.removeprefix(prefix)
            stored = found.pop(key, None)
            if stored is None:
                problems.append(f"{key}: missing (not in {' or '.join(weights.files[:4])})")
            elif stored.shape != rule.shape:
                problems.append(f"{key} ({stored.file.name}): shape {list(stored.shape)}, expected {list(rule.shape)}")
            elif stored.dtype not in DTYPES:
                problems.append(
                    f"{key} ({stored.file.name}): number type {stored.dtype}, expected {' or '.join(DTYPES)}"
                )
            else:
                sources[rule.hf_key] = stored
        tied = {"lm_head.weight"} if not any(rule.path == "lm_head.weight" for rule in rules) else set()
        for key, stored in found.items():
            if key.startswith(allowed) if allowed else key in tied:
                left_out.append(key)
            else:
                problems.append(f"{key} ({stored.file.name}): no parameter of the joined model belongs to it")
        if problems:
            raise CheckpointError(refusal(folder, problems))
    return sources, left_out


def _write_weights(
    folder: Path, planned: list[Planned], sources: dict[str, Stored], made: dict[str, NpArray], limit: int
) -> None:
    groups: list[list[Planned]] = [[]]
    for one in planned:
        if groups[-1] and sum(p.nbytes for p in groups[-1]) + one.nbytes > limit:
            groups.append([])
        groups[-1].append(one)
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for name, group in zip(names, groups, strict=True):
        # Wide types first: then every tensor starts at a multiple of its number's size.
        ordered = sorted(group, key=lambda one: -one.dtype.itemsize)
        with (folder / name).open("wb") as file:
            write_header(file, ordered)
            for one in ordered:
                write_tensor(file, made[one.key] if one.key in made else _numbers(sources[one.key], one))
    if count > 1:
        where = {one.key: name for name, group in zip(names, groups, strict=True) for one in group}
        index = {"metadata": {"total_size": sum(p.nbytes for p in planned)}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _numbers(stored: Stored, one: Planned) -> NpArray:
    flat = np.empty(math.prod(one.shape), one.dtype)
    read_into(stored, flat.shape, [Slice(flat, (slice(0, flat.size),))])
    return flat.reshape(one.shape)


def _write_files(folder: Path, joined: dict[str, Any], how: Join, tower: Path, text: Path, dtype: str) -> None:
    """config.json, the tower's picture settings, and the text model's tokenizer with another chat template."""
    for file in carried_files(text):
        if file.name not in LEFT:
            shutil.copyfile(file, folder / file.name)
    if not (tower / PREPROCESSOR).exists():
        raise CheckpointError(f"{tower / PREPROCESSOR}: no such file; it says how the tower wants pictures")
    shutil.copyfile(tower / PREPROCESSOR, folder / PREPROCESSOR)
    settings = read_json(text / TOKENIZER_CONFIG) if (text / TOKENIZER_CONFIG).exists() else {}
    contents = {CONFIG: joined | {"dtype": dtype}, TOKENIZER_CONFIG: settings | {"chat_template": how.template}}
    for name, content in (contents | how.files(joined)).items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

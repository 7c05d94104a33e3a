"""A checkpoint in the format of a model's authors, with the directory of its tower, as a HuggingFace directory.

What the format is stands in the family (`families.base.Original`). Tensors are copied, each with its numbers and number
type as they are. Rows for the tokens that are added, and for padding, are the mean of the rows that are there: they are
no word, so their logits should stand out in no direction.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from rave_jax.checkpoint.hf_export import MAX_SHARD_BYTES, divide, write_index
from rave_jax.checkpoint.hf_files import CONFIG, GENERATION_CONFIG, Weights, hf_config, read_json, read_weights
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
from rave_jax.checkpoint.sentencepiece import sentencepiece_tokenizer
from rave_jax.checkpoint.verify import refusal
from rave_jax.checkpoint.written_whole import written_whole
from rave_jax.config import ConfigError
from rave_jax.families import family_for, original_of
from rave_jax.families.base import Original, TensorRule, TensorSource
from rave_jax.families.directory import processor_files, with_processor
from rave_jax.typing import NpArray

TOKENIZER, SENTENCEPIECE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
ROWS = ("embed.weight", "lm_head.weight")
"""Parameters with a row for each token."""


class Copy(NamedTuple):
    """A tensor to be written, and the one that it is copied from."""

    planned: Planned
    stored: Stored


def convert_original(source: Path, tower: Path | None, destination: Path) -> Path:
    """Write the HuggingFace directory.

    Args:
        source: the checkpoint.
        tower: directory of its tower, in HuggingFace format.
        destination: not there yet, or empty.

    Raises:
        CheckpointError: the source is in no such format, the tower is not given or not the one that it was trained
            with, a tensor is missing or of another shape, or the destination cannot be written.
    """
    stated = hf_config(source)
    original = original_of(stated)
    if original is None:
        found = stated.get("model_type")
        raise CheckpointError(
            f"{source / CONFIG}: 'model_type' is {found!r}: no checkpoint in the format of its authors that is known; "
            "`rave-jax convert from-hf` takes HuggingFace directories"
        )
    name = stated[original.tower_key]
    if tower is None:
        raise CheckpointError(
            f"{source / CONFIG}: {original.tower_key!r} is {name!r}, and the tower's weights are not in this "
            "directory: give the directory of that model (--tower)"
        )
    tokenizer, settings = _tokenizer(source, stated, original)
    first_free = tokenizer.get_vocab_size()
    try:
        rendered = original.config(stated, hf_config(tower), first_free)
        family = family_for(rendered)
        config = with_processor(family.parse(rendered), processor_files(tower))
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    weights, beside = read_weights(source), read_weights(tower)
    places = original.sources(config, weights.tensors, beside.tensors)
    copies = _copies(source, tower, family.tensors(config), places, original.ignored, weights, beside)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in original.tokens])
    files = divide(copies, MAX_SHARD_BYTES)
    with written_whole(destination, sum(copy.planned.nbytes for copy in copies)) as folder:
        if folder is not None:
            for file, items in files.items():
                _write(folder / file, items)
            write_index(folder, files)
            if (source / GENERATION_CONFIG).is_file():
                shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
            settings |= {"additional_special_tokens": [original.tokens[0]], "pad_token": original.tokens[-1]}
            texts = {CONFIG: rendered, TOKENIZER_CONFIG: settings, **original.files(config, stated)}
            for file, data in texts.items():
                (folder / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            (folder / "chat_template.jinja").write_text(original.template, encoding="utf-8")
            tokenizer.save(str(folder / TOKENIZER))
    return destination


def _tokenizer(source: Path, stated: Mapping[str, Any], original: Original) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of the checkpoint, with `<s>` before every text, and what tokenizer_config.json says of it."""
    file = source / TOKENIZER_CONFIG
    settings = read_json(file) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: expected an object")
    if (source / TOKENIZER).is_file():
        try:
            tokenizer = Tokenizer.from_file(str(source / TOKENIZER))
        except Exception as error:  # tokenizers raises no narrower kind
            raise CheckpointError(f"{source / TOKENIZER}: no tokenizer could be read: {error}") from error
    elif (source / SENTENCEPIECE).is_file():
        tokenizer = sentencepiece_tokenizer(source / SENTENCEPIECE, bool(settings.get("legacy", True)))
    else:
        raise CheckpointError(f"{source}: holds neither {TOKENIZER} nor {SENTENCEPIECE}, expected one of them")
    taken = [token for token in original.tokens if tokenizer.token_to_id(token) is not None]
    if taken:
        raise CheckpointError(f"{source}: the tokenizer has the token {taken[0]!r} already, expected to add it")
    begin, end = (tokenizer.id_to_token(stated.get(f"{name}_token_id", n)) for name, n in (("bos", 1), ("eos", 2)))
    if begin is None or end is None:
        raise CheckpointError(f"{source / CONFIG}: bos_token_id or eos_token_id is no token of the tokenizer")
    pair = [(begin, tokenizer.token_to_id(begin))]
    tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=pair)
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    longest = {"model_max_length": stated["max_position_embeddings"]} if "max_position_embeddings" in stated else {}
    return tokenizer, {**known, **longest, "clean_up_tokenization_spaces": False}


def _copies(
    source: Path,
    tower: Path,
    rules: tuple[TensorRule, ...],
    places: Mapping[str, TensorSource],
    ignored: re.Pattern[str],
    weights: Weights,
    beside: Weights,
) -> list[Copy]:
    """What is copied to make each tensor.

    Raises:
        CheckpointError: lists what is missing, left over or of another shape.
    """
    problems = [*weights.problems, *beside.problems]
    unused = {key: stored for key, stored in weights.tensors.items() if not ignored.fullmatch(key)}
    copies = []
    for rule in rules:
        place = places[rule.hf_key]
        stored = beside.tensors.get(place.key) if place.in_tower else unused.pop(place.key, None)
        if stored is None:
            problems.append(f"{place.key}: missing (not in {tower if place.in_tower else source})")
            continue
        where = f"{place.key} ({stored.file.name})"
        more = rule.path in ROWS and stored.shape[1:] == rule.shape[1:] and stored.shape[0] <= rule.shape[0]
        if stored.shape != rule.shape and not more:
            problems.append(f"{where}: its shape is {list(stored.shape)}, expected {list(rule.shape)}")
        elif stored.dtype not in DTYPES:
            problems.append(f"{where}: its number type is {stored.dtype}, expected {' or '.join(DTYPES)}")
        else:
            copies.append(Copy(Planned(rule.hf_key, DTYPES[stored.dtype], rule.shape), stored))
    problems += [f"{s.key} ({s.file.name}): no parameter of the model belongs to it" for s in unused.values()]
    if problems:
        raise CheckpointError(refusal(source, problems))
    return copies


def _write(path: Path, copies: list[Copy]) -> None:
    copies = sorted(copies, key=lambda copy: -copy.planned.dtype.itemsize)
    with path.open("wb") as file:
        write_header(file, [copy.planned for copy in copies])
        for planned, stored in copies:
            write_tensor(file, _with_rows(_read(stored), planned.shape))


def _read(stored: Stored) -> NpArray:
    value: Any = np.empty(stored.shape, DTYPES[stored.dtype])
    read_into(stored, stored.shape, [Slice(value, tuple(slice(0, n) for n in stored.shape))])
    return value


def _with_rows(value: NpArray, shape: tuple[int, ...]) -> NpArray:
    """The tensor with rows behind it, up to this shape."""
    more = shape[0] - len(value) if shape else 0
    if more == 0:
        return value
    mean = value.astype(np.float32).mean(axis=0).astype(value.dtype)
    return np.concatenate([value, np.tile(mean, (more, 1))])

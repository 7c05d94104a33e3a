"""A directory in HuggingFace format: its config, its tensors across files, and the small files that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rave_jax.checkpoint import explain
from rave_jax.checkpoint.kinds import ADAPTER_CONFIG, CONFIG, NATIVE, kind_of, what_is
from rave_jax.checkpoint.safetensors_file import CheckpointError, Stored, read_header
from rave_jax.files import read_text

GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SIDECAR = "rave_jax.safetensors"
SIDECAR_JSON = "rave_jax.json"
ADAPTER = "adapter_model.safetensors"
STATED_KEY = "rave_jax"
"""Key of config.json that says what transformers does not compute of a model."""
CARRIED = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")


class Weights(NamedTuple):
    """Every tensor of a directory.

    Fields:
        tensors: by the key as stored.
        files: names of the files they are in.
        problems: what is wrong, one line each, naming keys and files.
    """

    tensors: dict[str, Stored]
    files: tuple[str, ...]
    problems: list[str]


def is_peft(directory: Path) -> bool:
    """Is this the directory of a PEFT adapter, and of no whole model?"""
    return kind_of(directory) == "adapter"


def read_json(path: Path) -> Any:
    """The JSON of a file.

    Raises:
        CheckpointError: no regular file there, or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


def hf_config(directory: Path) -> dict[str, Any]:
    """The HF config of a directory.

    Raises:
        CheckpointError: no directory, no config.json in it, or that is not an object of JSON.
    """
    if is_peft(directory):
        raise CheckpointError(explain.peft_alone(directory))
    if not (directory / CONFIG).exists():
        raise CheckpointError(what_is(directory))
    explain.check_lfs(directory)
    if (directory / ADAPTER_CONFIG).is_file():
        raise CheckpointError(explain.peft_beside(directory))
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / CONFIG}: expected an object")
    return config


def generation_config(directory: Path) -> dict[str, Any]:
    """The settings of generation in a directory; {} where it has none.

    Raises:
        CheckpointError: the file is there and no object of JSON.
    """
    file = directory / GENERATION_CONFIG
    config = read_json(file) if file.exists() else {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected an object")
    return config


def index_of(directory: Path) -> dict[str, str] | None:
    """{key: file} of the index file, or None where the weights are one file (or none).

    Raises:
        CheckpointError: the index is not JSON or has no weight map.
    """
    # The order of transformers: one whole file wins over an index.
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        return None
    data = read_json(directory / INDEX)
    index = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
        raise CheckpointError(f"{directory / INDEX}: expected an object 'weight_map' of key to file name")
    if not index:
        raise CheckpointError(f"{directory / INDEX}: its 'weight_map' lists no tensors")
    return index


def has_weights(directory: Path) -> bool:
    """Is there at least one weight file that a read would use?"""
    index = index_of(directory)
    if index is None:
        return (directory / SINGLE).exists()
    return any((directory / name).exists() for name in set(index.values()))


def read_weights(directory: Path) -> Weights:
    """Every tensor of a directory, from the headers alone.

    Raises:
        CheckpointError: there are no safetensors weights at all.
    """
    index = index_of(directory)
    if index is None:
        if not (directory / SINGLE).exists():
            raise CheckpointError(explain.no_weights(directory))
        tensors, problems = read_header(directory / SINGLE)
        return Weights(tensors, (SINGLE,), problems)
    tensors, problems = {}, []
    names = tuple(sorted(set(index.values())))
    for name in names:
        listed = {key for key, file in index.items() if file == name}
        if Path(name).name != name or not (directory / name).exists():
            problems.append(
                f"{name}: no such file, but {INDEX} lists {len(listed)} tensors in it ({min(listed)} and so on): "
                "download the file"
            )
            continue
        found, wrong = read_header(directory / name)
        problems += wrong
        tensors |= found
        if not found and wrong:
            continue  # an unreadable header gives no keys
        problems += [
            f"{key} ({name}): listed in {INDEX}, but the file does not hold it" for key in sorted(listed - set(found))
        ]
        problems += [
            f"{key} ({name}): the file holds it, but {INDEX} does not list it there"
            for key in sorted(set(found) - listed)
        ]
    return Weights(tensors, names, problems)


def carried_files(directory: Path) -> list[Path]:
    """Config, tokenizer, processor and licence files: all that goes along with the weights unchanged."""
    found = {file for pattern in CARRIED for file in directory.glob(pattern)}
    ours = (SIDECAR_JSON, NATIVE)
    return sorted(f for f in found if f.is_file() and not f.name.endswith(".index.json") and f.name not in ours)

"""Where the weights of a run come from. Either way they are read from a HuggingFace-format directory."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.tiny import Tiny, tiny_config, write_tiny, write_tiny_files
from rave_jax.config import ConfigError, check_fields, require
from rave_jax.families.config import VlmConfig

# What a model directory holds beside its weights. A run keeps a copy, so that it can be read on its own.
SMALL_FILES = ("*.json", "*.txt", "*.jinja")
INDEX = "*.index.json"


@dataclass(frozen=True)
class FromHF:
    """Weights of a HuggingFace-format directory."""

    path: str = ""
    """Directory with config.json, tokenizer, processor settings and safetensors."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(bool(self.path), "init.path", self.path, "a directory in HuggingFace format")


def prepare(init: FromHF | Tiny, directory: Path) -> None:
    """Fill a run's model directory: config, tokenizer and processor files, and for `Tiny` the weights too.

    Called by one process of a job.

    Raises:
        ConfigError: there is no such HuggingFace directory.
        OSError: the run directory cannot be written.
    """
    if (directory / "config.json").exists():
        return
    # Made beside its place and moved there in one step: a killed process leaves no half-filled directory.
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(init, Tiny):
        write_tiny(partial, init)
    else:
        partial.mkdir(parents=True)
        write_small_files(init, partial)
    partial.rename(directory)


def write_small_files(init: FromHF | Tiny, folder: Path) -> None:
    """Write config, tokenizer and processor files of a model, without weights, into a folder that is there.

    Raises:
        ConfigError: there is no such HuggingFace directory.
        OSError: they cannot be read or written.
    """
    if isinstance(init, Tiny):
        write_tiny_files(folder, init)
        return
    source = source_of(init, folder)
    for pattern in SMALL_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not file.match(INDEX):
                shutil.copyfile(file, folder / file.name)


def model_config(init: FromHF | Tiny, directory: Path) -> VlmConfig:
    """The config of a run's model; nothing need have been written yet.

    Args:
        init: of the run's config.
        directory: the run's model directory, read where it is there.

    Raises:
        ConfigError: there is no such directory, or a model that we do not compute.
    """
    if (directory / "config.json").is_file():
        return load_config(directory)[0]
    return tiny_config(init) if isinstance(init, Tiny) else load_config(source_of(init, directory))[0]


def source_of(init: FromHF | Tiny, directory: Path) -> Path:
    """The HuggingFace directory with the weights of a run.

    Args:
        init: of the run's config.
        directory: the run's model directory.

    Raises:
        ConfigError: there is no such directory.
    """
    if isinstance(init, Tiny):
        return directory
    source = Path(init.path).expanduser()
    if not (source / "config.json").is_file():
        raise ConfigError(f"init.path is {init.path!r}, expected a directory that holds a config.json")
    return source

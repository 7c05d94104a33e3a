"""Whatever a path holds: a HuggingFace directory, a native checkpoint or a run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rave_jax.checkpoint.hf_files import hf_config
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.kinds import kind_of, other_config
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.checkpoint.sidecar import saved_options
from rave_jax.checkpoint.store import StoreError
from rave_jax.checkpoint.target import abstract_model
from rave_jax.config import ConfigError
from rave_jax.data.chat import SpecialTokens
from rave_jax.data.processor import Processor
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.training.directory import run_directory
from rave_jax.training.run import load_run


class Source(NamedTuple):
    """A model and where it came from.

    Fields:
        model: on all devices of this process.
        directory: with its config, tokenizer and processor files.
        mesh: where the parameters lie, None on a single device.
    """

    model: Vlm
    directory: Path
    mesh: Mesh | None


def is_run(path: Path) -> bool:
    """Is this the directory of a training run? If not, it holds the config of a model.

    Raises:
        ConfigError: it is neither; says what it is.
    """
    if kind_of(path) == "run":
        return True
    if other := other_config(path, hf_config(path)):
        raise CheckpointError(other)
    return False


def model_directory(path: Path) -> Path:
    """The directory with the model's config, tokenizer and processor files."""
    return run_directory(path).model if is_run(path) else path


def processor_of(path: Path, special_tokens_in_text: SpecialTokens | None = None) -> Processor:
    """The processor of a model: for a run, under the pixel limits it was trained with.

    Args:
        path: of any of the three kinds.
        special_tokens_in_text: what special tokens in messages are; None is as in the run's training, or else text.

    Raises:
        ConfigError: a file or key is missing.
    """
    if is_run(path):
        run = run_directory(path)
        config = run.read_config()
        special = special_tokens_in_text or config.data.special_tokens_in_text
        data = dataclasses.replace(config.data, special_tokens_in_text=special)
        return data.processor(run.model, config.model.layout)
    special = special_tokens_in_text or "text"
    return Processor.from_hf(path, layout=options_of(path).layout, special_tokens_in_text=special)


def options_of(path: Path) -> ModelOptions:
    """The options a model was trained or written with; the defaults where none are stated.

    Raises:
        ConfigError: they are not what we write.
    """
    if is_run(path):
        return run_directory(path).read_config().model
    return saved_options(path) or ModelOptions()


def load(
    path: Path, step: int | None = None, changes: Mapping[str, Any] | None = None, as_stored: bool = False
) -> Source:
    """The model that a path holds.

    Args:
        path: of any of the three kinds.
        step: of a run; None is the newest.
        changes: of the options it was trained or written with.
        as_stored: keep the stored number types rather than the options'.

    Raises:
        ConfigError: it cannot be read, or a step is asked of what has none.
    """
    if is_run(path):
        try:
            run = load_run(path, step=step)
        except StoreError as error:
            raise ConfigError(str(error)) from error
        return Source(_changed(run.model, changes or {}), model_directory(path), run.mesh)
    if step is not None:
        raise ConfigError(f"{path}: step {step} is asked for, but this is not a run directory")
    mesh = all_devices()
    options = dataclasses.replace(options_of(path), **(changes or {}))
    return Source(import_hf(path, options, mesh, dtypes="stored" if as_stored else "options"), path, mesh)


def all_devices() -> Mesh | None:
    """A mesh of all devices, None where there is one."""
    return make_mesh(MeshConfig()) if jax.device_count() > 1 else None


def _changed(model: Vlm, changes: Mapping[str, Any]) -> Vlm:
    """The same numbers under changed options (number types, backend), on the devices where they are."""
    if not changes:
        return model
    target = abstract_model(model.config, dataclasses.replace(model.options, **changes))
    values = named_parameters(model)
    cast = {path: values[path][...].astype(param.dtype) for path, param in named_parameters(target).items()}
    return with_values(target, cast)

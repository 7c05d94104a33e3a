"""A model from a path, of any kind: a HuggingFace directory, a native checkpoint or a run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from rave_jax.checkpoint.hf_files import hf_config
from rave_jax.checkpoint.hf_import import import_hf, load_config
from rave_jax.checkpoint.kinds import kind_of, other_config
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.checkpoint.sidecar import saved_options
from rave_jax.checkpoint.target import abstract_model
from rave_jax.config import ConfigError
from rave_jax.data.chat import SpecialTokens
from rave_jax.data.collate import round_up
from rave_jax.data.processor import Processor
from rave_jax.inference import Generator, SlotConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters, param_axes, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import row_ways
from rave_jax.parallel.sharding import named_sharding
from rave_jax.training.averages import Weights
from rave_jax.training.directory import run_directory
from rave_jax.training.run import load_run


class Source(NamedTuple):
    """A model and where it came from.

    Fields:
        model: its parameters lie on the mesh; on an abstract one they have no numbers.
        directory: with its config, tokenizer and processor files.
        mesh: a Mesh, an AbstractMesh where one was asked for, or None on a single device.
        step: of the run whose checkpoint it is; None where it is of none.
    """

    model: Vlm
    directory: Path
    mesh: Any
    step: int | None = None


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
    path: Path,
    step: int | None = None,
    changes: Mapping[str, Any] | None = None,
    as_stored: bool = False,
    *,
    options: ModelOptions | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    weights: Weights = "trained",
) -> Source:
    """The model that a path holds.

    Args:
        path: of any of the three kinds.
        step: of a run; None is the newest.
        changes: of the options it was trained or written with.
        as_stored: keep the stored number types rather than the options'.
        options: how to build it; None is as it was trained or written. Not for a run.
        mesh: where its parameters go; None is all devices. On an abstract one the model has shapes, number types and
            shardings, and no numbers: no weights are read, and there need be none.
        weights: of a run; those of the last step, or their average.

    Raises:
        ConfigError: it cannot be read, or a step is asked of what has none.
        StoreError: a checkpoint of a run cannot be read.
    """
    run = is_run(path)
    if step is not None and not run:
        raise ConfigError(f"{path}: step {step} is asked for, but this is not a run directory")
    if weights != "trained" and not run:
        raise ConfigError(f"{path}: weights {weights!r} are asked for, but this is not a run directory")
    if isinstance(mesh, AbstractMesh):
        options = dataclasses.replace(options or options_of(path), **(changes or {}))
        return Source(_planned(path, options, mesh), model_directory(path), mesh)
    if run:
        # Master copies have bits that the model's own number type has not.
        precise = as_stored or (changes or {}).get("param_dtype") == "float32"
        loaded = load_run(path, mesh, step, weights=weights, as_stored=precise)
        return Source(_changed(loaded.model, changes or {}), model_directory(path), loaded.mesh, loaded.step)
    mesh = all_devices() if mesh is None else mesh
    options = dataclasses.replace(options or options_of(path), **(changes or {}))
    return Source(import_hf(path, options, mesh, dtypes="stored" if as_stored else "options"), path, mesh)


def _planned(path: Path, options: ModelOptions, mesh: AbstractMesh) -> Vlm:
    """The model without its numbers, each parameter with its sharding."""
    model = abstract_model(load_config(model_directory(path))[0], options)
    shapes = {
        name: jax.ShapeDtypeStruct(
            param.shape, param.dtype, sharding=named_sharding(param_axes(param), param.shape, mesh)
        )
        for name, param in named_parameters(model).items()
    }
    return with_values(model, shapes)


def for_generation(path: Path, dtype: str | None = None) -> dict[str, object]:
    """Changes of a model's options for generation.

    Args:
        path: of any of the three kinds.
        dtype: number type of parameters and activations; None is that of the options.
    """
    changes: dict[str, object] = {} if dtype is None else {"param_dtype": dtype, "compute_dtype": dtype}
    # A run's checkpoints hold the arrays of its own setting; the other formats are cut as asked.
    if jax.default_backend() == "cpu" and not is_run(path):
        changes["scan_layers"] = False
    return changes


def generator_of(model: Vlm, processor: Processor, sizes: SlotConfig, mesh: Mesh | None) -> Generator:
    """A generator whose slots the devices share evenly.

    Args:
        model: on the mesh.
        processor: of the model.
        sizes: of the slots; their number is rounded up.
        mesh: where the model lies.
    """
    if mesh is not None:
        # Rows that the mesh cannot split would lie, and be computed, on every device.
        ways = row_ways(mesh)
        sizes = dataclasses.replace(
            sizes, slots=round_up(sizes.slots, ways), prefill_rows=round_up(sizes.prefill_rows, ways)
        )
    return Generator(model, processor, sizes, mesh)


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

"""`rave-jax convert`: a HuggingFace directory to a native checkpoint and back."""

from __future__ import annotations

from pathlib import Path

from rave_jax.checkpoint import native
from rave_jax.checkpoint.hf_export import copy_small_files, export_hf, keeps_other_keys, written_whole
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.models.parameters import num_bytes
from rave_jax.tools import source as sources


def from_hf(source: Path, destination: Path, dtype: str | None = None) -> None:
    """Write a native checkpoint of a HuggingFace directory.

    Args:
        source: directory with config.json and safetensors.
        destination: not there yet.
        dtype: number type of the parameters; None keeps those stored.

    Raises:
        ConfigError: the source does not fit a model we know, or the destination cannot be written.
    """
    if sources.is_run(source) or native.is_native(source):
        raise CheckpointError(f"{source}: expected a directory in HuggingFace format")
    changes = {} if dtype is None else {"param_dtype": dtype}
    model, directory, _ = sources.load(source, changes=changes, as_stored=dtype is None)
    with written_whole(destination, num_bytes(model)) as folder:
        if folder is not None:
            copy_small_files(directory, folder)
            native.write_into(folder, model, keeps_other_keys(model, directory))
    print(f"{destination}: native checkpoint, {num_bytes(model):,} bytes of parameters")


def to_hf(source: Path, destination: Path, *, dtype: str | None, step: int | None, max_shard_bytes: int) -> None:
    """Write a HuggingFace directory of a native checkpoint or of a run.

    Args:
        source: native checkpoint, run directory, or HuggingFace directory.
        destination: not there yet.
        dtype: number type of the weights; None writes the parameters as they are.
        step: of a run; None is the newest.
        max_shard_bytes: a weight file takes no more.

    Raises:
        ConfigError: the source cannot be read, or the destination cannot be written.
    """
    model, directory, _ = sources.load(source, step, as_stored=True)
    export_hf(model, destination, directory, dtype=dtype, max_shard_bytes=max_shard_bytes)
    files = len(list(destination.glob("*.safetensors")))
    print(f"{destination}: HuggingFace format, {files} weight file{'s' if files > 1 else ''}")

"""`rave-jax convert`: HuggingFace directories and PEFT adapters to native checkpoints and back, others to those."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from rave_jax.checkpoint import join as joining
from rave_jax.checkpoint import native
from rave_jax.checkpoint.card import LoraForm, Origin, beyond_backbone, notes
from rave_jax.checkpoint.gguf_file import open_gguf
from rave_jax.checkpoint.gguf_import import write_hf
from rave_jax.checkpoint.hf_export import copy_small_files, export_hf, key_style, rounding, tensor_format
from rave_jax.checkpoint.hf_files import has_weights, hf_config, is_peft
from rave_jax.checkpoint.kinds import other_config
from rave_jax.checkpoint.original import convert_original
from rave_jax.checkpoint.peft_export import export_peft
from rave_jax.checkpoint.peft_import import base_of, import_peft
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.checkpoint.sidecar import saved_options
from rave_jax.checkpoint.store import StoreError
from rave_jax.checkpoint.written_whole import written_whole
from rave_jax.config import require
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import num_bytes
from rave_jax.models.vlm import Vlm
from rave_jax.tools import source as sources
from rave_jax.training.averages import Weights
from rave_jax.training.directory import run_directory
from rave_jax.training.init import FromHF


class HfForm(NamedTuple):
    """How a model is written in HuggingFace format.

    Fields:
        dtype: number type of the weights; None writes the parameters as they are.
        max_shard_bytes: a weight file takes no more.
        lora: what becomes of LoRA.
        base: HuggingFace directory that an adapter belongs to; None is the one that training began with.
    """

    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    lora: LoraForm = "merge"
    base: Path | None = None


def from_hf(source: Path, destination: Path, dtype: str | None = None, base: Path | None = None) -> None:
    """Write a native checkpoint of a HuggingFace directory, or of a PEFT adapter directory and its base.

    Args:
        source: directory with config.json and safetensors, or with adapter_config.json and adapter_model.safetensors.
        destination: not there yet.
        dtype: number type of the parameters; None keeps those stored.
        base: of an adapter; None follows what it says.

    Raises:
        ConfigError: the source does not fit a model we know, or the destination cannot be written.
    """
    changes = {} if dtype is None else {"param_dtype": dtype}
    if is_peft(source):
        directory = base_of(source, base)
        model = import_peft(
            source, directory, sources.all_devices(), changes=changes, dtypes="stored" if dtype is None else "options"
        )
        if left := beyond_backbone(saved_options(directory) or ModelOptions()):
            print(f"{directory}: {'; '.join(left)} is left out: an adapter has its own beside it")
    elif base is not None:
        raise CheckpointError(f"{source}: --base is for a PEFT adapter, but there is no adapter_config.json")
    elif other := other_config(source, hf_config(source)):
        raise CheckpointError(other)
    elif native.is_native(source):
        raise CheckpointError(f"{source}: is a native checkpoint already, expected a directory in HuggingFace format")
    else:
        model, directory, *_ = sources.load(source, changes=changes, as_stored=dtype is None)
    with written_whole(destination, num_bytes(model)) as folder:
        if folder is not None:
            copy_small_files(directory, folder, model.options)
            native.write_into(folder, model, key_style(model, directory), tensor_format(model, directory))
    print(f"{destination}: native checkpoint, {num_bytes(model):,} bytes of parameters")


def from_gguf(source: Path, destination: Path, dtype: str = "float32") -> None:
    """Write a HuggingFace directory of a GGUF file.

    Args:
        source: the file.
        destination: not there yet.
        dtype: number type of the weights.

    Raises:
        ConfigError: the file is of another architecture or cannot be read, or the destination cannot be written.
    """
    file = open_gguf(source)
    kinds = ", ".join(sorted({tensor.kind for tensor in file.tensors.values()}))
    files = write_hf(file, destination, dtype)
    print(f"{destination}: HuggingFace format, {files} weight file{'s' if files > 1 else ''}, of {kinds} in {source}")


def from_original(source: Path, destination: Path, tower: Path | None = None) -> None:
    """Write a HuggingFace directory of a checkpoint in the format of its authors.

    Args:
        source: the checkpoint.
        destination: not there yet.
        tower: HuggingFace directory of its vision tower.

    Raises:
        ConfigError: the source cannot be read, the tower is not given, or the destination cannot be written.
    """
    convert_original(source, tower, destination)
    print(f"{destination}: HuggingFace format, the tower from {tower}")


def to_hf(source: Path, destination: Path, form: HfForm, step: int | None = None, weights: Weights = "trained") -> None:
    """Write a HuggingFace directory (or a PEFT adapter) of a native checkpoint or of a run, and say what it lacks.

    Args:
        source: native checkpoint, run directory, or HuggingFace directory.
        destination: not there yet.
        form: how it is written.
        step: of a run; None is the newest.
        weights: of a run: of the step, or their moving average.

    Raises:
        ConfigError: the source cannot be read, or the destination cannot be written.
    """
    model, directory, origin = _load(source, step, weights)
    if form.lora == "peft":
        base = form.base or _base(source, directory, origin)
        export_peft(model, destination, base, dtype=form.dtype, origin=origin)
        print(f"{destination}: PEFT adapter of {base}")
    else:
        if form.base is not None:
            raise CheckpointError("--base is for --lora peft only: other forms hold the whole model")
        export_hf(
            model,
            destination,
            directory,
            dtype=form.dtype,
            max_shard_bytes=form.max_shard_bytes,
            lora=form.lora,
            origin=origin,
        )
        files = len(list(destination.glob("*.safetensors")))
        print(f"{destination}: HuggingFace format, {files} weight file{'s' if files > 1 else ''}")
    beside = model.options if form.lora == "beside" else dataclasses.replace(model.options, lora=None)
    for sentence in notes(beside, model.options.lora, form.lora, rounding(model, form.dtype)):
        print(sentence)


def join(tower: Path, text: Path, destination: Path, seed: int) -> None:
    """Write a HuggingFace directory of a model whose tower and decoder are those of two others, and say what is in it.

    Args:
        tower: HuggingFace directory of a vision tower.
        text: HuggingFace directory of a text model.
        destination: not there yet.
        seed: of what joins them.

    Raises:
        ConfigError: the two make no model, a seed that is none, or the destination cannot be written.
    """
    require(0 <= seed < 2**32, "--seed", seed, "0 to 2^32 - 1")
    made = joining.join(tower, text, destination, seed)
    print(f"{destination}: {made.family} in HuggingFace format, with the tower of {tower} and the decoder of {text}")
    print(f"nothing is learned yet in what joins them, {', '.join(made.fresh)}: random numbers of seed {seed}")
    if made.left_out:
        print(f"left out of the two, since the model does not compute it: {len(made.left_out)} tensors")


def _load(source: Path, step: int | None, weights: Weights) -> tuple[Vlm, Path, Origin | None]:
    """The model, the directory with its config and tokenizer, and what made it, if a run did."""
    try:
        loaded = sources.load(source, step, as_stored=True, weights=weights)
    except StoreError as error:
        raise CheckpointError(str(error)) from error
    if loaded.step is None:
        return loaded.model, loaded.directory, None
    init = run_directory(source).read_config().init
    base = init.path if isinstance(init, FromHF) else ""
    averaged = ", the moving average of its weights" if weights == "ema" else ""
    return loaded.model, loaded.directory, Origin(base, f"Trained by rave_jax for {loaded.step} steps{averaged}")


def _base(source: Path, directory: Path, origin: Origin | None) -> Path:
    """The directory of the weights that an adapter of this model belongs to.

    Raises:
        CheckpointError: it is not known.
    """
    if origin is not None and origin.base:
        return Path(origin.base).expanduser()
    # Of a run that began with random weights, or a HuggingFace directory.
    if not native.is_native(source) and has_weights(directory):
        return directory
    raise CheckpointError(f"{source}: does not name the base model of its adapter: give its directory (--base)")

"""HuggingFace directory in: slices of safetensors files straight into the shards of the target sharding.

One shard's memory is allocated, filled from the files and handed to its device before the next one is: the host holds
about one local shard, never the model. (On CPU devices the allocated memory becomes the array itself.)
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from rave_jax.checkpoint import native
from rave_jax.checkpoint.explain import check_quantization
from rave_jax.checkpoint.hf_files import GENERATION_CONFIG, generation_config, hf_config
from rave_jax.checkpoint.kinds import other_config
from rave_jax.checkpoint.parts import Source, read_part
from rave_jax.checkpoint.safetensors_file import DTYPES, CheckpointError, Slice
from rave_jax.checkpoint.sidecar import check_same, needs_sidecar, saved_options
from rave_jax.checkpoint.target import abstract_model, check_room, fresh_parameters, parameter_shardings
from rave_jax.checkpoint.verify import match, refusal
from rave_jax.families import Family, family_for
from rave_jax.families.config import VlmConfig
from rave_jax.families.directory import processor_files, with_processor
from rave_jax.families.hf import eos_ids, section
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.typing import NpArray

READERS = 4
"""Tensors read at a time."""

Dtypes = Literal["options", "stored"]


def load_config(directory: str | Path) -> tuple[VlmConfig, Family]:
    """The model config and family of a directory.

    config.json says what the model is; its processor files have the pixel statistics, and generation_config.json the
    ids that end an answer.

    Raises:
        ConfigError: no config.json, a model that we do not compute, or other files that do not fit it.
    """
    hf = hf_config(Path(directory))
    if other := other_config(Path(directory), hf):
        raise CheckpointError(other)
    try:
        check_quantization(hf)
        check_quantization(section(hf, "text_config"), "config.json: text_config")
        family = family_for(hf)
        config = with_processor(family.parse(hf), processor_files(Path(directory)))
        return with_generation_settings(config, Path(directory)), family
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{directory}/config.json: a value is of the wrong kind: {error}") from error


def with_generation_settings(config: VlmConfig, directory: Path) -> VlmConfig:
    """The config with the `eos_token_id` of generation_config.json, where there is any.

    It goes before that of config.json, as in transformers: released models name more ids there.

    Raises:
        ConfigError: it is no id and no list of them.
    """
    stated = generation_config(directory)
    if stated.get("eos_token_id") is None:
        return config
    return dataclasses.replace(config, eos_token_ids=eos_ids(stated, where=GENERATION_CONFIG))


def import_hf(
    directory: str | Path,
    options: ModelOptions | None = None,
    mesh: Mesh | None = None,
    key: jax.Array | None = None,
    *,
    dtypes: Dtypes = "options",
    backbone_alone: bool = False,
) -> Vlm:
    """The model of a directory, its parameters on the mesh.

    Args:
        directory: in HuggingFace format, or native (`rave-jax convert from-hf`).
        options: how to build it; None takes those written beside the checkpoint, or the defaults.
        mesh: where parameters go; None is the first device.
        key: starts the parameters that the checkpoint has no numbers for; None is key 0.
        dtypes: number types of the parameters: those of the options, or each as it is stored.
        backbone_alone: read the HuggingFace files and nothing that lies beside them.

    Raises:
        CheckpointError: lists every key that is missing, unknown, of wrong shape or type, and every file that is
            truncated or corrupt. Nothing is loaded in part.
    """
    directory = Path(directory)
    config, _ = load_config(directory)
    saved = None if backbone_alone else saved_options(directory)
    if options is None:
        options = saved or ModelOptions()
    check_same(directory, saved, options)
    key = jax.random.key(0) if key is None else key
    if native.is_native(directory):
        return native.restore(directory, config, options, mesh, key, as_stored=dtypes == "stored")
    model = abstract_model(config, options)
    found = match(directory, model, with_sidecar=saved is not None and needs_sidecar(saved))
    targets = _dtypes(directory, model, found.sources, dtypes)
    if dtypes == "stored":
        # What begins fresh beside it takes the type that the options name, so they name the embedding's.
        name = "bfloat16" if targets["embed.weight"] == DTYPES["BF16"] else "float32"
        options = dataclasses.replace(options, param_dtype=name)
        model = abstract_model(config, options)
    places = parameter_shardings(model, mesh)
    check_room(model, places, targets)
    values = fresh_parameters(config, options, key, {path: places[path] for path in found.fresh})
    with ThreadPoolExecutor(READERS) as pool:
        for path, param in named_parameters(model).items():
            if path in values:
                continue
            fill = _filler(found.sources[path], shape=param.shape, pool=pool)
            values[path] = assemble(param.shape, targets[path], places[path], fill)
    return with_values(model, values)


def _dtypes(directory: Path, model: Vlm, sources: dict[str, list[Source]], dtypes: Dtypes) -> dict[str, np.dtype]:
    wanted = {path: np.dtype(param.dtype) for path, param in named_parameters(model).items()}
    if dtypes == "options":
        return wanted
    stored = {path: {part.stored.dtype for part in parts} for path, parts in sources.items()}
    mixed = [
        f"{first.key} ({first.file.name}) and the same tensors of other layers have different number types: "
        + ", ".join(sorted(stored[path]))
        for path, ((first, *_), *_) in sources.items()
        if len(stored[path]) > 1
    ]
    if mixed:
        raise CheckpointError(refusal(directory, mixed))
    return wanted | {path: DTYPES[next(iter(names))] for path, names in stored.items()}


def _filler(
    sources: Sequence[Source], shape: tuple[int, ...], pool: ThreadPoolExecutor
) -> Callable[[list[Slice]], None]:
    """A function that fills memory with slices of the parameter that these tensors are the parts of."""

    def fill(slices: list[Slice]) -> None:
        jobs = []
        for source in sources:
            depth = len(source.index)
            parts = [Slice(s.out[_inside(source.index, s)], s.index[depth:]) for s in slices if _holds(s, source.index)]
            if parts:
                jobs.append(pool.submit(read_part, source, shape[depth:], parts))
        for job in jobs:
            job.result()

    return fill


def _holds(part: Slice, index: tuple[int, ...]) -> bool:
    """Is what stands at this index of the first axes in the slice?"""
    return all(span.start <= n < span.stop for n, span in zip(index, part.index, strict=False))


def _inside(index: tuple[int, ...], part: Slice) -> tuple[int, ...]:
    """The same index counted from the start of the slice."""
    return tuple(n - span.start for n, span in zip(index, part.index, strict=False))


def assemble(
    shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, fill: Callable[[list[Slice]], None]
) -> jax.Array:
    """An array with this sharding, made shard after shard.

    Args:
        fill: writes the numbers of slices into their memory.
    """
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    # On CPU devices the memory stays, so that all shards may be filled in one pass over the file.
    in_place = all(device.platform == "cpu" for group in devices.values() for device in group)
    arrays: list[jax.Array] = []
    for batch in [list(devices)] if in_place else [[bounds] for bounds in devices]:
        slices = [
            Slice(empty_pages(tuple(high - low for low, high in bounds), dtype), tuple(slice(*b) for b in bounds))
            for bounds in batch
        ]
        fill(slices)
        for bounds, (memory, _) in zip(batch, slices, strict=True):
            for n, device in enumerate(devices[bounds]):
                # CPU devices must not share memory: one of them may give its array away (donate it).
                arrays.append(jax.device_put(memory.copy() if n and in_place else memory, device))
        jax.block_until_ready(arrays)
        del slices, memory  # before the next shard's memory is taken
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def empty_pages(shape: tuple[int, ...], dtype: np.dtype) -> NpArray:
    """Memory at the start of a page, which a CPU device takes as it is, without a copy.

    Ordinary pages: numpy would ask for huge ones, and where memory is fragmented the kernel then stops to compact it,
    which has made imports five times slower.
    """
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)

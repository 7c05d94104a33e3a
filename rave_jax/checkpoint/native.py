"""Native checkpoint: parameters as orbax writes them, with config, tokenizer and processor files beside.

    DIR/parameters/     {path: array}, in the cut of the stack that the mechanisms of DIR/rave_jax.json make; digests
                        of its files, which are checked before they are read
    DIR/native.json     format, and the HuggingFace style of keys it came from
    DIR/rave_jax.json   the ModelOptions, if mechanisms or adapters were written
    DIR/config.json     and its like: carried along from the HuggingFace directory

`import_hf`, and so the `init` of every config, reads it like a HuggingFace directory.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from rave_jax.checkpoint import digests, old_names, sidecar
from rave_jax.checkpoint.hf_files import NATIVE, SIDECAR_JSON, read_json
from rave_jax.checkpoint.naming import extra_parameters, global_names, locations
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.checkpoint.target import abstract_model, check_room, fresh_parameters, parameter_shardings
from rave_jax.families.config import VlmConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import Location, named_parameters, with_values
from rave_jax.models.vlm import Vlm

PARAMETERS = "parameters"
DIGESTS = "digests"
"""Key of native.json: were digests written? Checkpoints of older versions have none."""
FORMAT = 1


def is_native(directory: Path) -> bool:
    """Is this a native checkpoint?"""
    return (directory / NATIVE).exists()


def key_style(directory: Path) -> int:
    """Number of the style (`Family.styles`) that keys have in the HuggingFace files that it came from.

    Raises:
        CheckpointError: written in another format.
    """
    style = _stated(directory).get("other_key_style")
    return style if isinstance(style, int) else 0


def tensor_format(directory: Path) -> int:
    """Number of the format (`Family.formats`) of the tensors in the HuggingFace files that it came from.

    Raises:
        CheckpointError: written in another format.
    """
    format = _stated(directory).get("tensor_format")
    return format if isinstance(format, int) else 0


def _stated(directory: Path) -> dict[str, Any]:
    data = read_json(directory / NATIVE)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{directory / NATIVE}: expected an object with format {FORMAT}")
    return data


def write_into(folder: Path, model: Vlm, other_key_style: int, format: int = 0) -> None:
    """Fill a folder with a native checkpoint, but for the files that are carried along. For one process.

    Args:
        folder: it is there.
        model: whose parameters are written.
        other_key_style: what `key_style` will give.
        format: what `tensor_format` will give.
    """
    values = {path: param[...] for path, param in named_parameters(model).items()}
    ocp.save(str(folder.resolve() / PARAMETERS), values)
    digests.write(folder / PARAMETERS)
    # The first two styles are written as false and true.
    style = bool(other_key_style) if other_key_style < 2 else other_key_style
    stated = {"format": FORMAT, "other_key_style": style, DIGESTS: True}
    stated |= {"tensor_format": format} if format else {}
    text = json.dumps(stated, indent=2) + "\n"
    (folder / NATIVE).write_text(text)
    if sidecar.needs_sidecar(model.options):
        (folder / SIDECAR_JSON).write_text(sidecar.options_text(model.options))


def check_whole(directory: Path) -> None:
    """Refuse parameters that are not as they were written, each file by its digest.

    Raises:
        CheckpointError: names the file that is damaged or missing.
    """
    folder = directory / PARAMETERS
    try:
        known = digests.read(folder)
        stated = read_json(directory / NATIVE)
        if isinstance(stated, dict) and stated.get(DIGESTS) and not known.complete:
            raise digests.DamageError("the file with digests is missing")
        digests.check(folder, known, known.files)
    except digests.DamageError as error:
        raise CheckpointError(f"{folder}: {error}: convert the model again, or copy the checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error


def stored_dtypes(directory: Path) -> dict[str, np.dtype]:
    """Number type of every stored parameter, by today's path.

    Raises:
        CheckpointError: the parameters cannot be read.
    """
    return {old_names.new_name(path): np.dtype(leaf.dtype) for path, leaf in _metadata(directory).items()}


def _metadata(directory: Path) -> dict:
    try:
        return dict(ocp.metadata(str(directory.resolve() / PARAMETERS)).metadata)
    except (ValueError, KeyError, TypeError, OSError, ocp.errors.InvalidLayoutError) as error:
        raise CheckpointError(f"{directory / PARAMETERS}: cannot be read: {_first_line(error)}") from error


def restore(
    directory: Path, config: VlmConfig, options: ModelOptions, mesh: Mesh | None, key: jax.Array, *, as_stored: bool
) -> Vlm:
    """The model of a native checkpoint on the mesh.

    Args:
        directory: the checkpoint.
        config: of the model.
        options: how to build it. `sidecar.check_same` has allowed them.
        mesh: where parameters go; None is the first device.
        key: starts parameters that the checkpoint does not hold.
        as_stored: keep the stored number types rather than cast to the options'.

    Raises:
        CheckpointError: the checkpoint cannot be read or holds another model.
    """
    check_whole(directory)
    stored_model = abstract_model(config, sidecar.saved_options(directory) or ModelOptions())
    dtypes = stored_dtypes(directory)
    stored = _metadata(directory)
    names = {old_names.new_name(path): path for path in stored}
    shapes = {path: tuple(stored[name].shape) for path, name in names.items()}
    expected = {path: param.shape for path, param in named_parameters(stored_model).items()}
    if shapes != expected:
        wrong = sorted(p for p in shapes.keys() | expected.keys() if shapes.get(p) != expected.get(p))
        raise CheckpointError(
            f"{directory}: holds another model than its config.json says: "
            + "; ".join(f"{p} is {shapes.get(p)}, expected {expected.get(p)}" for p in wrong)
        )
    where = parameter_shardings(stored_model, mesh)
    check_room(stored_model, where, dtypes)
    target = {names[p]: jax.ShapeDtypeStruct(shape, dtypes[p], sharding=where[p]) for p, shape in shapes.items()}
    try:
        loaded = ocp.load(str(directory.resolve() / PARAMETERS), target)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{directory / PARAMETERS}: cannot be read: {_first_line(error)}") from error
    values = {path: loaded[name] for path, name in names.items()}
    model = abstract_model(config, options)
    return with_values(model, _recut(values, stored_model, model, config, options, mesh, key, as_stored))


def _recut(
    values: dict[str, jax.Array],
    stored: Vlm,
    model: Vlm,
    config: VlmConfig,
    options: ModelOptions,
    mesh: Mesh | None,
    key: jax.Array,
    as_stored: bool,
) -> dict[str, jax.Array]:
    """The stored parameters in the cut and number types of `model`; what is not stored begins fresh."""
    known = locations(stored)
    where = parameter_shardings(model, mesh)
    fresh = {p: where[p] for p in extra_parameters(model) if global_names(model, p)[0] not in known}
    result = fresh_parameters(config, options, key, fresh)
    for path, param in named_parameters(model).items():
        if path in fresh:
            continue
        sources = [known[name] for name in global_names(model, path)]
        dtype = values[sources[0].path].dtype if as_stored else param.dtype
        runs = _runs(sources)
        whole = len(runs) == 1 and values[runs[0][0]].shape == param.shape
        if whole and values[runs[0][0]].dtype == dtype:
            result[path] = values[runs[0][0]]
            continue
        cut = functools.partial(_join, spans=tuple(None if whole else span for _, span in runs), dtype=dtype)
        result[path] = jax.jit(cut, out_shardings=where[path])([values[p] for p, _ in runs])
    return result


def _runs(sources: list[Location]) -> list[tuple[str, tuple[int, int]]]:
    """Consecutive layers of one stored parameter as (path, (start, stop))."""
    runs: list[tuple[str, tuple[int, int]]] = []
    for path, index in sources:
        n = index or 0
        if runs and runs[-1][0] == path and runs[-1][1][1] == n:
            runs[-1] = (path, (runs[-1][1][0], n + 1))
        else:
            runs.append((path, (n, n + 1)))
    return runs


def _join(parts: list[jax.Array], spans: tuple[tuple[int, int] | None, ...], dtype: jnp.dtype) -> jax.Array:
    cut = [x if span is None else x[slice(*span)] for x, span in zip(parts, spans, strict=True)]
    return jnp.concatenate([x.astype(dtype) for x in cut]) if len(cut) > 1 else cut[0].astype(dtype)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

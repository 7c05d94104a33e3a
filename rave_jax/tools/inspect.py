"""`rave-jax inspect`: config and parameters of a model, from shapes alone; no weights are loaded."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from rave_jax import config as configs
from rave_jax.checkpoint import native
from rave_jax.checkpoint.explain import OTHER_FORMATS, no_weights
from rave_jax.checkpoint.hf_files import CONFIG, has_weights, hf_config, read_weights
from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.safetensors_file import DTYPES, CheckpointError
from rave_jax.checkpoint.sidecar import needs_sidecar, saved_options
from rave_jax.checkpoint.target import abstract_model
from rave_jax.checkpoint.verify import match
from rave_jax.families.hf import section
from rave_jax.models.parameters import named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.tools import source as sources

NAMED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
NARROW = 150
"""Columns where the output is no terminal."""


def inspect(path: Path) -> None:
    """Print config, parameters by module and totals.

    Args:
        path: HuggingFace directory (config.json is enough), native checkpoint or run directory.

    Raises:
        ConfigError: no model we know; weights that are there but do not fit it.
    """
    directory = sources.model_directory(path)
    config, family = load_config(directory)
    options = sources.options_of(path)
    model = abstract_model(config, options)
    dtypes, weights = _dtypes(path, model)
    console = Console(width=shutil.get_terminal_size().columns if sys.stdout.isatty() else NARROW, highlight=False)
    console.print(f"[bold]{path}[/]: {family.architecture}", soft_wrap=True)
    console.print(configs.dumps(config), end="", markup=False)
    if needs_sidecar(options):
        console.print("[bold]options[/]")
        console.print(configs.dumps(options), end="", markup=False)
    console.print(parameter_table(model, dtypes))
    console.print(f"weights: {weights}", soft_wrap=True)
    numbers, size = totals(model, dtypes)
    console.print(f"total: {numbers:,} parameters, {size:,} bytes", soft_wrap=True)


def totals(model: Vlm, dtypes: Mapping[str, np.dtype]) -> tuple[int, int]:
    """(numbers, bytes) of all parameters with these number types."""
    counts = {path: math.prod(param.shape) for path, param in named_parameters(model).items()}
    return sum(counts.values()), sum(count * dtypes[path].itemsize for path, count in counts.items())


def parameter_table(model: Vlm, dtypes: Mapping[str, np.dtype]) -> Table:
    """One row per parameter, one sum per module."""
    table = Table(box=None, pad_edge=False)
    for column, side in (("parameter", "left"), ("shape", "left"), ("dtype", "left"), ("bytes", "right")):
        table.add_column(column, justify=side, overflow="fold")
    params = sorted(named_parameters(model).items(), key=lambda item: _module(item[0]))
    for module, rows in groupby(params, key=lambda item: _module(item[0])):
        total = 0
        for path, param in rows:
            size = math.prod(param.shape) * dtypes[path].itemsize
            total += size
            shape = " x ".join(map(str, param.shape))
            table.add_row(path, shape, str(dtypes[path]), f"{size:,}")
        table.add_row(f"[bold]{module}[/]", "", "", f"[bold]{total:,}[/]", end_section=True)
    return table


def _module(path: str) -> str:
    return path.split(".")[0]


def _dtypes(path: Path, model: Vlm) -> tuple[dict[str, np.dtype], str]:
    """Number type of every parameter, and one line on where that is known from."""
    params = named_parameters(model)
    if sources.is_run(path):
        return {p: np.dtype(param.dtype) for p, param in params.items()}, "of a run, in its number types"
    if native.is_native(path):
        return native.stored_dtypes(path), "native checkpoint"
    made = {p: np.dtype(param.dtype) for p, param in params.items()}
    if has_weights(path):
        saved = saved_options(path)
        found = match(path, model, with_sidecar=saved is not None and needs_sidecar(saved))
        stored = {p: DTYPES[parts[0].stored.dtype] for p, parts in found.sources.items()}
        files = read_weights(path).files
        tensors = {part.stored for parts in found.sources.values() for part in parts}
        return made | stored, f"{len(tensors)} tensors in {len(files)} files fit the config"
    if any(path.glob("*.safetensors")) or any(file for pattern in OTHER_FORMATS for file in path.glob(pattern)):
        raise CheckpointError(no_weights(path))
    hf = hf_config(path)
    places = (hf, section(hf, "text_config"))
    stated = next((c[key] for c in places for key in ("dtype", "torch_dtype") if c.get(key)), "float32")
    name = str(stated).removeprefix("torch.")
    if name not in NAMED:
        raise CheckpointError(f"{path / CONFIG}: dtype is {stated!r}, expected {', '.join(NAMED)}")
    return dict.fromkeys(params, np.dtype(NAMED[name])), f"no weights here; bytes are for {name}, as in config.json"

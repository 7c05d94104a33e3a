"""What a HuggingFace checkpoint cannot hold, written beside it.

`rave_jax.json` holds the `ModelOptions`; `rave_jax.safetensors` the parameters of mechanisms, adapters and extra
mlps, by global layer number (`decoder.layers.7.mechanisms.0.key_proj`), and of context tokens (`context.weight`).
transformers ignores both files.
"""

from __future__ import annotations

import json
from pathlib import Path

from rave_jax import config as configs
from rave_jax.checkpoint.hf_files import CONFIG, SIDECAR, SIDECAR_JSON, STATED_KEY, read_json
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.models.config import ModelOptions

FORMAT = 1
PARTS = ("mechanisms", "context", "lora", "extra_mlp")
"""Fields of the options that make another model."""


def saved_options(directory: Path) -> ModelOptions | None:
    """The options that were written beside a checkpoint, or None where nothing was.

    Raises:
        CheckpointError: the file is not what we write, or the parameters lie there without it.
    """
    path = directory / SIDECAR_JSON
    if not path.exists():
        if (directory / SIDECAR).exists():
            raise CheckpointError(
                f"{directory}: {SIDECAR} is there without {SIDECAR_JSON}, which says what it belongs to"
            )
        _check_stated(directory, None)
        return None
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else data
        raise CheckpointError(f"{path}: format is {found!r}, expected {FORMAT}")
    saved = configs.from_json(ModelOptions, data.get("options"), f"{path}: options")
    _check_stated(directory, saved)
    return saved


def _check_stated(directory: Path, saved: ModelOptions | None) -> None:
    """config.json of an export says what lies beside it; without that it would be another model.

    Raises:
        CheckpointError: it is not there, or another one is.
    """
    file = directory / CONFIG
    config = read_json(file) if file.is_file() else {}
    stated = config.get(STATED_KEY) if isinstance(config, dict) else None
    if stated is None:
        return
    where = f"{file}: the key {STATED_KEY!r}"
    backbone = f"delete that key, {SIDECAR_JSON} and {SIDECAR} to read the backbone alone"
    if not isinstance(stated, dict):
        raise CheckpointError(f"{where} is {stated!r}, expected an object with the fields {', '.join(PARTS)}")
    if saved is None:
        raise CheckpointError(
            f"{where} says that the model has more than its backbone, but {SIDECAR_JSON} is missing: copy it and "
            f"{SIDECAR} from where the directory came from, or {backbone}"
        )
    for name in PARTS:
        if configs.without_folders(stated.get(name)) != configs.without_folders(configs.to_json(getattr(saved, name))):
            raise CheckpointError(
                f"{where} says {name} {stated.get(name)!r}, but {SIDECAR_JSON} has {getattr(saved, name)}: the files "
                f"are of two models; copy both from one, or {backbone}"
            )


def options_text(options: ModelOptions) -> str:
    """The text of `rave_jax.json`."""
    return json.dumps({"format": FORMAT, "options": configs.to_json(options)}, indent=2) + "\n"


def needs_sidecar(options: ModelOptions) -> bool:
    """Would reading the HuggingFace files alone give another model?"""
    return any(getattr(options, name) for name in PARTS)


def check_same(directory: Path, saved: ModelOptions | None, asked: ModelOptions) -> None:
    """Refuse to read parameters into a model that they were not trained in.

    Raises:
        CheckpointError: what the options add to the backbone differs from what was written beside the checkpoint.
    """
    if saved is None or not needs_sidecar(saved):
        return
    for field in PARTS:
        there, here = getattr(saved, field), getattr(asked, field)
        if there != here:
            raise CheckpointError(
                f"{directory}: was written with {field} {there}, but {here} is asked for: ask for the same, or delete "
                f"{SIDECAR_JSON}, {SIDECAR} and the key {STATED_KEY!r} of {CONFIG} to start from the backbone alone"
            )

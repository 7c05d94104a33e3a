"""What a directory is: a training run, a native checkpoint, a model in HuggingFace format or a PEFT adapter; and what
is said of one that is none of these, and which command takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rave_jax.files import read_text

CONFIG, NATIVE, ADAPTER_CONFIG, CHECKPOINTS = "config.json", "native.json", "adapter_config.json", "checkpoints"
"""Files and a folder by which a directory is known."""
RUN_CONFIG = "TrainConfig"
"""`type` of the config.json of a training run."""
EXPECTED = "expected a model directory in HuggingFace format"
MOST_NAMED = 3
Kind = Literal["run", "native", "model", "adapter", "other"]


def kind_of(path: Path) -> Kind:
    """What a path is, by the names of its files and by what its config.json says it is. Nothing else is checked.

    A run is one from its config.json on, whatever it has saved; one whose config.json is damaged is known by its
    checkpoints. An adapter beside a whole model counts as the model.
    """
    config = path / CONFIG
    try:
        stated = json.loads(read_text(config))
    except (OSError, ValueError, RecursionError):
        stated = None
    if stated is None and config.is_file() and (path / CHECKPOINTS).is_dir():
        return "run"
    if isinstance(stated, dict) and stated.get("type") == RUN_CONFIG:
        return "run"
    if (path / NATIVE).is_file():
        return "native"
    if config.is_file():
        return "model"
    return "adapter" if (path / ADAPTER_CONFIG).is_file() else "other"


def what_is(path: Path) -> str:
    """Why a path without a config.json is no model directory, and what to do."""
    if not path.is_dir():
        return _no_directory(path)
    parent = next((folder for folder in path.resolve().parents if kind_of(folder) == "run"), None)
    inner = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
    if not any(path.iterdir()):
        found = "is an empty directory"
    elif parent is not None:
        found = f"is a part of the training run {parent}; give the run"
    elif inner:
        more = ", ..." if len(inner) > MOST_NAMED else ""
        found = f"holds no config.json itself, but {', '.join(inner[:MOST_NAMED])}{more} inside does; give one of those"
    elif any(path.glob("*.gguf")):
        found = "holds GGUF files; give a model directory that `rave-jax convert from-gguf FILE DIR` makes of one"
    elif any(path.glob("*.safetensors")):
        found = "holds weights but no config.json; copy it from where the weights are from"
    else:
        found = "holds no config.json"
    return f"{path}: {found}; {EXPECTED}, or a training run"


def _no_directory(path: Path) -> str:
    if path.exists():
        return f"{path}: is a file; expected the directory that holds config.json and the weights"
    parts = path.parts
    hub = (
        ""
        if path.is_absolute() or len(parts) != 2 or parts[0] in (".", "..") or path.parent.exists()
        else (f"; models are not downloaded: fetch it first (`hf download {path}`), and give the directory")
    )
    return f"{path}: no such directory{hub}"


def other_config(path: Path, config: Mapping[str, Any]) -> str:
    """Why a config.json is no model's, and which command takes the directory; "" for a model's."""
    if config.get("type") == RUN_CONFIG:
        return (
            f"{path}: is the directory of a training run, {EXPECTED}; rave-jax generate, logits, inspect and eval take "
            f"a run as it is, and `rave-jax convert to-hf {path} DIR` makes a model directory of it"
        )
    if not config.get("model_type"):
        kind = next((f"; it is a {config[key]} of {name}" for key, name in OTHERS.items() if key in config), "")
        return f"{path / CONFIG}: the key 'model_type' is missing{kind}; {EXPECTED}"
    return ""


OTHERS = {"_class_name": "diffusers", "peft_type": "PEFT"}
"""Keys that the config.json of other libraries has."""

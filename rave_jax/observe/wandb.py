"""Metrics to Weights & Biases. The package `wandb` is imported when a run asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Wandb:
    """A run at Weights & Biases (`pip install 'rave-jax[wandb]'`)."""

    project: str = "rave_jax"
    """The project."""
    name: str | None = None
    """Name of the run there; None: that of the run directory."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the run directory; `wandb sync` sends it later."""


class MissingPackage(ImportError):
    """wandb is not installed."""


class WandbWriter:
    """Values of each step. A run that is continued goes on in the same run there."""

    def __init__(self, config: Wandb, directory: Path, settings: Mapping[str, Any], after_step: int):
        """
        Args:
            config: where to.
            directory: the run directory, which remembers the id of the run there.
            settings: the resolved config, to be shown there.
            after_step: rows up to this step are there already.

        Raises:
            MissingPackage: wandb is not installed.
            OSError: the run directory cannot be written.
        """
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise MissingPackage("wandb is set, but the package is missing: pip install 'rave-jax[wandb]'") from error
        place = directory / "wandb.id"
        known = place.read_text().strip() if after_step and place.exists() else None
        self._run = wandb.init(
            project=config.project,
            name=config.name or directory.name,
            mode=config.mode,
            dir=str(directory),
            id=known,
            resume="allow" if known else None,
            config=dict(settings),
        )
        place.write_text(f"{self._run.id}\n")

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """One row."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()

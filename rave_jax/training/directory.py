"""What stands in a run directory.

config.json        the resolved config; `train.py RUN/config.json` repeats or continues the run
.lock              held by the job that trains here (lock.py)
model/             HF config, tokenizer and processor files (and the weights of a `Tiny` start)
metrics.jsonl      one row per logged step, and one without a loss per evaluation between steps; lines that are no
                   rows are moved to metrics.jsonl.rejected
tensorboard/       the same as events
checkpoints/STEP/  parameters, optimizer, data state (checkpoint/store.py)
profile/STEP/      what jax's profiler wrote of a few steps (profiling.py)
wandb.id, wandb/   the run at Weights & Biases, where metrics go there too
bad_step/STEP/     the state before a step that was not finite, if there was one
evaluation/NAME/   what the evaluations after the last step wrote; steps/STEP/ in it, what one with `every` wrote
                   after that step
report.md          what `Report` wrote
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from rave_jax import config as configs
from rave_jax.checkpoint.buckets import folder_at, is_bucket
from rave_jax.checkpoint.saved_step import StoreError, steps_in
from rave_jax.config import ConfigError, local_path
from rave_jax.files import read_text
from rave_jax.training.config import TrainConfig, check_same_run, differences
from rave_jax.training.mirror import Mirror


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run."""

    path: Path
    """The run directory, absolute; of a run in a bucket, the local folder that stands for it."""
    mirror: Mirror | None = None
    """Of a run in a bucket."""

    def __str__(self) -> str:
        return str(self.path) if self.mirror is None else self.mirror.url

    def shown(self, path: Path) -> str:
        """A path in the directory, as messages name it."""
        return str(path).replace(str(self.path), str(self))

    def push(self) -> None:
        """Copy what has changed to the bucket, where the run is in one.

        Raises:
            StoreError: it cannot be written.
        """
        if self.mirror is not None:
            self.mirror.push()

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.json"

    @property
    def model(self) -> Path:
        """HF directory: at least config, tokenizer and processor files."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        """Metrics as JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Metrics as TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """Profiles of steps."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoint store."""
        return self._stored("checkpoints")

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / str(step)

    @property
    def bad_step(self) -> Path:
        """Store with the state before a step that was not finite."""
        return self._stored("bad_step")

    def _stored(self, name: str) -> Path:
        return self.path / name if self.mirror is None else folder_at(f"{self.mirror.url}/{name}")

    def evaluation(self, name: str) -> Path:
        """What the evaluation of that name wrote."""
        return self.path / "evaluation" / name

    def read_config(self) -> TrainConfig:
        """The config the run was started with.

        Raises:
            ConfigError: not a run directory, or its config is not one of ours.
        """
        if not self.config.exists():
            raise ConfigError(f"{self} is not a run directory: it holds no config.json")
        try:
            text = read_text(self.config)
        except OSError as error:
            raise ConfigError(f"{self.config} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"{self.config} is not UTF-8 text: {error}") from error
        return configs.loads(TrainConfig, text, str(self.config))

    @property
    def started(self) -> bool:
        """Has a run got to its first step here?"""
        rows = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return rows or bool(steps_in(self.checkpoints))

    def past(self, config: TrainConfig) -> TrainConfig | None:
        """The config of the run here that `config` continues; None where there is none.

        A start with another config that did not get to its first step is no run.

        Raises:
            ConfigError: another run lives here.
        """
        if not self.config.exists():
            return None
        old = self.read_config()
        if not self.started and (differences(old, config) or old.steps != config.steps):
            return None
        check_same_run(old, config, str(self))
        return old

    def write_config(self, text: str) -> None:
        """Put the text of a config in place, in one step.

        Raises:
            OSError: it cannot be written.
        """
        written = self.config.with_suffix(".tmp")
        written.write_text(text)
        os.replace(written, self.config)


def run_directory(path: str | Path) -> RunDirectory:
    """The run directory at a path or the URL of a bucket, which need not exist yet.

    Raises:
        ConfigError: the path is not one of a file system, and no URL of a bucket.
        StoreError: the bucket cannot be read.
    """
    if is_bucket(path):
        mirror = Mirror(str(path))
        mirror.pull()
        return RunDirectory(mirror.local, mirror)
    return RunDirectory(local_path(path, "the run directory").expanduser().resolve())


@contextlib.contextmanager
def opened(path: str) -> Generator[RunDirectory]:
    """The run directory for a job that writes there: at the end, what has changed is copied to its bucket, and the
    local copy is removed.

    Raises:
        ConfigError, StoreError: as `run_directory`; the bucket cannot be written at the end.
    """
    directory = run_directory(path)
    if directory.mirror is None:
        yield directory
        return
    try:
        yield directory
    except BaseException:
        with contextlib.suppress(StoreError):  # what is being raised says more
            directory.mirror.close()
        raise
    else:
        directory.mirror.close()
    finally:
        directory.mirror.discard()

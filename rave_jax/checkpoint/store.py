"""Checkpoints of a run: parameters, optimizer state and data state of one step, saved together by orbax.

    DIR/STEP/parameters   {"step", "trained", "frozen"}: what evaluation reads
    DIR/STEP/optimizer    optimizer state
    DIR/STEP/data         JSON: where the data pipeline stands

A save runs beside training; a directory that a killed process left unfinished is not a checkpoint.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

PARAMETERS, OPTIMIZER, DATA = "parameters", "optimizer", "data"


class StoreError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the directory and why."""


def check_writable(directory: Path, needed: int) -> None:
    """Make `directory` and prove that it takes files and has room, before a run spends time.

    Args:
        directory: where checkpoints will be.
        needed: bytes that this machine will write there.

    Raises:
        StoreError: read-only, not a directory, or too little space.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".write-test-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise StoreError(f"cannot write to {directory}: {error.strerror or error}") from error
    if free < needed:
        raise StoreError(f"{directory}: {_gb(needed)} are needed for checkpoints, but {_gb(free)} are free")


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


class Store:
    """The checkpoints in one directory. Use as a context manager; all processes of a job call it alike."""

    def __init__(self, directory: Path, keep: int, *, reader: bool = False):
        """
        Args:
            directory: an absolute path after this; made when missing.
            keep: newest checkpoints that are kept.
            reader: leave what a run that is under way has not finished alone; do not save.

        Raises:
            StoreError: the directory cannot be used.
        """
        self.directory = Path(directory).resolve()
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry().add(
            ocp.handlers.JsonHandler, checkpointable_name=DATA
        )
        policies: Any = {
            # When to save is the loop's decision.
            "save_decision_policy": ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            "preservation_policy": ocp.training.preservation_policies.LatestN(keep),
        }
        try:
            self._checkpointer = ocp.training.Checkpointer(
                str(self.directory),
                context=context,
                **policies,
                cleanup_tmp_directories=not reader,
            )
        except OSError as error:
            raise StoreError(f"cannot use {self.directory}: {error.strerror or error}") from error

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except StoreError:
            if kind is None:  # an error that is on its way says more
                raise

    @property
    def latest(self) -> int | None:
        """Newest finished step, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def steps(self) -> list[int]:
        """Finished steps, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, parameters: Any, optimizer: Any, data: dict[str, Any]) -> None:
        """Copy the arrays to the host and write them in the background.

        Args:
            step: steps done; a step that is there already is left as it is.
            parameters: pytree of arrays.
            optimizer: pytree of arrays.
            data: JSON-ready state of the data pipeline.

        Raises:
            StoreError: this save cannot start, or the one before it failed.
        """
        if step in self.steps:
            return
        what = {PARAMETERS: parameters, OPTIMIZER: optimizer, DATA: data}
        # Looked at first: orbax, whose threads wait for a directory that cannot be made, would hold up the error
        # and the end of the process for minutes.
        check_writable(self.directory, local_bytes((parameters, optimizer)))
        with _explained(self.directory, f"the checkpoint of step {step}"):
            self._checkpointer.save_checkpointables_async(step, what)

    def restore(self, step: int, parameters: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(parameters, optimizer, data) of a step, on the shardings of the abstract targets.

        Raises:
            StoreError: no such step, or it does not fit the targets.
        """
        found = self._load(step, {PARAMETERS: parameters, OPTIMIZER: optimizer, DATA: None})
        return found[PARAMETERS], found[OPTIMIZER], found[DATA]

    def restore_parameters(self, step: int, parameters: Any) -> Any:
        """Only the parameters of a step, on the shardings of the abstract target.

        Raises:
            StoreError: no such step, or it does not fit the target.
        """
        return self._load(step, {PARAMETERS: parameters})[PARAMETERS]

    def _load(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        if step not in self.steps:
            raise StoreError(f"{self.directory} has no checkpoint of step {step}; there are {self.steps or 'none'}")
        try:
            stored = self._checkpointer.checkpointables_metadata(step).metadata
            if any(stored[name] is None for name in targets if name != DATA):
                raise StoreError(f"{self.directory / str(step)} cannot be restored: its files are damaged")
            wrong = _differences(stored[PARAMETERS], targets[PARAMETERS])
            if wrong:
                raise StoreError(f"{self.directory / str(step)} holds another model: {'; '.join(wrong)}")
            return self._checkpointer.load_checkpointables(step, targets)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise StoreError(f"{self.directory / str(step)} cannot be restored: {_first_line(error)}") from error

    def wait(self) -> None:
        """Until no save is under way.

        Raises:
            StoreError: one failed.
        """
        with _explained(self.directory, "a checkpoint"):
            self._checkpointer.wait()

    def close(self) -> None:
        """Wait, then release what orbax holds.

        Raises:
            StoreError: a save failed.
        """
        with _explained(self.directory, "a checkpoint"):
            self._checkpointer.close()


class _explained:
    """Turns what orbax raises on a failed write into one clear error."""

    def __init__(self, directory: Path, what: str):
        self._directory, self._what = directory, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, Exception):
            return
        full = any(code in str(error) for code in (os.strerror(errno.ENOSPC), "ENOSPC", "RESOURCE_EXHAUSTED"))
        why = f"no space is left ({_gb(shutil.disk_usage(self._directory).free)} free)" if full else _first_line(error)
        raise StoreError(f"{self._what} could not be written to {self._directory}: {why}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _differences(stored: Any, wanted: Any) -> list[str]:
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (stored, wanted))
    ]
    there, here = shapes
    return [
        *(f"{name} is missing" for name in here if name not in there),
        *(f"{name} is not expected" for name in there if name not in here),
        *(
            f"{name} is {there[name]}, expected {here[name]}"
            for name in here
            if there.get(name, here[name]) != here[name]
        ),
    ]


def local_bytes(tree: Any) -> int:
    """Bytes that this process writes when it saves a pytree of arrays, or of abstract ones with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        places = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += shard * len({str(place) for place in places})  # replicas are written once
    return total


def abstract(tree: Any, shardings: Any) -> Any:
    """A restore target: shapes and dtypes of `tree` with these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

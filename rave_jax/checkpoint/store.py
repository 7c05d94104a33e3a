"""Checkpoints of a run: parameters, optimizer state and data state of one step, saved together by orbax.

    DIR/STEP/parameters           {"step", "trained", "frozen"}: what evaluation reads
    DIR/STEP/optimizer            optimizer state
    DIR/STEP/data                 JSON: where the data pipeline stands
    DIR/STEP/digests.N.sha256     digests of the files that process N wrote
    DIR/STEP.damaged              a checkpoint that training found damaged and went on without

A save and its digests run beside training; a directory that a killed process left unfinished is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from rave_jax.checkpoint import digests, saved_step
from rave_jax.checkpoint.buckets import folder_at, is_bucket
from rave_jax.checkpoint.digests import DamageError
from rave_jax.checkpoint.part_handlers import Hooks
from rave_jax.checkpoint.retention import VALUE, Retention
from rave_jax.checkpoint.saved_step import DATA, OPTIMIZER, PARAMETERS, StoreError, first_line
from rave_jax.parallel import agree

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a checkpoint held.

    Fields:
        step: of the run.
        parameters: on the shardings that were asked for.
        optimizer: the same, or None where only parameters were asked for.
        data: state of the data pipeline, or None.
    """

    step: int
    parameters: Any
    optimizer: Any
    data: Any


def check_writable(directory: Path, needed: int) -> None:
    """Make `directory` and prove that it takes files and has room, before a run spends time.

    Args:
        directory: where checkpoints will be.
        needed: bytes that the job will write there.

    Raises:
        StoreError: read-only, not a directory, or too little space.
    """
    if is_bucket(directory):
        _check_bucket(directory)
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write to {directory}: {error.strerror or error}") from error
    check_room(directory, needed)


def _check_bucket(directory: Path) -> None:
    probe = directory / f".write-test-{secrets.token_hex(8)}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except Exception as error:  # fsspec, gcsfs and google's libraries raise kinds of their own
        raise StoreError(f"cannot write to {directory}: {first_line(error)}") from error


def check_room(directory: Path, needed: int) -> None:
    """The same proof without making the directory: of the nearest folder above it that is there. A bucket has room.

    Raises:
        StoreError: read-only, not a directory, or too little space.
    """
    if is_bucket(directory):
        _check_bucket(directory)
        return
    place = next(folder for folder in (directory, *directory.parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".write-test-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise StoreError(f"cannot write to {directory}: {error.strerror or error}") from error
    if free < needed:
        raise StoreError(f"{directory}: {_gb(needed)} are needed for checkpoints, but {_gb(free)} are free")


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


class Store:
    """The checkpoints in one directory. Use as a context manager; all processes of a job call it alike."""

    def __init__(
        self, directory: Path, keep: int | Retention, *, reader: bool = False, before: Callable[[], None] | None = None
    ):
        """
        Args:
            directory: an absolute path after this, or a folder in a bucket; made when missing.
            keep: which checkpoints are kept; a number: so many of the newest.
            reader: leave what is there as it is; do not save.
            before: called beside each save, in a thread; a checkpoint is finished after it, and the save fails with it.

        Raises:
            StoreError: the directory cannot be written.
        """
        self.directory = folder_at(directory)
        self._keep = Retention(keep) if isinstance(keep, int) else keep
        self._reader, self._before = reader, before
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._save: _Save | None = None
        self._failed = False
        if not reader:
            check_writable(self.directory, 0)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except StoreError:
            if kind is None:  # an error that is being raised says more
                raise

    @property
    def latest(self) -> int | None:
        """Newest finished step, sound or not, or None."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """Finished steps, ascending."""
        return saved_step.steps_in(self.directory)

    def last_saved(self) -> str:
        """What a run that cannot write has left, in words."""
        return _last_good(self.directory)

    def save(
        self, step: int, parameters: Any, optimizer: Any, data: dict[str, Any], metric: float | None = None
    ) -> None:
        """Copy the arrays to the host and write them in the background.

        Args:
            step: steps done; a step that is there already is left as it is.
            parameters: pytree of arrays.
            optimizer: pytree of arrays.
            data: JSON-ready state of the data pipeline.
            metric: by which the best are kept; the same on all processes. None: it is not known at this step.

        Raises:
            StoreError: this save cannot start, or the one before it failed.
        """
        self.wait()
        if step in agree.from_first(self.steps):
            return
        what = {PARAMETERS: parameters, OPTIMIZER: optimizer, DATA: data}
        if not is_bucket(self.directory) and not self.directory.parent.is_dir():
            raise StoreError(
                f"the checkpoint of step {step} could not be written: {self.directory.parent} is gone, moved or "
                "deleted while the run was under way"
            )
        # Checked first: orbax, whose threads wait for a directory that cannot be made, would hold up the error
        # and the end of the process for minutes.
        try:
            check_writable(self.directory, saved_bytes((parameters, optimizer)))
        except StoreError as error:
            raise StoreError(f"{error}; {_last_good(self.directory)}") from error
        metrics: Any = None if metric is None else {VALUE: metric}
        save = self._save = _Save(self.directory, step)
        try:
            with _explained(self.directory, step):
                response = self._writer().save_checkpointables_async(step, what, metrics=metrics)
        except StoreError:
            self._save, self._failed = None, True
            raise
        assert response is not None, "the policy saves every step that is asked for"
        save.follow(response)

    def _writer(self) -> ocp.training.Checkpointer:
        if self._checkpointer is None:
            policies: Any = {
                # When to save is the loop's decision.
                "save_decision_policy": ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                "preservation_policy": self._keep.policy(),
            }
            self._checkpointer = ocp.training.Checkpointer(
                str(self.directory),
                context=saved_step.context(Hooks(self._part_failed, self._before)),
                **policies,
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    def _part_failed(self, error: BaseException) -> None:
        if self._save is not None:
            self._save.fail(error)

    def check(self) -> None:
        """Has the save that runs in the background failed? Returns at once.

        Raises:
            StoreError: it has; the message names its step.
        """
        if self._save is not None:
            self._save.check()

    def wait(self) -> None:
        """Until no save is under way and the digests of the last one are written.

        Raises:
            StoreError: it failed.
        """
        if self._save is None:
            return
        try:
            self._save.wait()
        except StoreError:
            self._failed = True
            raise
        finally:
            self._save = None  # not before: it is told of parts that fail in the meantime

    def close(self) -> None:
        """Wait, then release what orbax holds.

        Raises:
            StoreError: a save failed.
        """
        try:
            self.wait()
        except StoreError:
            with contextlib.suppress(StoreError):  # the first error says more
                self._release()
            raise
        self._release()

    def _release(self) -> None:
        checkpointer, self._checkpointer = self._checkpointer, None
        # In a job of several processes, orbax's threads wait for the others, who do not come; the job is about to end.
        if checkpointer is None or (self._failed and jax.process_count() > 1):
            return
        # A failed save is raised once to each thread that waits for it. It has been reported, and would keep the rest
        # from being closed.
        with contextlib.suppress(Exception):
            checkpointer.wait()
        try:
            checkpointer.close()
        except Exception as error:  # what orbax writes about its files, on a full disk
            raise StoreError(
                f"checkpoints could not be written to {self.directory}: {first_line(error)}; {self.last_saved()}"
            ) from error

    def restore(self, step: int, parameters: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(parameters, optimizer, data) of a step, on the shardings of the abstract targets.

        Raises:
            StoreError: no such step, it is damaged, or it does not fit the targets.
        """
        found = self._at(step, {PARAMETERS: parameters, OPTIMIZER: optimizer, DATA: None})
        return found[PARAMETERS], found[OPTIMIZER], found[DATA]

    def restore_parameters(self, step: int, parameters: Any) -> Any:
        """Only the parameters of a step, on the shardings of the abstract target; the other files are not checked.

        Raises:
            StoreError: no such step, it is damaged, or it does not fit the target.
        """
        return self._at(step, {PARAMETERS: parameters})[PARAMETERS]

    def restore_newest(self, parameters: Any, optimizer: Any = None) -> Restored | None:
        """The newest sound checkpoint, on the shardings of the abstract targets, or None where none was saved.

        Damaged ones that are newer are named in one warning. A store that saves moves them aside, so that their steps
        can be saved again.

        Args:
            parameters: target.
            optimizer: target; None reads the parameters alone.

        Raises:
            StoreError: all checkpoints are damaged, or the newest sound one does not fit the targets.
        """
        targets = {PARAMETERS: parameters} | ({} if optimizer is None else {OPTIMIZER: optimizer, DATA: None})
        damaged: dict[int, str] = {}
        while ahead := agree.from_first([step for step in self.steps if step not in damaged]):
            step = ahead[-1]
            try:
                found = self._load(step, targets)
            except StoreError:
                # One process may be alone with it, so the others are not asked.
                if (self.directory / str(step)).is_dir():
                    raise
                continue
            except DamageError as error:
                # A run that trains meanwhile removes old checkpoints, and has newer ones then.
                if agree.from_first((self.directory / str(step)).is_dir()):
                    damaged[step] = str(error)
                continue
            if damaged:
                self._pass_over(damaged, step)
            return Restored(step, found[PARAMETERS], found.get(OPTIMIZER), found.get(DATA))
        if damaged:
            folders = " ".join(str(self.directory / str(step)) for step in damaged)
            raise StoreError(
                f"{self.directory} holds no sound checkpoint: {_listed(damaged)}; restore copies of them, or delete "
                f"{folders} to start the run again from its first step"
            )
        return None

    def _at(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        steps = agree.from_first(self.steps)
        if step not in steps:
            raise StoreError(f"{self.directory} has no checkpoint of step {step}; there are {steps or 'none'}")
        try:
            return self._load(step, targets)
        except DamageError as error:
            others = [other for other in steps if other != step]
            instead = f"take another step ({', '.join(map(str, others))})" if others else "it is the only one"
            raise StoreError(f"{self.directory / str(step)} is damaged: {error}; {instead}") from error

    def _load(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        folder = self.directory / str(step)
        verified = saved_step.verify(folder, targets)
        found = saved_step.load(folder, targets, verified=verified)
        if not verified and jax.process_index() == 0:
            log.warning(
                "warning: %s has no digests, so damage in it would not be noticed: an earlier version saved it, its "
                "job was killed just after the save, or the digests are not written yet",
                folder,
            )
        return found

    def _pass_over(self, damaged: Mapping[int, str], taken: int) -> None:
        """Say which checkpoints are not taken, and move them out of the way of a run that saves their steps again."""
        if jax.process_index() == 0:
            moved = {} if self._reader else {step: _set_aside(self.directory / str(step)) for step in damaged}
            names = " ".join(map(str, moved.values() if moved else (self.directory / str(step) for step in damaged)))
            what = f"moved to {names}, which can be deleted" if moved else f"delete {names}, or train on"
            log.warning(
                "warning: damaged checkpoints in %s: %s; using step %d, the newest sound checkpoint; %s",
                self.directory,
                _listed(damaged),
                taken,
                what,
            )
        agree.from_first(None)  # none goes on before they are moved


class _Save:
    """One save under way: a thread waits for orbax and then writes the digests."""

    def __init__(self, directory: Path, step: int):
        self._directory, self._step = directory, step
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def follow(self, response: Any) -> None:
        """Wait for what orbax has begun."""
        threading.Thread(target=self._finish, args=(response,), name="checkpoint digests").start()

    def _finish(self, response: Any) -> None:
        try:
            response.result()
            digests.write(self._directory / str(self._step), jax.process_index(), jax.process_count())
        except Exception as error:
            self.fail(error)
        self._ended.set()

    def fail(self, error: BaseException) -> None:
        """It failed, and nobody need wait any longer: the next caller raises the first error."""
        self._error = self._error or error
        self._ended.set()

    def wait(self) -> None:
        """Until it is done; raise StoreError if it failed."""
        self._ended.wait()
        self.check()

    def check(self) -> None:
        """Raise StoreError if it failed."""
        if self._error is not None:
            with _explained(self._directory, self._step):
                raise self._error


def _set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that its step is free."""
    aside = folder.with_name(f"{folder.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged.{number}")
    try:
        folder.rename(aside)
    except OSError as error:
        raise StoreError(f"{folder} is damaged and cannot be moved aside: {error.strerror or error}") from error
    return aside


def _listed(damaged: Mapping[int, str]) -> str:
    return ", ".join(f"step {step} ({why})" for step, why in damaged.items())


class _explained:
    """Turns what orbax raises on a failed write into one clear error."""

    def __init__(self, directory: Path, step: int):
        self._directory, self._step = directory, step

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, Exception):
            return
        if not is_bucket(self._directory) and not self._directory.is_dir():
            raise StoreError(
                f"the checkpoint of step {self._step} could not be written: {self._directory} is gone"
            ) from error
        last = _last_good(self._directory)
        full = not is_bucket(self._directory) and any(
            code in str(error) for code in (os.strerror(errno.ENOSPC), "ENOSPC", "RESOURCE_EXHAUSTED")
        )
        why = f"no space is left ({_gb(shutil.disk_usage(self._directory).free)} free)" if full else first_line(error)
        raise StoreError(
            f"the checkpoint of step {self._step} could not be written to {self._directory}: {why}; {last}"
        ) from error


def _last_good(directory: Path) -> str:
    """What a run that cannot save has left."""
    try:
        steps = saved_step.steps_in(directory)
    except Exception:  # the place that cannot be written may not be readable either
        steps = []
    if not steps:
        return "no step before it is saved"
    return f"the last step that is saved is {steps[-1]}, and the same command continues after it"


def saved_bytes(tree: Any) -> int:
    """Bytes that a job writes to its disk, which all processes share, when it saves a pytree of arrays, or of abstract
    ones. Replicas are written once."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract(tree: Any, shardings: Any) -> Any:
    """A restore target: shapes and dtypes of `tree` with these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

"""A directory that is there whole or not at all: made beside its place and moved there in one step."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import jax

from rave_jax.checkpoint.safetensors_file import CheckpointError

UNFINISHED = ".unfinished-"
LOCK = ".lock"
BEGINNING, GRACE = 0.5, 60.0
"""Seconds in which a new folder's lock may not be taken yet, and in which one without a lock may be somebody's."""


@contextlib.contextmanager
def written_whole(destination: Path, nbytes: int) -> Generator[Path | None]:
    """A new folder beside the destination, moved there in one step at the end; nothing is left after an error.

    A killed process leaves its folder. The next that writes into the same parent removes it.

    Args:
        destination: not there yet, or an empty directory.
        nbytes: how much will be written.

    Yields:
        the folder, or None in processes other than the first.

    Raises:
        CheckpointError: not free, read-only, full.
    """
    if jax.process_index() > 0:
        yield None
        return
    destination = Path(os.path.abspath(destination))
    folder = lock = None
    try:
        if destination.is_dir() and any(destination.iterdir()):
            raise CheckpointError(f"{destination}: exists already and is not empty; nothing was written")
        if destination.exists() and not destination.is_dir():
            raise CheckpointError(f"{destination}: exists already and is not a directory; nothing was written")
        blocking = next(p for p in destination.parents if p.exists())
        if not blocking.is_dir():
            raise CheckpointError(f"{destination}: {blocking} is not a directory; nothing was written")
        destination.parent.mkdir(parents=True, exist_ok=True)
        sweep(destination.parent)
        free = shutil.disk_usage(destination.parent).free
        if free < nbytes:
            raise CheckpointError(f"{destination}: {nbytes:,} bytes are needed, but {free:,} are free")
        folder = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}{UNFINISHED}"))
        lock = _locked(folder / LOCK, create=True)
        yield folder
        (folder / LOCK).unlink()
        folder.chmod(0o755)  # mkdtemp makes folders that only their owner reads
        folder.rename(destination)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {destination}: {error.strerror or error}; nothing is left there"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(parent: Path) -> list[Path]:
    """Remove the unfinished folders of dead processes; those that a live one has locked stay.

    Returns:
        the folders that were removed.
    """
    removed: list[Path] = []
    for folder in sorted(parent.glob(f".*{UNFINISHED}*")):
        try:
            if folder.is_symlink() or not folder.is_dir():
                continue
            age = time.time() - folder.stat().st_mtime
            if (folder / LOCK).is_file() and age > BEGINNING:
                lock = _locked(folder / LOCK, create=False)
            elif age > GRACE:
                lock = None
            else:
                continue
        except OSError:  # a live process holds it, it has just gone, or locks cannot be asked for here
            continue
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder)
        if lock is not None:
            os.close(lock)
    return removed


def _locked(file: Path, create: bool) -> int:
    """A descriptor of the file with its lock, which the system releases when the process ends, however it ends.

    Raises:
        OSError: another process has it.
    """
    descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        if create:
            return os.open(file, os.O_RDWR)  # a file system without locks: the folder is never swept by others
        raise
    return descriptor

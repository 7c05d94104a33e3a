"""Digests of a checkpoint's files: what was saved is known again before it is restored.

    STEP/digests.PROCESS.sha256   `SHA256  PATH` per line, of the files that this process wrote, and of those lines

The lines are those of `sha256sum`, so `cd STEP && sha256sum -c digests.0.sha256` looks for damage by hand (its last
line, which guards the others, begins with `#`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rave_jax.checkpoint.buckets import files_under, is_bucket

NAME = re.compile(r"digests\.(\d+)\.sha256")
_WRITTEN_BY = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)")
_LAST = re.compile(r"# ([0-9a-f]{64}) of the lines above, (\d+) processes")
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_THREADS = 8
_CHUNK = 2**24
_EMPTY = hashlib.sha256().hexdigest()


class DamageError(Exception):
    """A file is not as it was saved. The message names it, relative to the checkpoint, and says what is wrong."""


class Digests(NamedTuple):
    """What a checkpoint says of its files.

    Fields:
        files: sha256 by path relative to the checkpoint.
        complete: has every process that saved written its digests?
    """

    files: dict[str, str]
    complete: bool


def write(folder: Path, process: int = 0, processes: int = 1) -> None:
    """Write the digests of the files that one process wrote.

    Args:
        folder: a finished checkpoint.
        process: of which process; the first also takes the files that the job wrote once.
        processes: of the job.

    Raises:
        OSError: a file cannot be read, or the digests cannot be written.
    """
    names = [name for name in _files(folder) if _writer(name) == process]
    found = {name: digest for name, digest in _digests(folder, names).items() if digest}
    lines = "".join(f"{digest}  {name}\n" for name, digest in found.items())
    last = f"# {hashlib.sha256(lines.encode()).hexdigest()} of the lines above, {processes} processes\n"
    if is_bucket(folder):  # an object is there whole or not at all
        (folder / f"digests.{process}.sha256").write_text(lines + last)
        return
    partial = folder / f".digests.{process}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(lines + last)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / f"digests.{process}.sha256")


def read(folder: Path) -> Digests:
    """The digests of all processes.

    Raises:
        DamageError: a file of digests is not what was written.
        OSError: one cannot be read.
    """
    files: dict[str, str] = {}
    processes, found = 0, set()
    for path in folder.glob("digests.*.sha256"):
        lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
        last = _LAST.fullmatch(lines[-1].removesuffix("\n")) if lines and lines[-1].endswith("\n") else None
        rows = [_LINE.fullmatch(line.removesuffix("\n")) for line in lines[:-1]]
        name = NAME.fullmatch(path.name)
        if (
            name is None
            or last is None
            or not all(rows)
            or hashlib.sha256("".join(lines[:-1]).encode()).hexdigest() != last[1]
        ):
            raise DamageError(f"{path.name} {'is empty' if not lines else 'is not what was saved'}")
        files |= {row[2]: row[1] for row in rows if row}
        processes = max(processes, int(last[2]))
        found.add(int(name[1]))
    return Digests(files, complete=bool(found) and found == set(range(processes)))


def check(folder: Path, digests: Digests, names: Collection[str]) -> None:
    """Compare files with their digests.

    Args:
        folder: the checkpoint.
        digests: as `read` gave them.
        names: of the files, each with a digest.

    Raises:
        DamageError: one is missing or differs.
        OSError: one cannot be read for a reason that is no damage, such as its permissions.
    """
    for name in names:
        path = folder / name
        if not path.is_file():
            raise DamageError(f"{name} is missing" if not path.exists() else f"{name} is not a file")
    try:
        found = _digests(folder, names)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOENT):
            raise DamageError(
                f"{Path(error.filename or '').name or 'a file'} cannot be read: {error.strerror}"
            ) from error
        raise
    for name, digest in found.items():
        if digest != digests.files[name]:
            empty = digest == _EMPTY
            raise DamageError(f"{name} is empty" if empty else f"{name} is not what was saved (its sha256 differs)")


def _files(folder: Path) -> list[str]:
    names = files_under(folder)
    return [name for name in names if not (NAME.fullmatch(name) or name.startswith(".digests."))]


def _writer(name: str) -> int:
    found = _WRITTEN_BY.search(name)
    return int(found[1]) if found else 0


def _digests(folder: Path, names: Collection[str]) -> dict[str, str | None]:
    def one(name: str) -> str | None:
        if is_bucket(folder):
            return _of_object(folder / name)
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # hashlib releases the interpreter's lock, so files are read and digested in parallel.
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="digests") as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _of_object(path: Path) -> str | None:
    """Of an object in a bucket. None of one whose name ends with a slash, which fsspec cannot read: tensorstore calls
    `_sharding` so there, which no restore needs."""
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
    except (FileNotFoundError, IsADirectoryError):
        return None
    return found.hexdigest()

"""One job at a time in a run directory.

The lock is `flock` on a file, which the system releases when the process ends, however it ends. It holds between
processes of one machine, and between machines on file systems that pass locks on: NFS, and Lustre mounted with `flock`.
Where a file system has no locks, a warning says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Generator
from pathlib import Path

from rave_jax.config import ConfigError

NAME = ".lock"

log = logging.getLogger(__name__)


class InUse(ConfigError):
    """Another job holds the directory."""


@contextlib.contextmanager
def only_job(directory: Path) -> Generator[None]:
    """Hold the lock of a directory that is there; for one process of a job.

    Raises:
        InUse: another job holds it.
        OSError: the directory cannot be written.
    """
    path = directory / NAME
    file = _locked(path, directory)
    try:
        os.ftruncate(file, 0)
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}, started {began}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):  # the directory may be gone
            path.unlink()  # while it is held: the next process that locks it checks that it is still there
        os.close(file)


def _locked(path: Path, directory: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
            os.close(file)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warning(
                    "warning: %s is on a file system without locks (%s): whether another job uses it is not checked",
                    directory,
                    error.strerror,
                )
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            raise InUse(
                f"{directory} is in use by another job ({holder or 'its process is not known'}): wait until it ends, "
                "end it, or choose another output_dir"
            ) from None
        if _is_at(file, path):
            return file
        os.close(file)  # the job before this one removed it on its way out


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False

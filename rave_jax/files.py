"""Files that a user names. Only regular ones are opened: reading a pipe, a device or a socket could wait forever."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small text file starts that Git LFS leaves in place of a file that was not fetched."""
LFS_ADVICE = "a Git LFS pointer and not the file itself: fetch it with `git lfs pull`"

KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe, such as `<(...)` of a shell makes"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class NotAFile(OSError):
    """What is at a path cannot be read as a file; `strerror` says what it is."""

    def __init__(self, found: str, path: str | Path):
        super().__init__(errno.EINVAL, found, str(path))


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, open for reading. Nothing is waited for.

    Raises:
        NotAFile: a directory, named pipe, device or socket, or the pointer that Git LFS leaves.
        OSError: it is not there or cannot be opened.
        ValueError: no path that the system can hold.
    """
    check_regular(path, os.stat(path).st_mode)
    # Without O_NONBLOCK a pipe that took the file's place meanwhile would be waited on.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(path, os.fstat(descriptor).st_mode)
        if os.pread(descriptor, len(LFS_POINTER), 0) == LFS_POINTER:
            raise NotAFile(LFS_ADVICE, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | Path, mode: int) -> None:
    """Raise NotAFile unless `mode` (of `os.stat`) is that of a regular file."""
    if not stat.S_ISREG(mode):
        found = next((name for test, name in KINDS if test(mode)), "not a regular file")
        raise NotAFile(f"it is {found}; only regular files are read", path)


def read_bytes(path: str | Path) -> bytes:
    """All bytes of a regular file. Raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path) -> str:
    """All text of a regular UTF-8 file. Raises as `open_regular`, and ValueError where it is no UTF-8."""
    return read_bytes(path).decode("utf-8")


def check_folder(directory: str | Path, patterns: Iterable[str]) -> None:
    """See that a library may open the files of a directory that have such names; folders are passed over.

    Raises:
        OSError: one cannot be opened, or is no regular file; `filename` is its path.
    """
    for file in sorted({file for pattern in patterns for file in Path(directory).glob(pattern)}):
        if file.exists() and not file.is_dir():
            open_regular(file).close()

"""Files that are made from data once and kept beside it: where they lie, and how they are written whole or not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

FOLDER = ".rave_jax"
"""Folder beside the data that holds what was made from it. It can be deleted: what is needed is made again."""


def folder_beside(data: str | Path) -> Path:
    """The folder for what is made from a file or folder of data, made if need be.

    It is `.rave_jax` in the folder of the data. Where nothing can be written there, and for data that is not in the
    local file system, it is a folder of the user's cache (`$XDG_CACHE_HOME/rave_jax`, or `~/.cache/rave_jax`).

    Args:
        data: the path of a file or folder, or a URL such as gs://bucket/file.

    Raises:
        OSError: nothing can be written in either place.
    """
    if "://" not in str(data):
        beside = Path(os.path.abspath(data)).parent / FOLDER
        with contextlib.suppress(OSError):
            beside.mkdir(exist_ok=True)
            if os.access(beside, os.W_OK):
                return beside
        where = str(beside.parent)
    else:
        where = str(data).rpartition("/")[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rave_jax"
    folder = cache / hashlib.blake2b(where.encode(), digest_size=16).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name, then give it its own: a reader sees all of it or nothing.

    Raises:
        OSError: it cannot be written; what was there before is there still.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise

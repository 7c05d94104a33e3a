"""Folders in gs:// buckets, beside local ones.

Both have the operations of `pathlib`: a folder in a bucket is an `epath.Path`, whose files fsspec and gcsfs read, while
orbax writes arrays by tensorstore. A bucket has no directories, no appending, no locks and no renaming in one step: a
checkpoint there is finished when orbax has written `commit_success.txt` into it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import fsspec
import fsspec.config
from etils import epath

from rave_jax.config import ConfigError

SCHEME = "gs"
COMMITTED = "commit_success.txt"
"""What orbax writes last into a checkpoint in a bucket."""

# Listings are read anew each time: other processes, and tensorstore in this one, write what fsspec does not see.
for _protocol in (SCHEME, "gcs"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


def is_bucket(path: object) -> bool:
    """Is this a folder or file in a bucket?"""
    return str(path).startswith(f"{SCHEME}://")


def folder_at(path: str | Path) -> Path:
    """The folder at a local path, made absolute, or at a `gs://` URL.

    Raises:
        ConfigError: the URL names no folder in a bucket, or the package that reads buckets is missing.
    """
    if not is_bucket(path):
        return Path(path).resolve()
    bucket, _, name = str(path).removeprefix(f"{SCHEME}://").strip("/").partition("/")
    if not bucket or not name:
        raise ConfigError(f"{str(path)!r} names no folder in a bucket, expected gs://BUCKET/FOLDER")
    file_system()
    return cast(Path, epath.Path(f"{SCHEME}://{bucket}/{name}"))


def file_system() -> Any:
    """What fsspec reads and writes buckets with.

    Raises:
        ConfigError: the package is missing.
    """
    registered = fsspec.registry.get("gcs")
    if registered is None and importlib.util.find_spec("gcsfs") is None:
        raise ConfigError("gs:// buckets need the package gcsfs: pip install 'rave-jax[gcs]'")
    return fsspec.filesystem("gcs")


def files_under(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, ascending."""
    if is_bucket(folder):
        start = str(folder).removeprefix(f"{SCHEME}://") + "/"
        return sorted(name.removeprefix(start) for name in file_system().find(str(folder)))
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found)


def is_committed(checkpoint: Path) -> bool:
    """Has the save of this checkpoint finished? On a disk its folder has another name until then."""
    return not is_bucket(checkpoint) or (checkpoint / COMMITTED).exists()

"""Folders in gs:// and s3:// buckets, beside local ones.

All have the operations of `pathlib`: a folder in a bucket is an `epath.Path`, whose files fsspec reads with gcsfs or
s3fs, while orbax writes arrays by tensorstore. A bucket has no directories, no appending, no locks and no renaming in
one step: a checkpoint there is finished when orbax has written `commit_success.txt` into it.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple, cast

import fsspec
import fsspec.config
from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from rave_jax.config import ConfigError


class Kind(NamedTuple):
    """A kind of bucket.

    Fields:
        protocol: its name in fsspec.
        package: that fsspec reads it with.
        extra: of this package, which installs that one.
    """

    protocol: str
    package: str
    extra: str


KINDS = {"gs": Kind("gcs", "gcsfs", "gcs"), "s3": Kind("s3", "s3fs", "s3")}
"""By the scheme of a URL."""
COMMITTED = "commit_success.txt"
"""What orbax writes last into a checkpoint in a bucket."""

# Listings are read anew each time: other processes, and tensorstore in this one, write what fsspec does not see.
for _name in (*KINDS, "gcs"):
    fsspec.config.conf.setdefault(_name, {}).setdefault("use_listings_cache", False)


def scheme_of(path: object) -> str:
    """The scheme of a URL of a bucket; "" for everything else."""
    scheme, found, _ = str(path)[:10].partition("://")
    return scheme if found and scheme in KINDS else ""


def is_bucket(path: object) -> bool:
    """Is this a folder or file in a bucket?"""
    return bool(scheme_of(path))


def folder_at(path: str | Path) -> Path:
    """The folder at a local path, made absolute, or at a URL of a bucket.

    Raises:
        ConfigError: the URL names no folder in a bucket, or the package that reads buckets is missing.
    """
    scheme = scheme_of(path)
    if not scheme:
        return Path(path).resolve()
    bucket, _, name = str(path).removeprefix(f"{scheme}://").strip("/").partition("/")
    if not bucket or not name:
        raise ConfigError(f"{str(path)!r} names no folder in a bucket, expected {scheme}://BUCKET/FOLDER")
    file_system(path)
    if scheme == "s3":
        _let_orbax_write_s3()
    return cast(Path, epath.Path(f"{scheme}://{bucket}/{name}"))


def file_system(path: object) -> Any:
    """What fsspec reads and writes the bucket of a URL with.

    Raises:
        ConfigError: the package is missing.
    """
    kind = KINDS[scheme_of(path)]
    if kind.protocol not in fsspec.registry and importlib.util.find_spec(kind.package) is None:
        needs = f"{scheme_of(path)}:// buckets need the package {kind.package}"
        raise ConfigError(f"{needs}: pip install 'rave-jax[{kind.extra}]'")
    return fsspec.filesystem(kind.protocol)


def files_under(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, ascending."""
    if is_bucket(folder):
        start = str(folder).partition("://")[2] + "/"
        names = (name.removeprefix(start) for name in file_system(folder).find(str(folder)))
        return sorted(name for name in names if name and not name.endswith("/"))
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found)


def is_committed(checkpoint: Path) -> bool:
    """Has the save of this checkpoint finished? On a disk its folder has another name until then."""
    return not is_bucket(checkpoint) or (checkpoint / COMMITTED).exists()


@functools.cache
def _let_orbax_write_s3() -> None:
    """Orbax asks in four places whether a path is one of gs://, and knows nothing of s3://, for which tensorstore has a
    driver like that of gs://. Here these places learn of it."""
    kvstore, normalized = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path

    def with_s3(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return kvstore(path)
        bucket, name = gcs_utils.parse_gcs_path(path)
        return {"driver": "s3", "bucket": bucket, "path": name}

    patched: dict[Any, dict[str, Any]] = {
        gcs_utils: {"_GCS_PATH_PREFIX": ("gs://", "s3://"), "get_kvstore_for_gcs": with_s3},
        tensorstore_utils: {
            "_use_gcs_driver": is_bucket,
            "_normalize_path": lambda path: normalized(path).replace("s3:/", "s3://"),
        },
    }
    for module, names in patched.items():
        for name, value in names.items():
            if not hasattr(module, name):
                raise ConfigError(f"this version of orbax cannot be taught s3:// (it has no {name}): use gs://")
            setattr(module, name, value)

"""A folder that stands for all buckets: fsspec and orbax read and write it in place of Google's and Amazon's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils

from rave_jax.checkpoint.buckets import _let_orbax_write_s3


def pretend(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Let `gs://BUCKET/NAME` and `s3://BUCKET/NAME` be `root/BUCKET/NAME` for as long as the patch holds."""

    class Folder(DirFileSystem):
        cachable = False

        def __init__(self, **_: Any):
            super().__init__(path=str(root), fs=LocalFileSystem(auto_mkdir=True))

        def _join(self, path: Any) -> Any:
            one = isinstance(path, (str, os.PathLike))
            return super()._join(os.fspath(path).split("://", 1)[-1] if one else path)

        def find(self, path: str, *given: Any, **named: Any) -> Any:
            found = super().find(path, *given, **named)
            return [name.removesuffix("/object") for name in found]

    _let_orbax_write_s3()
    asked = gcs_utils.get_kvstore_for_gcs

    def kvstore(path: str) -> dict[str, Any]:
        spec = asked(path)
        bucket, name = spec["bucket"], spec["path"]
        # In a bucket a slash may end the name of an object, which fsspec then takes for a folder.
        place = f"{root}/{bucket}/{name}"
        return {"driver": "file", "path": place.replace("/_sharding/", "/_sharding/object")}

    for name in ("gs", "gcs", "s3"):
        patch.setitem(_registry, name, Folder)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    patch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda _: False)

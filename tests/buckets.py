"""A folder that stands for all gs:// buckets: fsspec and orbax read and write it in place of Google's."""

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


def pretend(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Let `gs://BUCKET/NAME` be `root/BUCKET/NAME` for as long as the patch holds."""

    class Folder(DirFileSystem):
        cachable = False

        def __init__(self, **_: Any):
            super().__init__(path=str(root), fs=LocalFileSystem(auto_mkdir=True))

        def _join(self, path: Any) -> Any:
            one = isinstance(path, (str, os.PathLike))
            return super()._join(os.fspath(path).split("://", 1)[-1] if one else path)

    def kvstore(path: str) -> dict[str, Any]:
        bucket, name = gcs_utils.parse_gcs_path(path)
        # In a bucket a slash may end the name of an object.
        return {"driver": "file", "path": f"{root}/{bucket}/{name}".replace("/_sharding/", "/_sharding")}

    for name in ("gs", "gcs"):
        patch.setitem(_registry, name, Folder)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    patch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda _: False)

"""Which pictures a request may name: those below one folder, so that a file from somebody else reads no others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rave_jax.config import ConfigError


@dataclass(frozen=True)
class PictureFolder:
    """Where the pictures of requests lie.

    Attributes:
        base: folder that relative paths start from, absolute.
        root: folder that pictures must lie below, without links.
    """

    base: Path
    root: Path

    @classmethod
    def of(cls, base: Path, root: Path | None = None) -> PictureFolder:
        """The folder for requests that stand in `base`, under `--image-dir` where it is given.

        Raises:
            ConfigError: `root` is no folder.
        """
        if root is not None and not root.is_dir():
            raise ConfigError(f"--image-dir {root}: {'not a folder' if root.exists() else 'no such folder'}")
        base = Path(os.path.abspath(base))
        return cls(base, Path(os.path.realpath(base if root is None else root)))

    def find(self, path: str) -> str:
        """The file that a path leads to, links followed. It need not be there.

        Raises:
            ConfigError: it lies outside of the folder, or no file can have such a path.
        """
        try:
            found = Path(os.path.realpath(self.base / path))
        except ValueError as error:  # a null character, or text that no file name can hold
            raise ConfigError(f"no file can have the path {path[:200]!r}: {error}") from error
        if not found.is_relative_to(self.root):
            raise ConfigError(
                f"the picture {path[:200]!r} lies outside of {self.root}, "
                "the folder that requests may name pictures in: move it there, or give --image-dir FOLDER with a "
                "folder that it lies in"
            )
        return str(found)

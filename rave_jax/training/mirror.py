"""A run directory in a bucket, and the local folder that stands for it.

Checkpoints are written to the bucket and read from there by all processes. Whatever else a run writes (config, metrics,
model files, evaluations, report) goes into a local folder that ends with the process, and process 0 copies what has
changed to the bucket: in the background, beside every save, and at the end. A start copies it from there, so
hosts need no common disk.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from pathlib import Path
from typing import Any

from rave_jax.checkpoint.buckets import file_system, files_under, folder_at
from rave_jax.checkpoint.saved_step import StoreError, first_line

STAYS = ("checkpoints", "bad_step", "tensorboard", ".lock")
"""What is not copied from the bucket: what is read there, and events, of which each start writes a new file."""
UNFINISHED = (".tmp", ".partial")
EVERY = 30.0
"""Seconds between two looks for what has changed."""

log = logging.getLogger(__name__)


class Mirror:
    """A folder in a bucket and its local copy. Any thread may call `push`."""

    def __init__(self, url: str):
        """
        Args:
            url: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.

        Raises:
            ConfigError: no such URL, or the package that reads buckets is missing.
        """
        self.url = str(folder_at(url))
        self._held = tempfile.TemporaryDirectory(prefix="rave_jax-run-")
        self.local = Path(self._held.name)
        self._known: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def pull(self, *only: str) -> None:
        """Copy files from the bucket: all, or those of these names at its top.

        Raises:
            StoreError: the bucket cannot be read.
        """
        fs = file_system(self.url)
        try:
            with self._lock:
                for name in files_under(folder_at(self.url)):
                    top = name.split("/")[0]
                    if top in STAYS or (only and top not in only):
                        continue
                    target = self.local / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    fs.get_file(f"{self.url}/{name}", str(target))
                    self._known[name] = _stamp(target)
        except Exception as error:  # fsspec, gcsfs and google's libraries raise kinds of their own
            raise StoreError(f"cannot read {self.url}: {first_line(error)}") from error

    def push(self) -> None:
        """Copy what has changed since the last time to the bucket, and remove there what was removed here.

        Raises:
            StoreError: the bucket cannot be written.
        """
        fs = file_system(self.url)
        try:
            with self._lock:
                there = {name: _stamp(self.local / name) for name in files_under(self.local) if _is_whole(name)}
                for name, stamp in there.items():
                    if stamp is not None and self._known.get(name) != stamp:
                        fs.pipe_file(f"{self.url}/{name}", (self.local / name).read_bytes())
                        self._known[name] = stamp
                for name in self._known.keys() - there.keys():
                    fs.rm_file(f"{self.url}/{name}")
                    del self._known[name]
        except Exception as error:
            raise StoreError(f"cannot write to {self.url}: {first_line(error)}") from error

    def start(self) -> None:
        """Push from time to time, in the background."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._repeat, name="mirror", daemon=True)
            self._thread.start()

    def _repeat(self) -> None:
        said = False
        while not self._closed.wait(EVERY):
            try:
                self.push()
                said = False
            except StoreError as error:
                if not said:
                    log.warning("warning: %s; it is tried again", error)
                said = True

    def close(self) -> None:
        """Push for the last time where pushing was begun.

        Raises:
            StoreError: the bucket cannot be written.
        """
        if self._thread is not None and not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self.push()


def _is_whole(name: str) -> bool:
    return not any(part.endswith(UNFINISHED) for part in name.split("/"))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:  # it was moved meanwhile
        return None
    return found.st_mtime_ns, found.st_size

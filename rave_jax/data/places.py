"""Files of data by local path or by URL: bytes at any offset, and what tells that a file is still the same.

A local path is read by the system, `gs://`, `s3://` and `memory://` by fsspec, a range at a time. `file://` is a local
path. Addresses of the web are not downloaded.
"""

from __future__ import annotations

import abc
import errno
import glob
import io
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from rave_jax.data.beside import FOLDER
from rave_jax.files import LFS_ADVICE, LFS_POINTER, NotAFile, open_regular

SCHEMES = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "memory": ""}
"""Schemes of URLs that are read, and the extra of this package that reads them."""
CHUNK = 2**23
"""Bytes that a scan over a file reads at once."""


def scheme_of(path: object) -> str:
    """The scheme of a URL that is read by fsspec; "" for everything else."""
    scheme, found, _ = str(path)[:20].partition("://")
    return scheme.lower() if found and scheme.lower() in SCHEMES else ""


class Url:
    """A URL with the few parts of a `Path` that files of data need."""

    def __init__(self, text: str):
        self._scheme, _, inner = text.partition("://")
        self._inner = PurePosixPath(inner.lstrip("/"))

    def __str__(self) -> str:
        return f"{self._scheme}://{self._inner}"

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self._scheme}://{posixpath.normpath(self._inner / name)}")

    @property
    def parent(self) -> Url:
        return Url(f"{self._scheme}://{self._inner.parent}")

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def stem(self) -> str:
        return self._inner.stem

    @property
    def suffix(self) -> str:
        return self._inner.suffix

    def resolve(self) -> Url:
        return self


Place = Path | Url
"""Where a file or folder of data is."""


def place(path: str | Path | Url) -> Place:
    """A local path, or a URL of a scheme that is read."""
    if isinstance(path, (Path, Url)):
        return path
    return Url(path) if scheme_of(path) else Path(path.removeprefix("file://"))


def inside(folder: Place, name: str) -> str:
    """What a record in a folder names: relative to the folder, an absolute path, or a URL of its own."""
    return name if scheme_of(name) else str(folder / name)


class File(abc.ABC):
    """Bytes of one file. Any thread may read.

    Attributes:
        place: where it is.
        size: bytes.
        stamp: changes when the file is written again: the time of the last change, or the mark that a bucket gives.
    """

    place: Place
    size: int
    stamp: str

    @abc.abstractmethod
    def read(self, start: int, length: int) -> bytes:
        """Bytes from `start` on: as many as asked for, unless the file ends before.

        Raises:
            OSError: they cannot be read.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def chunks(self, start: int = 0, stop: int | None = None, size: int = 0) -> Iterator[bytes]:
        """The bytes from `start` to `stop` (or the end), in pieces.

        Raises:
            OSError: they cannot be read, or the file is shorter than it was.
        """
        stop = self.size if stop is None else stop
        while start < stop:
            piece = self.read(start, min(size or CHUNK, stop - start))
            if not piece:
                raise OSError(errno.EIO, "the file became shorter while it was read", str(self.place))
            yield piece
            start += len(piece)


class _Local(File):
    def __init__(self, path: Path):
        self.place = path
        self._file = open_regular(path)
        found = os.fstat(self._file.fileno())
        self.size, self.stamp = found.st_size, str(found.st_mtime_ns)

    def read(self, start: int, length: int) -> bytes:
        # pread keeps no position, so threads may read at once.
        found = os.pread(self._file.fileno(), length, start)
        while 0 < len(found) < length and (
            more := os.pread(self._file.fileno(), length - len(found), start + len(found))
        ):
            found += more
        return found

    def close(self) -> None:
        self._file.close()


class _Remote(File):
    def __init__(self, url: Url):
        self.place = url
        self._system = _system(str(url))
        with _OsErrors(str(url)):
            facts = self._system.info(str(url))
        if facts.get("type") == "directory":
            raise NotAFile("it is a directory; only regular files are read", str(url))
        self.size, self.stamp = int(facts["size"]), _mark(facts)
        if self.size and self.read(0, len(LFS_POINTER)) == LFS_POINTER:
            raise NotAFile(LFS_ADVICE, str(url))

    def read(self, start: int, length: int) -> bytes:
        stop = min(start + length, self.size)
        if start >= stop:
            return b""  # of no bytes a bucket would give all
        with _OsErrors(str(self.place)):
            return self._system.cat_file(str(self.place), start, stop)

    def close(self) -> None:
        """Nothing is held open between reads."""


def _mark(facts: dict[str, Any]) -> str:
    """What a bucket changes when a file is written again."""
    for name in ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "updated", "modified", "created"):
        if facts.get(name):
            return f"{name}={facts[name]}"
    return ""


class _OsErrors:
    """Errors of fsspec's file systems, each of which has its own, as OSError."""

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", self._path) from error
        if isinstance(error, Exception) and not isinstance(error, NotAFile):
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", self._path) from error


def _system(url: str) -> Any:
    """The file system of fsspec that a URL is in.

    Raises:
        OSError: its package is not installed, or it cannot be reached.
    """
    import fsspec

    scheme = scheme_of(url)
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        install = f"pip install 'rave-jax[{SCHEMES[scheme]}]'"
        raise OSError(errno.ENOPKG, f"{scheme}:// needs a package that is missing: {install}", url) from error
    except Exception as error:
        raise OSError(errno.EIO, f"{scheme}:// cannot be reached: {type(error).__name__}: {error}", url) from error


def open_place(where: str | Place) -> File:
    """A regular file, open for reading.

    Raises:
        OSError: it is not there, is none, or cannot be read; `strerror` says why.
        ValueError: no path that the system can hold.
    """
    found = place(where)
    return _Remote(found) if isinstance(found, Url) else _Local(found)


class _Raw(io.RawIOBase):
    """A file as a stream that seeks; every read asks for a range."""

    def __init__(self, file: File):
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._file.read(self._at, len(buffer))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def stream(where: str | Place, buffer: int = 2**17) -> BinaryIO:
    """A regular file as a stream that seeks; of a URL, ranges of at least `buffer` bytes are asked for.

    Raises:
        OSError, ValueError: as `open_place`.
    """
    found = place(where)
    if isinstance(found, Path):
        return open_regular(found)
    return io.BufferedReader(_Raw(_Remote(found)), buffer)


def find_files(where: str, suffix: str) -> list[Place]:
    """Files by one path, folder, glob pattern or URL, in the order of their names.

    Args:
        where: a folder gives the files below it that have the suffix.
        suffix: such as ".parquet".

    Raises:
        OSError: a place cannot be listed.
    """
    return [place(name) for name in list_files(where, suffix)]


def list_files(where: str, suffix: str = "") -> list[str]:
    """The names that `find_files` gives places of."""
    if scheme_of(where):
        return _list_remote(where, suffix)
    path = Path(where.removeprefix("file://"))
    if path.is_dir():
        found = []
        for folder, folders, names in os.walk(path, onerror=_raise):
            folders[:] = [name for name in folders if name != FOLDER]
            found += [os.path.join(folder, name) for name in names if name.endswith(suffix)]
    elif path.exists():
        found = [str(path)]
    else:
        found = glob.glob(str(path), recursive=True)
    return sorted(found, key=lambda name: name.split(os.sep))


def _list_remote(where: str, suffix: str) -> list[str]:
    system, scheme = _system(where), where.partition("://")[0]
    with _OsErrors(where):
        if any(sign in where for sign in "*?["):
            names = system.glob(where)
        elif system.isdir(where):
            names = [name for name in system.find(where) if name.endswith(suffix)]
        else:
            names = [where.partition("://")[2]] if system.exists(where) else []
    return sorted((f"{scheme}://{name.lstrip('/')}" for name in names), key=lambda name: name.split("/"))


def _raise(error: OSError) -> None:
    raise error

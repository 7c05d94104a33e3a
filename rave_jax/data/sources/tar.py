"""Samples of tar files by an index of their members, kept beside each file.

Consecutive members whose names are the same up to the first dot are a sample, as WebDataset has them. The index is made
from the headers of members; members are read when they are asked for.
"""

from __future__ import annotations

import bisect
import logging
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rave_jax.config import ConfigError
from rave_jax.data import flat
from rave_jax.data.places import File, Place, open_place, stream
from rave_jax.data.sample import Part, SampleError
from rave_jax.data.sources.blocks import digest
from rave_jax.data.sources.captions import EXTENSIONS
from rave_jax.data.sources.files import fingerprint_of_file, open_file, other_kind

log = logging.getLogger(__name__)

VERSION = 1
KEPT_OPEN = 64
"""Tar files that stay open for reading."""
NO_FILE = -1
"""Size of a member that is no regular file."""


Record = dict[str, Any]


class Member(NamedTuple):
    """A member of a sample.

    Fields:
        name: in the tar.
        extension: of the name, from its first dot on, in small letters.
        data: its bytes; b"" where they were not asked for.
        size: of the bytes.
    """

    name: str
    extension: str
    data: bytes
    size: int


def split_name(name: str) -> tuple[str, str]:
    """The key of a member and its extension: the name up to the first dot of its last part, and what is behind it."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension.lower()


class Tar:
    """Samples of one tar file.

    Raises:
        ConfigError: it is no tar file, or cannot be read.
    """

    def __init__(self, where: Place):
        self.place = where
        file = open_file(where)
        try:
            start = file.read(0, 512)
            kind = "" if start[257:262] == b"ustar" else other_kind(start)
            if kind not in ("", "binary data"):
                raise ConfigError(f"{where}: expected a tar file, and this is {kind}")
            self.identity = flat.identity(file)
            self.facts, self._arrays = self._index(file)
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"{where}: expected a tar file: {error}") from error
        finally:
            file.close()
        self.fingerprint: str = self.facts["fingerprint"]

    def __len__(self) -> int:
        return len(self._arrays["first"])

    def _index(self, file: File) -> flat.Flat:
        wanted = {"version": VERSION, **self.identity}
        found = flat.load(str(self.place), "tar")
        if found is None or {name: found.facts.get(name) for name in wanted} != wanted:
            facts, arrays = _scan(self.place, file.size)
            seen = digest(fingerprint_of_file(file).encode())
            for array in arrays.values():
                seen.update(np.ascontiguousarray(array).data)
            found = flat.keep(str(self.place), "tar", {**wanted, **facts, "fingerprint": seen.hexdigest()}, arrays)
        if found.facts["broken"]:
            count = len(found.arrays["first"])
            rest = f"{count:,} samples are used, the last of which may lack members"
            if found.facts["partial"]:
                rest = f"{count - 1:,} samples are whole and used and 1 is not"
            log.warning("%s: %s: %s", self.place, found.facts["broken"], rest)
        return found

    def members(self, index: int) -> list[tuple[str, int, int]]:
        """(name, byte at which it begins, size) of the members of a sample."""
        firsts, ends = self._arrays["first"], self._arrays["name_end"]
        first = int(firsts[index])
        last = int(firsts[index + 1]) if index + 1 < len(self) else len(ends)
        found = []
        for number in range(first, last):
            begin = int(ends[number - 1]) if number else 0
            name = bytes(self._arrays["names"][begin : int(ends[number])]).decode("utf-8", "surrogateescape")
            found.append((name, int(self._arrays["offset"][number]), int(self._arrays["size"][number])))
        return found


def _scan(where: Place, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Headers of all members, and what is wrong with the end of the file."""
    first: list[int] = []
    offsets, sizes, ends, names, last_key = [], [], [], bytearray(), None
    broken, partial = "", False
    with stream(where, 2**16) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
        while True:
            try:
                member = tar.next()
            except tarfile.TarError:
                member = None
            vars(tar)["members"] = []  # else it holds them all
            if member is None:
                break
            if member.isdir() or member.name.rpartition("/")[2].startswith((".", "__")):
                continue
            key, _ = split_name(member.name)
            if key != last_key:
                first.append(len(offsets))
                last_key = key
            offsets.append(member.offset_data)
            sizes.append(member.size if member.isreg() and not member.issparse() else NO_FILE)
            names += member.name.encode("utf-8", "surrogateescape")
            ends.append(len(names))
            if sizes[-1] != NO_FILE and member.offset_data + member.size > size:
                partial = True
                break
        end = min(tar.offset, size)
    with stream(where) as opened:
        opened.seek(end)
        mark = opened.read(512)
    if partial:
        broken = f"the tar file is cut off in the member {member.name!r}" if member else ""
    elif mark != b"\0" * 512:
        broken = (
            f"the tar file {'is damaged or cut off' if mark.strip(bytes(1)) else 'has no end mark'} at byte {end:,}"
        )
    arrays = {"first": first, "offset": offsets, "size": sizes, "name_end": ends}
    found = {name: np.array(values, np.int64) for name, values in arrays.items()}
    return {"broken": broken, "partial": partial}, {**found, "names": np.frombuffer(bytes(names), np.uint8)}


class Tars:
    """Samples of several tar files, by number over all of them, as `Records`."""

    def __init__(self, places: Sequence[Place], ignored: frozenset[str], read: Callable[[str, list[Member]], Record]):
        """
        Args:
            places: of the files.
            ignored: extensions of members that are not read.
            read: makes a record of a key and its members.
        """
        self._tars = [Tar(where) for where in places]
        self._starts = np.cumsum([0, *(len(tar) for tar in self._tars)]).tolist()
        self._ignored, self._read = ignored, read
        self._open: OrderedDict[int, File] = OrderedDict()
        self._lock = threading.Lock()
        self.path = places[0]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def parts(self) -> tuple[Part, ...]:
        """A part for each file."""
        return tuple(Part(len(tar), tar.fingerprint, str(tar.place)) for tar in self._tars)

    @property
    def fingerprint(self) -> str:
        """Of the files in their order."""
        return digest("\n".join(tar.fingerprint for tar in self._tars).encode()).hexdigest()

    def _at(self, index: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def where(self, index: int) -> str:
        """The tar file and the key of the sample in it."""
        number, _ = self._at(index)
        return f"{self._tars[number].place}/{self.key(index)}"

    def key(self, index: int) -> str:
        """The key of a sample."""
        number, inside = self._at(index)
        return split_name(self._tars[number].members(inside)[0][0])[0]

    def members(self, index: int, pictures: bool = True) -> list[Member]:
        """The members of a sample; those with an extension that is ignored are left out.

        Args:
            index: of the sample.
            pictures: False leaves out pictures too.

        Raises:
            SampleError: one cannot be read.
        """
        number, inside = self._at(index)
        tar, found = self._tars[number], []
        if tar.facts["partial"] and inside == len(tar) - 1:
            raise SampleError(f"{self.where(index)}: {tar.facts['broken']}")
        for name, offset, size in tar.members(inside):
            extension = split_name(name)[1]
            if extension in self._ignored or (not pictures and extension.rpartition(".")[2] in EXTENSIONS):
                continue
            if size == NO_FILE:
                raise SampleError(f"{tar.place}/{name}: a link or a device; only files are read")
            try:
                data = self._file(number).read(offset, size)
            except OSError as error:
                raise SampleError(f"{tar.place}/{name}: cannot be read: {error.strerror or error}") from error
            if len(data) < size:
                raise SampleError(f"{tar.place}/{name}: the tar file became shorter while it was in use")
            found.append(Member(name, extension, data, size))
        return found

    def _file(self, number: int) -> File:
        with self._lock:
            if (file := self._open.get(number)) is not None:
                self._open.move_to_end(number)
                return file
        tar = self._tars[number]
        file = open_place(tar.place)
        if (file.size, file.stamp) != (tar.identity["size"], tar.identity["stamp"]):
            raise OSError(0, "it has changed since it was opened: put it back as it was")
        with self._lock:
            self._open[number] = file
            while len(self._open) > KEPT_OPEN:
                self._open.popitem(last=False)  # closed when no thread reads it any more
        return file

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record of a sample."""
        members = self.members(index)
        try:
            return self._read(self.key(index), members)
        except SampleError as error:
            raise error.at(self.where(index)) from error

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        """The records from `start` to `stop` without their pictures; None for one that cannot be read."""
        for index in range(start, stop):
            try:
                yield self._read(self.key(index), self.members(index, pictures=False))
            except SampleError:
                yield None

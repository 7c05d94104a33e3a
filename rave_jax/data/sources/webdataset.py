"""WebDataset: tar files in which members of one key are a sample, pictures and videos beside JSON or a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rave_jax.config import ConfigError, require, shown
from rave_jax.data.places import SCHEMES, Place, find_files
from rave_jax.data.sample import METRICS, Sample, SampleError
from rave_jax.data.sources.captions import CAPTIONS, EXTENSIONS, FILMS, sample_of
from rave_jax.data.sources.files import parse
from rave_jax.data.sources.filters import FieldIs
from rave_jax.data.sources.keys import is_empty
from rave_jax.data.sources.records import RecordSource
from rave_jax.data.sources.tar import Member, Tars
from rave_jax.data.sources.visuals import IMAGE_KEYS, VIDEO_KEYS

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MOST_SHARDS = 10**6


@dataclass(frozen=True)
class WebDataset:
    """Samples of tar files."""

    path: str = ""
    """A tar file, a folder of them, a glob pattern, or a list in braces such as shard-{000..099}.tar. It may be a URL,
    gs://... or s3://..."""
    question: str = ""
    """What is asked about the pictures of a sample that has a caption alone."""
    suffix: str = ""
    """Text added after every question."""
    metric: str = "exact_match"
    """How predictions are scored where a sample names no metric: exact_match, relaxed_accuracy or anls."""
    name: str = ""
    """Name in tables; empty for the name of the first file."""
    ignored: tuple[str, ...] = ()
    """Extensions of members, and keys of records, that are left out: nothing is learned from them."""
    where: tuple[FieldIs, ...] = ()
    """Which samples are used, by fields of their records; all of these hold. Empty for every sample."""

    url_schemes: ClassVar = tuple(SCHEMES)

    def __post_init__(self) -> None:
        require(self.metric in METRICS, "metric", self.metric, f"one of {', '.join(METRICS)}")

    def build(self) -> WebDatasetSource:
        """The source.

        Raises:
            ConfigError: no such file, or one that is no tar file.
        """
        return WebDatasetSource(self)


class WebDatasetSource(RecordSource):
    """Samples of tar files, by number over all of them."""

    def __init__(self, config: WebDataset):
        tars = Tars(_shards(config.path), frozenset(config.ignored), record_of)
        self.name = config.name or tars.path.stem
        self._asked, self._metric, self._suffix = config.question, config.metric, config.suffix
        super().__init__(config, tars, tars.path.parent)

    def sample(self, record: dict[str, Any], index: int, where: str) -> Sample:
        """The sample of a record."""
        return sample_of(record, index, where, self, self._asked, self._metric, self._suffix)


def _shards(path: str) -> list[Place]:
    if not path:
        raise ConfigError("path is empty, expected a tar file, a folder of them, a glob pattern or a list in braces")
    found: list[Place] = []
    for each in in_braces(path):
        try:
            files = find_files(each, ".tar")
        except OSError as error:
            raise ConfigError(f"{each[:100]!r}: cannot be read: {error.strerror or error}") from error
        if not files:
            raise ConfigError(f"{each!r}: no tar file there")
        found += files
    return found


def in_braces(path: str) -> list[str]:
    """The paths that a list in braces stands for: `{000..012}` counts, `{a,b}` names.

    Raises:
        ConfigError: they are more than `MOST_SHARDS`.
    """
    if found := RANGE.search(path):
        first, last = int(found[1]), int(found[2])
        require(0 <= last - first < MOST_SHARDS, "path", path, "a range in braces from its least number to its largest")
        items = [str(number).zfill(len(found[1])) for number in range(first, last + 1)]
    elif found := CHOICE.search(path):
        items = found[1].split(",")
    else:
        return [path]
    return [each for item in items for each in in_braces(f"{path[: found.start()]}{item}{path[found.end() :]}")]


def record_of(key: str, members: Sequence[Member]) -> dict[str, Any]:
    """The record of a sample: its JSON, its caption, its pictures and videos in the order of the tar, and its key as
    `id`.

    Raises:
        SampleError: JSON that is broken or no object, two members that say the same, or pictures or videos that the
            JSON does not name although it names some.
    """
    record: dict[str, Any] = {}
    pictures: dict[str, bytes] = {}
    videos: dict[str, bytes] = {}
    for member in members:
        kind = member.extension.rpartition(".")[2]
        if kind in (*EXTENSIONS, *FILMS):
            held, name = videos if kind in FILMS else pictures, member.name.rpartition("/")[2]
            if held.get(name, member.data) != member.data:
                raise SampleError(f"two members of the sample have the name {name!r}, and they differ")
            held[name] = member.data
            continue
        if kind == "json":
            try:
                more = parse(member.data)
            except ValueError as error:
                raise SampleError(f"{member.extension} is not JSON: {error}") from error
            if not isinstance(more, dict):
                raise SampleError(f"{member.extension} holds {type(more).__name__}, expected an object")
        elif kind in CAPTIONS:
            try:
                more = {kind: member.data.decode("utf-8")}
            except UnicodeDecodeError as error:
                raise SampleError(f"{member.extension} is not UTF-8: {error}") from error
        else:
            more = {member.extension: f"{member.size} bytes"}  # refused by its name, unless that is metadata
        if twice := [name for name in more if name in record and record[name] != more[name]]:
            raise SampleError(f"two members of the sample give {twice[0]!r}, and they differ")
        record |= more
    record.setdefault("id", key)
    record = _with_members(record, pictures, IMAGE_KEYS, "pictures")
    return _with_members(record, videos, VIDEO_KEYS[:2], "videos")


def _with_members(record: dict[str, Any], members: dict[str, bytes], keys: Sequence[str], what: str) -> dict[str, Any]:
    """The record with the members where it names them, and else under the last of the keys."""
    if not members:
        return record
    named = next((name for name in keys if not is_empty(record.get(name))), "")
    if not named:
        return {**record, keys[-1]: [*members.values()]}
    found = _by_name(record[named], members, what)
    return {**record, named: found if isinstance(record[named], list) or what == "pictures" else found[0]}


def _by_name(given: Any, pictures: dict[str, bytes], what: str) -> list[bytes]:
    names = [str(name).rpartition("/")[2] for name in (given if isinstance(given, list) else [given])]
    ends = {name.partition(".")[2]: data for name, data in pictures.items()}
    lacking = [name for name in names if name not in pictures and name not in ends]
    used = {id(pictures.get(name, ends.get(name))) for name in names}
    lacking += [name for name, data in pictures.items() if id(data) not in used]
    if lacking:
        raise SampleError(
            f"the record names the {what} {shown(names)}, and the members are {shown([*pictures])}: {lacking[0]!r} "
            "is only in one of them; name all, or none for their order in the tar"
        )
    return [pictures[name] if name in pictures else ends[name] for name in names]

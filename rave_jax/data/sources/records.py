"""A source of records: which of them are used, and how it is opened again in another process."""

from __future__ import annotations

import abc
import logging
from pathlib import Path
from typing import Any, Protocol

from rave_jax.config import ConfigError
from rave_jax.data.places import Place, place
from rave_jax.data.sample import Part, Sample, SampleError, Source
from rave_jax.data.sources.filters import Chosen, FieldIs, Records, choose
from rave_jax.data.sources.lines import JsonLines
from rave_jax.data.sources.lists import HeldList, JsonList, open_list


def open_records(path: str | Path) -> JsonLines | JsonList | HeldList:
    """Records of a `.jsonl` file, or of a JSON file that holds a list.

    Raises:
        ConfigError: no such file, or one that holds no records.
    """
    return JsonLines(path) if place(path).suffix == ".jsonl" else open_list(path)


class RecordsConfig(Protocol):
    """What the configs of such sources have in common."""

    @property
    def where(self) -> tuple[FieldIs, ...]: ...

    @property
    def ignored(self) -> tuple[str, ...]: ...

    def build(self) -> Source: ...


class RecordSource(abc.ABC):
    """Samples of records, by index among the records that are used.

    A copy in another process opens the files again; indices are mapped there and not copied.

    Attributes:
        name: of the source.
        folder: what paths of pictures are relative to.
        ignored: keys that may pass unread; those that chose the records are among them.
    """

    name: str

    def __init__(self, config: RecordsConfig, records: Records, folder: Place):
        self._config, self._records, self.folder = config, records, folder
        self.ignored = frozenset(config.ignored)
        self._fields = frozenset(each.field.partition(".")[0] for each in config.where)
        self._chosen: Chosen = choose(records, config.where)

    def __len__(self) -> int:
        return len(self._records) if self._chosen.indices is None else len(self._chosen.indices)

    @property
    def fingerprint(self) -> str:
        """Of the records and their order."""
        return self._chosen.fingerprint

    @property
    def parts(self) -> tuple[Part, ...]:
        """The samples in parts that change apart from each other."""
        return self._chosen.parts

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index if self._chosen.indices is None else int(self._chosen.indices[index])
        record, where = self._records[number], self._records.where(number)
        try:
            return self.sample(record, number, where)
        except SampleError as error:
            raise error.at(where) from error

    def unread(self, read: tuple[str, ...]) -> frozenset[str]:
        """Keys that may pass unread: those the config names, and fields of filters that are not read."""
        return self.ignored | (self._fields - frozenset(read))

    @abc.abstractmethod
    def sample(self, record: dict[str, Any], index: int, where: str) -> Sample:
        """The sample of a record.

        Args:
            record: as its file has it.
            index: among all records, used or not.
            where: its file and place there.

        Raises:
            SampleError: the record cannot be used.
        """

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._config, len(self), self.fingerprint)


def _again(config: RecordsConfig, length: int, fingerprint: str) -> Source:
    """The same source in another process.

    Raises:
        ConfigError: its files have changed since.
    """
    log = logging.getLogger(__package__)
    before = log.level
    log.setLevel(logging.ERROR)  # what there is to say of the files was said when they were opened first
    try:
        source = config.build()
    finally:
        log.setLevel(before)
    if (len(source), source.fingerprint) != (length, fingerprint):
        raise ConfigError(f"the files of {source.name} changed while a run reads them: put them back, and start again")
    return source

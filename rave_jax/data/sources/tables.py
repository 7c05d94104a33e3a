"""Rows of table files as records: groups of rows read on demand, columns found by their names or named by a config.

A row is read as a record of the columns that are read alone. The last groups are kept, so files with small groups serve
random access best.
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import Any, Protocol

import pyarrow as pa

from rave_jax.config import ConfigError
from rave_jax.data.places import Place
from rave_jax.data.sample import Part, Sample, SampleError
from rave_jax.data.sources.columns import Named, class_names, columns_of, other_type
from rave_jax.data.sources.conversation import conversation, last_answer
from rave_jax.data.sources.filters import FieldIs
from rave_jax.data.sources.keys import take
from rave_jax.data.sources.qa import ANSWERS, question
from rave_jax.data.sources.qa import KEYS as QUESTION_KEYS
from rave_jax.data.sources.records import RecordSource
from rave_jax.data.sources.turns import PAIRS, RECORD_KEYS, TURNS, record_id, turns_of
from rave_jax.data.sources.visuals import IMAGE_KEYS, visual_parts

NEEDED = frozenset(("question", *ANSWERS, *TURNS, *PAIRS, *PAIRS.values(), *IMAGE_KEYS))
"""Keys whose columns every file has that the first file has."""
UNREADABLE = (OSError, pa.ArrowException, ValueError, OverflowError)
"""What pyarrow raises of damaged files, and of values that Python cannot hold."""
MOST_CACHED = 2**28
"""Bytes of the groups that are kept, unless a single one is larger."""
FIRST_ROWS = 16


class TableFile(Protocol):
    """A file of rows in groups.

    Attributes:
        place: where it is.
        groups: rows of each group.
        fingerprint: of what it holds.
    """

    @property
    def place(self) -> Place: ...

    @property
    def groups(self) -> Sequence[int]: ...

    @property
    def schema(self) -> pa.Schema: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of a group. Raises one of `UNREADABLE`."""
        ...


class TableConfig(Protocol):
    """What the configs of table files have in common."""

    @property
    def image_column(self) -> str: ...
    @property
    def turns_column(self) -> str: ...
    @property
    def question_column(self) -> str: ...
    @property
    def answer_column(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def cached_groups(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def ignored(self) -> tuple[str, ...]: ...
    @property
    def where(self) -> tuple[FieldIs, ...]: ...

    def build(self) -> TableSource: ...


class Rows:
    """Rows of several files, by number over all of them."""

    def __init__(self, files: Sequence[TableFile], config: TableConfig, fingerprint: str):
        self._files, self.fingerprint = files, fingerprint
        self.path = files[0].place
        self._groups: list[tuple[int, int]] = []
        self._starts: list[int] = []
        self._firsts: list[int] = []
        self._length = 0
        for number, file in enumerate(files):
            self._firsts.append(self._length)
            for group, rows in enumerate(file.groups):
                self._groups.append((number, group))
                self._starts.append(self._length)
                self._length += rows
        # Fields that chose the rows are known; none of them is unread.
        fields = tuple(each.field.partition(".")[0] for each in config.where)
        named = Named(
            config.image_column, config.turns_column, config.question_column, config.answer_column, config.ignored
        )
        schema = files[0].schema
        self.columns: tuple[str, ...] = tuple(schema.names)
        self._names = columns_of(schema, named, str(self.path), fields)
        self.keys: tuple[str, ...] = QUESTION_KEYS if self.has_questions else RECORD_KEYS
        self._labels = {name: found for name in self._names if (found := class_names(schema, name))}
        for file in files[1:]:
            if file.schema != schema:
                self._check_alike(file, schema, named, fields)
        self._tables = _Cache(config.cached_groups)
        self._refuse_unread()

    def _check_alike(self, file: TableFile, first: pa.Schema, named: Named, fields: Sequence[str]) -> None:
        """Refuse a file without a column that the first has, with one to read that the first lacks, or with another
        kind of values in one."""
        schema, path = file.schema, file.place
        missing = [name for name, key in self._names.items() if key in NEEDED and name not in schema.names]
        if missing:
            raise ConfigError(f"{path}: no column {missing[0]!r}, which {self.path} has")
        names = [] if set(schema.names) == set(first.names) else columns_of(schema, named, str(path), fields)
        if more := [name for name in names if name not in self._names]:
            raise ConfigError(
                f"{path}: the column {more[0]!r} is not in {self.path}, which says what is read: make each kind "
                "of file a source of its own, or name the column in `ignored`"
            )
        for name in self._names:
            if name in schema.names and other_type(schema.field(name).type, first.field(name).type):
                raise ConfigError(
                    f"{path}: the column {name!r} holds {schema.field(name).type}, and in {self.path} it holds "
                    f"{first.field(name).type}: write both with one type, or make each kind of file a source of its own"
                )

    def _refuse_unread(self) -> None:
        """Say at once, and not row by row, that the first rows hold something that is not read."""
        columns = [name for name, key in self._names.items() if key not in self.keys]
        if not columns or not self._groups:
            return
        try:
            number, group = self._groups[0]
            rows = self._files[number].read(group, columns).slice(0, FIRST_ROWS).to_pylist()
        except UNREADABLE:
            return  # each row that cannot be read says so when it is asked for
        try:
            for row in rows:
                take({self._names[name]: value for name, value in row.items()}, self.keys, (), "a row")
        except SampleError as error:
            raise ConfigError(f"{self.path}: {error}") from error

    @property
    def has_questions(self) -> bool:
        """Are the rows questions, rather than conversations?"""
        return "question" in self._names.values()

    @property
    def parts(self) -> tuple[Part, ...]:
        """A part for each file."""
        return tuple(Part(sum(file.groups), file.fingerprint, str(file.place)) for file in self._files)

    def __len__(self) -> int:
        return self._length

    def _at(self, index: int) -> tuple[int, int]:
        """Number of the group that a row is in, and the row's place in it."""
        group = bisect.bisect_right(self._starts, index) - 1
        return group, index - self._starts[group]

    def where(self, index: int) -> str:
        """File and number of the row in it, for messages."""
        number = self._groups[self._at(index)[0]][0]
        return f"{self._files[number].place}:{index - self._firsts[number]}"

    def folder(self, index: int) -> Place:
        """The folder of the row's file."""
        return self._files[self._groups[self._at(index)[0]][0]].place.parent

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, row = self._at(index)
        try:
            found = self._table(group).slice(row, 1).to_pylist()[0]
        except UNREADABLE as error:
            raise SampleError(f"{self.where(index)}: {' '.join(str(error).split())}") from error
        return {self._names[name]: self._named(name, value) for name, value in found.items()}

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        """These fields of the rows from `start` to `stop`; None for one that cannot be read."""
        while start < stop:
            group, row = self._at(start)
            number, inside = self._groups[group]
            file = self._files[number]
            names = [
                name for name in {field.partition(".")[0] for field in fields} | {*fields} if name in file.schema.names
            ]
            count = min(file.groups[inside] - row, stop - start)
            try:
                table = file.read(inside, names).slice(row, count)
                yield from (dict(found) for found in table.to_pylist()) if names else ({} for _ in range(count))
            except UNREADABLE:
                yield from (None for _ in range(count))
            start += count

    def _named(self, column: str, value: Any) -> Any:
        """A value as JSON would have it: the name of a class, where the column holds the numbers of classes."""
        if isinstance(value, (Decimal, date)):
            return str(value)
        names = self._labels.get(column)
        if names is None or not isinstance(value, int):
            return value
        return names[value] if 0 <= value < len(names) else None  # -1 is a row without a label

    def _table(self, group: int) -> pa.Table:
        number, inside = self._groups[group]
        return self._tables.get(group, lambda: self._files[number].read(inside, list(self._names)))


class TableSource(RecordSource):
    """Samples of table files, by row number over all files."""

    _records: Rows

    def __init__(self, config: TableConfig, files: Sequence[TableFile], fingerprint: str, name: str):
        rows = Rows(files, config, fingerprint)
        self.name, self._metric, self._suffix = config.name or name, config.metric, config.suffix
        super().__init__(config, rows, rows.path.parent)

    def sample(self, record: dict[str, Any], index: int, where: str) -> Sample:
        """The conversation or question of a row."""
        rows = self._records
        folder = rows.folder(index)
        record = take(record, rows.keys, self.unread(rows.keys), "the row")
        visuals = visual_parts(record, folder, where)
        if rows.has_questions:
            messages, answers = question(record, visuals, self._suffix)
        else:
            messages = conversation(turns_of(record, self.ignored), visuals, folder, self.ignored)
            answers = last_answer(messages)
        sample = Sample(
            id=record_id(record, index),
            messages=messages,
            answers=answers,
            metric=self._metric,
            source=self.name,
            task=self.name,
        )
        return replace(sample, template=sample.question)


class _Cache:
    """The last groups that were read, up to a number and a size of them. Different groups are read at the same time."""

    def __init__(self, most: int):
        self._most, self._used = most, 0
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._reading: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, group: int, read: Any) -> pa.Table:
        """The group, read unless it is kept."""
        with self._lock:
            if group in self._tables:
                self._tables.move_to_end(group)
                return self._tables[group]
            own = self._reading.setdefault(group, threading.Lock())
        with own:
            with self._lock:
                if group in self._tables:
                    return self._tables[group]
            table = read()
            with self._lock:
                self._tables[group] = table
                self._used += table.nbytes
                self._reading.pop(group, None)
                while len(self._tables) > 1 and (len(self._tables) > self._most or self._used > MOST_CACHED):
                    _, dropped = self._tables.popitem(last=False)
                    self._used -= dropped.nbytes
        return table

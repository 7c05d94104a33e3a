"""Parquet files as HuggingFace data sets store them: images inside, as `{"bytes", "path"}`.

Columns are found by their names unless the config names them: turns in any shape of `turns.py`, or a question
with its answer or answers; images under `images` or `image`, or in the one other column that holds pictures. A row is
read as a record of those columns alone. Rows are read a row group at a time and the last groups are kept, so files with
small row groups serve random access best.
"""

from __future__ import annotations

import bisect
import glob
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rave_jax.config import ConfigError, require
from rave_jax.data.sample import METRICS, Part, Sample, SampleError
from rave_jax.data.sources.columns import Named, class_names, columns_of
from rave_jax.data.sources.conversation import conversation, last_answer
from rave_jax.data.sources.files import fingerprint_of_files, open_file, other_kind
from rave_jax.data.sources.keys import take
from rave_jax.data.sources.qa import ANSWERS, question
from rave_jax.data.sources.qa import KEYS as QUESTION_KEYS
from rave_jax.data.sources.turns import PAIRS, RECORD_KEYS, TURNS, record_id, turns_of
from rave_jax.data.sources.visuals import IMAGE_KEYS, visual_parts

NEEDED = frozenset(("question", *ANSWERS, *TURNS, *PAIRS, *PAIRS.values(), *IMAGE_KEYS))
"""Keys whose columns every file has that the first file has."""
UNREADABLE = (OSError, pa.ArrowException, ValueError, OverflowError)
"""What pyarrow raises of damaged files, and of values that Python cannot hold."""


@dataclass(frozen=True)
class HfParquet:
    """Samples of parquet files with embedded images."""

    path: str = ""
    """A parquet file, a folder of them, or a glob pattern; several files are read in the order of their names."""
    image_column: str = ""
    """Column of an image or a list of images; empty to look for `images`, then `image`, then a column of pictures."""
    turns_column: str = ""
    """Column of a conversation; empty to look for `messages`, `conversations`, `texts`."""
    question_column: str = ""
    """Column of the question; empty to look for `question`, then `query`."""
    answer_column: str = ""
    """Column of the answer or answers; empty to look for `answers`, `answer`, `label`."""
    suffix: str = ""
    """Text added after every question of a question column."""
    metric: str = "exact_match"
    """How predictions are scored: exact_match, relaxed_accuracy or anls."""
    cached_groups: int = 8
    """Parquet row groups kept in memory."""
    name: str = ""
    """Name in tables; empty for the first file's name."""
    ignored: tuple[str, ...] = ()
    """Columns, and keys of turns and parts, that are left out: nothing is learned from them."""

    def __post_init__(self) -> None:
        require(self.cached_groups >= 1, "cached_groups", self.cached_groups, "at least 1")
        require(self.metric in METRICS, "metric", self.metric, f"one of {', '.join(METRICS)}")

    def build(self) -> ParquetSource:
        """The source.

        Raises:
            ConfigError: no such file, not parquet, no known set of columns, or a column of pictures or of something
                else to learn from that would pass unread.
        """
        return ParquetSource(self)


class ParquetSource:
    """Samples of parquet files, by row number over all files."""

    def __init__(self, config: HfParquet):
        self._config = config
        self._paths = _files(config.path)
        self.name = config.name or self._paths[0].stem
        self._groups: list[tuple[int, int]] = []
        self._starts: list[int] = []
        self._length = 0
        schemas = []
        for number, path in enumerate(self._paths):
            metadata = _metadata(path)
            schemas.append(metadata.schema.to_arrow_schema())
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                self._starts.append(self._length)
                self._length += metadata.row_group(group).num_rows
        named = Named(
            config.image_column, config.turns_column, config.question_column, config.answer_column, config.ignored
        )
        self._names = columns_of(schemas[0], named, str(self._paths[0]))
        self._is_question = "question" in self._names.values()
        self._keys: tuple[str, ...] = QUESTION_KEYS if self._is_question else RECORD_KEYS
        self._labels = {name: found for name in self._names if (found := class_names(schemas[0], name))}
        for path, schema in zip(self._paths[1:], schemas[1:], strict=True):
            if set(schema.names) != set(schemas[0].names):
                self._check_alike(path, schema, named)
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        self._refuse_unread()

    def _check_alike(self, path: Path, schema: pa.Schema, named: Named) -> None:
        """Refuse a file without a column that the first has, or with one to read that the first lacks."""
        missing = [name for name, key in self._names.items() if key in NEEDED and name not in schema.names]
        if missing:
            raise ConfigError(f"{path}: no column {missing[0]!r}, which {self._paths[0]} has")
        if more := [name for name in columns_of(schema, named, str(path)) if name not in self._names]:
            raise ConfigError(
                f"{path}: the column {more[0]!r} is not in {self._paths[0]}, which says what is read: make each kind "
                "of file a source of its own, or name the column in `ignored`"
            )

    def _refuse_unread(self) -> None:
        """Say at once, and not row by row, that the first rows hold something that is not read."""
        columns = [name for name, key in self._names.items() if key not in self._keys]
        if not columns or not self._groups:
            return
        try:
            with pq.ParquetFile(self._paths[0]) as file:
                rows = next(file.iter_batches(16, columns=columns), pa.table({})).to_pylist()
        except UNREADABLE:
            return  # each row that cannot be read says so when it is asked for
        try:
            for row in rows:
                take({self._names[name]: value for name, value in row.items()}, self._keys, (), "a row")
        except SampleError as error:
            raise ConfigError(f"{self._paths[0]}: {error}") from error

    def __len__(self) -> int:
        return self._length

    @cached_property
    def fingerprint(self) -> str:
        """Of the files, in the order of their names.

        Raises:
            ConfigError: one cannot be read any more.
        """
        try:
            return fingerprint_of_files(self._paths)
        except OSError as error:
            raise ConfigError(
                f"{error.filename or self._paths[0]}: cannot be read: {error.strerror or error}"
            ) from error

    @property
    def parts(self) -> tuple[Part, ...]:
        """All files are one part."""
        return (Part(len(self), self.fingerprint, str(self._paths[0])),)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(index)
        group = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[group]
        path = self._paths[self._groups[group][0]]
        where = f"{path}:{index}"
        try:
            found = self._table(group).slice(row, 1).to_pylist()[0]
            record = {self._names[name]: self._named(name, value) for name, value in found.items()}
            return self._sample(record, index, path.parent, where)
        except SampleError as error:
            raise error.at(where) from error
        except UNREADABLE as error:
            raise SampleError(f"{where}: {error}") from error

    def _named(self, column: str, value: Any) -> Any:
        """A value as JSON would have it: the name of a class, where the column holds the numbers of classes."""
        if isinstance(value, (Decimal, date)):
            return str(value)
        names = self._labels.get(column)
        if names is None or not isinstance(value, int):
            return value
        return names[value] if 0 <= value < len(names) else None  # -1 is a row without a label

    def _sample(self, record: dict[str, Any], index: int, folder: Path, where: str) -> Sample:
        ignored = self._config.ignored
        record = take(record, self._keys, ignored, "the row")
        visuals = visual_parts(record, folder, where)
        if self._is_question:
            messages, answers = question(record, visuals, self._config.suffix)
        else:
            messages = conversation(turns_of(record, ignored), visuals, folder, ignored)
            answers = last_answer(messages)
        sample = Sample(
            id=record_id(record, index),
            messages=messages,
            answers=answers,
            metric=self._config.metric,
            source=self.name,
            task=self.name,
        )
        return replace(sample, template=sample.question)

    def _table(self, group: int) -> pa.Table:
        with self._lock:
            if group in self._tables:
                self._tables.move_to_end(group)
                return self._tables[group]
            number, inside = self._groups[group]
            with pq.ParquetFile(self._paths[number]) as file:
                table = file.read_row_group(inside, columns=list(self._names))
            self._tables[group] = table
            if len(self._tables) > self._config.cached_groups:
                self._tables.popitem(last=False)
            return table


def _metadata(path: Path) -> pq.FileMetaData:
    try:
        open_file(path).close()
        with path.open("rb") as file:
            start = file.read(64)
        if not start.startswith(b"PAR1"):
            text = "not a parquet file; LlavaJson and QaJsonl read JSON"
            raise ConfigError(f"{path}: expected parquet, and this is {other_kind(start) or text}")
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: the parquet file cannot be read: {error}") from error


def _files(path: str) -> list[Path]:
    if not path:
        raise ConfigError("path is empty, expected a parquet file, a folder of them, or a glob pattern")
    try:
        if Path(path).is_dir():
            files = sorted(Path(path).rglob("*.parquet"))
        elif Path(path).exists():
            files = [Path(path)]
        else:
            files = sorted(Path(name) for name in glob.glob(path, recursive=True))
    except OSError as error:
        raise ConfigError(f"{path[:100]!r}: cannot be read: {error.strerror or error}") from error
    if not files:
        raise ConfigError(f"{path!r}: no parquet file there")
    return files

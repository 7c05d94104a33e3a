"""Parquet files as HuggingFace data sets store them: images inside, as `{"bytes", "path"}`.

Columns are found by their names unless the config names them: turns in any shape of `conversation.py`, or a question
with its answer or answers; images under `images` or `image`, or in the one other column that holds pictures. A row is
read as a record of those columns alone. Rows are read a row group at a time and the last groups are kept, so files with
small row groups serve random access best.
"""

from __future__ import annotations

import bisect
import glob
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rave_jax.config import ConfigError, require
from rave_jax.data.sample import METRICS, Sample, SampleError
from rave_jax.data.sources.conversation import (
    PAIRS,
    RECORD_KEYS,
    SYSTEM,
    TURNS,
    conversation,
    last_answer,
    record_id,
    turns_of,
)
from rave_jax.data.sources.files import check_regular, fingerprint_of_files, other_kind
from rave_jax.data.sources.keys import METADATA, is_content, may_be_picture, take
from rave_jax.data.sources.qa import KEYS as QUESTION_KEYS
from rave_jax.data.sources.qa import question
from rave_jax.data.sources.visuals import VIDEO_KEYS, visual_parts

log = logging.getLogger(__name__)

IMAGES = ("images", "image")
QUESTIONS = ("question", "query")
ANSWERS = ("answers", "answer", "label")


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
    """Text put behind every question of a question column."""
    metric: str = "exact_match"
    """How predictions are scored: exact_match, relaxed_accuracy or anls."""
    cached_groups: int = 8
    """Row groups kept in memory."""
    name: str = ""
    """Name in tables; empty for the first file's name."""
    ignored: tuple[str, ...] = ()
    """Columns, and keys of turns and parts, that may pass unread."""

    def __post_init__(self) -> None:
        require(self.cached_groups >= 1, "cached_groups", self.cached_groups, "at least 1")
        require(self.metric in METRICS, "metric", self.metric, f"one of {', '.join(METRICS)}")

    def build(self) -> ParquetSource:
        """The source.

        Raises:
            ConfigError: no such file, not parquet, no known layout of columns, or a column of pictures or of something
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
        self._names = columns_of(schemas[0], config, str(self._paths[0]))
        self._is_question = "question" in self._names.values()
        self._keys: tuple[str, ...] = QUESTION_KEYS if self._is_question else RECORD_KEYS
        for path, schema in zip(self._paths, schemas, strict=True):
            if missing := [name for name in self._names if name not in schema.names]:
                raise ConfigError(f"{path}: no column {missing[0]!r}, which {self._paths[0]} has")
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        """Say at once, and not row by row, that the first rows hold something that is not read."""
        columns = [name for name, key in self._names.items() if key not in self._keys]
        if not columns or not self._groups:
            return
        with pq.ParquetFile(self._paths[0]) as file:
            first = next(file.iter_batches(16, columns=columns), pa.table({}))
        try:
            for row in first.to_pylist():
                take({self._names[name]: value for name, value in row.items()}, self._keys, (), "a row")
        except (SampleError, pa.ArrowException) as error:
            raise ConfigError(f"{self._paths[0]}: {error}") from error

    def __len__(self) -> int:
        return self._length

    @cached_property
    def fingerprint(self) -> str:
        """Of the files, in the order of their names."""
        return fingerprint_of_files(self._paths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(index)
        group = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[group]
        path = self._paths[self._groups[group][0]]
        where = f"{path}:{index}"
        try:
            found = self._table(group).slice(row, 1).to_pylist()[0]
            record = {self._names[name]: value for name, value in found.items()}
            return self._sample(record, index, path.parent, where)
        except SampleError as error:
            raise error.at(where) from error
        except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
            raise SampleError(f"{where}: {error}") from error

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


def columns_of(schema: pa.Schema, config: HfParquet, where: str) -> dict[str, str]:
    """The columns that are read, and the key of a record that each stands for.

    Raises:
        ConfigError: no known layout, or a column that would pass unread and could be learned from.
    """
    columns = [name for name in schema.names if name not in config.ignored]

    def named(given: str, usual: Sequence[str]) -> str:
        if given and given not in schema.names:
            raise ConfigError(f"{where}: no column {given!r}; it has {', '.join(schema.names)}")
        return given or next((name for name in usual if name in columns), "")

    image = named(config.image_column, IMAGES)
    turns = named(config.turns_column, ("messages", "conversations", "texts"))
    ask, answer = named(config.question_column, QUESTIONS), named(config.answer_column, ANSWERS)
    pair = next((key for key in PAIRS if key in columns and PAIRS[key] in columns), "")
    names: dict[str, str] = {}
    if turns:
        names[turns] = turns if turns in TURNS else TURNS[1]
    elif ask and answer:
        names |= {ask: "question", answer: "answers" if _is_list(schema.field(answer).type) else "answer"}
        other = {"answers": "answer", "answer": "answers"}[names[answer]]
        if not config.answer_column and other in columns and other != answer:
            names[other] = other
    elif pair:
        names |= {name: name for name in (pair, PAIRS[pair], "input", "history") if name in columns}
    else:
        raise ConfigError(
            f"{where}: columns {schema.names}; expected a conversation ({', '.join(TURNS)}), a question "
            f"({', '.join(QUESTIONS)}) with an answer ({', '.join(ANSWERS)}), or instruction with output"
        )
    names |= {name: name for name in ("id", *SYSTEM, *VIDEO_KEYS) if name in columns and name not in names}
    if image := image or _one_of_pictures(schema, columns, names, where):
        names[image] = "image"
    read = QUESTION_KEYS if "question" in names.values() else RECORD_KEYS
    return names | _others(schema, [name for name in columns if name not in names], read, where)


def _one_of_pictures(schema: pa.Schema, columns: Sequence[str], names: dict[str, str], where: str) -> str:
    """The one column of pictures under a name of its own; "" where there is none."""
    found = [name for name in columns if name not in names and holds_bytes(schema.field(name).type)]
    found = [name for name in found if may_be_picture(name)]
    if len(found) > 1:
        raise ConfigError(
            f"{where}: the columns {', '.join(found)} hold bytes: name one as image_column and the others in `ignored`"
        )
    return found[0] if found else ""


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def holds_bytes(kind: pa.DataType) -> bool:
    """Is this a column of encoded files: bytes, a struct with `bytes`, or a list of either?"""
    if _is_list(kind):
        return holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(holds_bytes(field.type) for field in kind if field.name == "bytes")
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _others(schema: pa.Schema, columns: Sequence[str], read: Sequence[str], where: str) -> dict[str, str]:
    """Columns beside those of the layout that are read all the same, to refuse the rows in which they hold something.

    Raises:
        ConfigError: one of them holds bytes.
    """
    refused, quiet = {}, []
    for name in columns:
        kind = schema.field(name).type
        if pa.types.is_null(kind) or name in METADATA:
            continue
        if is_content(name, read):
            refused[name] = f"column {name}" if name in read else name
        elif holds_bytes(kind):
            raise ConfigError(
                f"{where}: the column {name!r} holds bytes and is not read: name it as image_column, or in `ignored`"
            )
        else:
            quiet.append(name)
    if quiet:
        log.warning("%s: columns that are not read: %s (name them in `ignored` to say so)", where, ", ".join(quiet))
    return refused


def _metadata(path: Path) -> pq.FileMetaData:
    try:
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(64)
        if not start.startswith(b"PAR1"):
            text = "no parquet file; LlavaJson and QaJsonl read JSON"
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

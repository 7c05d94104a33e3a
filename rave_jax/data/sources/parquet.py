"""Parquet files as HuggingFace data sets store them: images inside, as `{"bytes", "path"}`.

Known layouts, found by their columns unless the config names them: `messages` or `conversations` (turns with `role`
and `content`, or `from` and `value`), `texts` (pairs of `user` and `assistant`), or a question with its answer or
answers. Images stand in `images` or `image`. Rows are read a row group at a time and the last groups are kept, so
files with small row groups serve random access best.
"""

from __future__ import annotations

import bisect
import glob
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rave_jax.config import ConfigError, require
from rave_jax.data.sample import Message, Sample, SampleError
from rave_jax.data.sources.records import conversation, last_answer

IMAGES = ("images", "image")
TURNS = ("messages", "conversations", "texts")
QUESTIONS = ("question", "query")
ANSWERS = ("answers", "answer", "label")


@dataclass(frozen=True)
class HfParquet:
    """Samples of parquet files with embedded images."""

    path: str = ""
    """A parquet file, a folder of them, or a glob pattern; several files are read in the order of their names."""
    image_column: str = ""
    """Column of an image or a list of images; empty to look for `images`, then `image`."""
    turns_column: str = ""
    """Column of a conversation; empty to look for `messages`, `conversations`, `texts`."""
    question_column: str = ""
    """Column of the question; empty to look for `question`, then `query`."""
    answer_column: str = ""
    """Column of the answer or answers; empty to look for `answers`, `answer`, `label`."""
    suffix: str = ""
    """Text put behind every question of a question column."""
    metric: str = "exact_match"
    """How predictions are scored."""
    cached_groups: int = 8
    """Row groups kept in memory."""
    name: str = ""
    """Name in tables; empty for the first file's name."""

    def __post_init__(self) -> None:
        require(self.cached_groups >= 1, "cached_groups", self.cached_groups, "at least 1")

    def build(self) -> ParquetSource:
        """The source.

        Raises:
            ConfigError: no such file, not parquet, or no known layout of columns.
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
        for number, path in enumerate(self._paths):
            try:
                metadata = pq.read_metadata(path)
            except (OSError, pa.ArrowException) as error:
                raise ConfigError(f"{path}: {error}") from error
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                self._starts.append(self._length)
                self._length += metadata.row_group(group).num_rows
        columns = pq.read_schema(self._paths[0]).names
        self._image = self._column(columns, config.image_column, IMAGES)
        self._turns = self._column(columns, config.turns_column, TURNS)
        self._question = self._column(columns, config.question_column, QUESTIONS)
        self._answer = self._column(columns, config.answer_column, ANSWERS)
        if not self._turns and not (self._question and self._answer):
            raise ConfigError(
                f"{self._paths[0]}: columns {columns}; expected a conversation ({', '.join(TURNS)}) "
                f"or a question ({', '.join(QUESTIONS)}) with an answer ({', '.join(ANSWERS)})"
            )
        wanted = {"id", self._image, self._turns, self._question, self._answer}
        self._columns = [name for name in columns if name in wanted]
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def _column(self, columns: Sequence[str], named: str, usual: Sequence[str]) -> str:
        if named and named not in columns:
            raise ConfigError(f"{self._paths[0]}: no column {named!r}; it has {', '.join(columns)}")
        return named or next((name for name in usual if name in columns), "")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(index)
        group = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[group]
        path = self._paths[self._groups[group][0]]
        where = f"{path}:{index}"
        try:
            record = self._table(group).slice(row, 1).to_pylist()[0]
        except (OSError, pa.ArrowException) as error:
            raise SampleError(f"{where}: {error}") from error
        try:
            messages, answers = self._conversation(record, _images(record.get(self._image), path.parent, where))
        except SampleError as error:
            raise SampleError(f"{where}: {error}") from error
        sample = Sample(
            id=str(record.get("id") or index),
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
                table = file.read_row_group(inside, columns=self._columns)
            self._tables[group] = table
            if len(self._tables) > self._config.cached_groups:
                self._tables.popitem(last=False)
            return table

    def _conversation(
        self, record: dict[str, Any], images: list[Message]
    ) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        if self._turns:
            turns = record[self._turns] or []
            if turns and "user" in turns[0]:
                turns = [turn for pair in turns for turn in _pair(pair)]
            messages = conversation(turns, images)
            return messages, last_answer(messages)
        given = record[self._answer]
        answers = tuple(str(a) for a in given) if isinstance(given, list) else () if given is None else (str(given),)
        if not isinstance(record[self._question], str):
            raise SampleError(f"{self._question} is {record[self._question]!r}, expected a text")
        turns = [{"role": "user", "content": record[self._question] + self._config.suffix}]
        if answers:
            turns.append({"role": "assistant", "content": answers[0]})
        return conversation(turns, images), answers


def _pair(pair: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": pair[role]} for role in ("user", "assistant")]


def _images(value: Any, folder: Path, where: str) -> list[Message]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    parts: list[Message] = []
    for number, item in enumerate(values):
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
        if not isinstance(item, (bytes, str)):
            raise SampleError(f"{where}: image {number} is {type(item).__name__}, expected bytes or a path")
        source = item if isinstance(item, bytes) else str(folder / item)
        parts.append({"type": "image", "image": source, "name": f"{where} image {number}"})
    return parts


def _files(path: str) -> list[Path]:
    if Path(path).is_dir():
        files = sorted(Path(path).rglob("*.parquet"))
    elif Path(path).is_file():
        files = [Path(path)]
    else:
        files = sorted(Path(name) for name in glob.glob(path, recursive=True))
    if not files:
        raise ConfigError(f"{path!r}: no parquet file there")
    return files

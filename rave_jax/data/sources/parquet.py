"""Parquet files as HuggingFace data sets store them: images inside, as `{"bytes", "path"}`.

Only footers are read when a source is opened, and what they say is kept beside the first file. `tables.py` says how
rows become samples.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from rave_jax.config import ConfigError, require
from rave_jax.data import flat
from rave_jax.data.places import SCHEMES, Place, find_files, open_place, stream
from rave_jax.data.sample import METRICS
from rave_jax.data.sources.blocks import digest
from rave_jax.data.sources.files import fingerprint_of_file, fingerprint_of_files, open_file, other_kind
from rave_jax.data.sources.filters import FieldIs
from rave_jax.data.sources.tables import TableSource

VERSION = 1
KIND = "parquet"


@dataclass(frozen=True)
class HfParquet:
    """Samples of parquet files with embedded images."""

    path: str = ""
    """A parquet file, a folder of them, or a glob pattern; several files are read in the order of their names. It may
    be a URL, gs://... or s3://..."""
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
    where: tuple[FieldIs, ...] = ()
    """Which rows are used; all of these hold. Empty for every row."""

    url_schemes: ClassVar = tuple(SCHEMES)

    def __post_init__(self) -> None:
        require(self.cached_groups >= 1, "cached_groups", self.cached_groups, "at least 1")
        require(self.metric in METRICS, "metric", self.metric, f"one of {', '.join(METRICS)}")

    def build(self) -> TableSource:
        """The source.

        Raises:
            ConfigError: no such file, not parquet, no known set of columns, or a column of pictures or of something
                else to learn from that would pass unread.
        """
        files = parquet_files(_found(self.path))
        return TableSource(self, files, fingerprint_of(files), files[0].place.stem)


class ParquetFile:
    """A parquet file, of which the footer was read once.

    Attributes:
        place: where it is.
        facts: JSON-ready: what the footer says, and a fingerprint.
    """

    def __init__(self, where: Place, facts: dict[str, Any]):
        self.place, self.facts = where, facts
        self.groups: list[int] = facts["groups"]
        self.fingerprint: str = facts["fingerprint"]

    @cached_property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.facts["schema"])))

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of a row group."""
        where = open_place(self.place)
        where.close()
        if (where.size, where.stamp) != (self.facts["is"]["size"], self.facts["is"]["stamp"]):
            raise OSError("the file has changed since it was opened: put it back as it was")
        with stream(self.place) as file, pq.ParquetFile(file) as opened:
            return opened.read_row_group(group, columns=list(columns))


def parquet_files(places: Sequence[Place]) -> list[ParquetFile]:
    """Files with what their footers say. Footers of files that are as they were are not read again.

    Raises:
        ConfigError: one is no parquet file, or cannot be read.
    """
    data = str(places[0])
    kept = flat.load(data, KIND)
    known = kept.facts["files"] if kept is not None and kept.facts.get("version") == VERSION else {}
    files, new = [], False
    for where in places:
        file = open_file(where)
        try:
            is_file = flat.identity(file)
            facts = known.get(str(where))
            if facts is None or facts["is"] != is_file:
                facts = {"is": is_file, **_footer(where), "fingerprint": fingerprint_of_file(file)}
                new = True
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from error
        finally:
            file.close()
        files.append(ParquetFile(where, facts))
    if new or len(known) != len(files):
        flat.keep(data, KIND, {"version": VERSION, "files": {str(f.place): f.facts for f in files}}, {})
    return files


def fingerprint_of(files: Sequence[ParquetFile]) -> str:
    """A fingerprint of files in this order.

    Raises:
        ConfigError: one cannot be read.
    """
    data, kind = str(files[0].place), f"{KIND}-whole"
    state = digest(str([(str(f.place), f.facts["is"], f.fingerprint) for f in files]).encode()).hexdigest()
    kept = flat.load(data, kind)
    if kept is not None and kept.facts.get("state") == state:
        return str(kept.facts["fingerprint"])
    try:
        found = fingerprint_of_files([file.place for file in files])
    except OSError as error:
        raise ConfigError(f"{error.filename or data}: cannot be read: {error.strerror or error}") from error
    flat.keep(data, kind, {"state": state, "fingerprint": found}, {})
    return found


def _footer(where: Place) -> dict[str, Any]:
    try:
        file = open_place(where)
        start = file.read(0, 64)
        file.close()
        if not start.startswith(b"PAR1"):
            text = "not a parquet file; LlavaJson and QaJsonl read JSON"
            raise ConfigError(f"{where}: expected parquet, and this is {other_kind(start) or text}")
        with stream(where) as opened:
            metadata = pq.read_metadata(opened)
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if any(rows < 0 for rows in groups):
            raise ConfigError(f"{where}: the parquet file is damaged: a group says it has {min(groups):,} rows")
        schema = metadata.schema.to_arrow_schema()
        return {"groups": groups, "schema": base64.b64encode(schema.serialize().to_pybytes()).decode()}
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{where}: the parquet file cannot be read: {' '.join(str(error).split())}") from error


def _found(path: str) -> list[Place]:
    if not path:
        raise ConfigError("path is empty, expected a parquet file, a folder of them, or a glob pattern")
    try:
        files = find_files(path, ".parquet")
    except OSError as error:
        raise ConfigError(f"{path[:100]!r}: cannot be read: {error.strerror or error}") from error
    if not files:
        raise ConfigError(f"{path!r}: no parquet file there")
    return files

"""Folders of pictures as HuggingFace's imagefolder has them: with a table of metadata, or a folder for each class."""

from __future__ import annotations

import bisect
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rave_jax.config import ConfigError, require
from rave_jax.data.places import SCHEMES, Place, inside, list_files, place
from rave_jax.data.sample import METRICS, Part, Sample, SampleError
from rave_jax.data.sources.blocks import digest
from rave_jax.data.sources.captions import EXTENSIONS, sample_of
from rave_jax.data.sources.files import open_file
from rave_jax.data.sources.filters import FieldIs, Records
from rave_jax.data.sources.lines import JsonLines, readable
from rave_jax.data.sources.records import RecordSource
from rave_jax.data.sources.visuals import IMAGE_KEYS

TABLES = ("metadata.jsonl", "metadata.csv")
FILE_KEYS = ("file_name", "file_names")


@dataclass(frozen=True)
class ImageFolder:
    """Pictures of a folder."""

    path: str = ""
    """The folder. Each metadata.jsonl or metadata.csv below it names pictures of its own folder as `file_name`, beside
    their caption, question or turns; without any, each picture lies in a folder that is named by its class. It may be
    a URL, gs://... or s3://..."""
    question: str = ""
    """What is asked about pictures that have a caption alone, or a class."""
    suffix: str = ""
    """Text added after every question."""
    metric: str = "exact_match"
    """How predictions are scored where a record names no metric: exact_match, relaxed_accuracy or anls."""
    name: str = ""
    """Name in tables; empty for the folder's name."""
    ignored: tuple[str, ...] = ()
    """Keys of records that are left out: nothing is learned from them."""
    where: tuple[FieldIs, ...] = ()
    """Which records are used; all of these hold. Empty for every record."""

    url_schemes: ClassVar = tuple(SCHEMES)

    def __post_init__(self) -> None:
        require(self.metric in METRICS, "metric", self.metric, f"one of {', '.join(METRICS)}")

    def build(self) -> ImageFolderSource:
        """The source.

        Raises:
            ConfigError: no such folder, or one that holds neither metadata nor pictures in folders of their classes.
        """
        return ImageFolderSource(self)


class ImageFolderSource(RecordSource):
    """Samples of a folder of pictures, by number of the record."""

    def __init__(self, config: ImageFolder):
        records = _records(config)
        root = place(config.path)
        self.name = config.name or root.resolve().name
        self._asked, self._metric, self._suffix = config.question, config.metric, config.suffix
        super().__init__(config, records, root)

    def sample(self, record: dict[str, Any], index: int, where: str) -> Sample:
        """The sample of a record."""
        return sample_of(record, index, where, self, self._asked, self._metric, self._suffix)


def _records(config: ImageFolder) -> Records:
    if not config.path:
        raise ConfigError("path is empty, expected a folder of pictures")
    try:
        files = list_files(config.path)
    except OSError as error:
        raise ConfigError(f"{config.path[:100]!r}: cannot be read: {error.strerror or error}") from error
    root = place(config.path)
    if not files or files == [str(root)]:
        raise ConfigError(f"{config.path!r}: no folder with files there")
    if tables := [place(name) for name in files if name.endswith(TABLES) and place(name).name in TABLES]:
        folders = [file.parent for file in tables]
        if twice := [folder for folder in folders if folders.count(folder) > 1]:
            raise ConfigError(f"{twice[0]}: it holds {' and '.join(TABLES)}: move one of them elsewhere")
        return Joined([Listed(CsvRows(file) if file.suffix == ".csv" else JsonLines(str(file))) for file in tables])
    pictures = [name for name in files if name.rpartition(".")[2].lower() in EXTENSIONS and not _hidden(name, root)]
    if not pictures:
        raise ConfigError(
            f"{config.path!r}: it holds no {' and no '.join(TABLES)}, and no pictures ({', '.join(EXTENSIONS)})"
        )
    if loose := [name for name in pictures if "/" not in name[len(str(root)) + 1 :]]:
        raise ConfigError(
            f"{loose[0]}: without {' or '.join(TABLES)}, pictures lie in folders that are named by their classes"
        )
    require(
        bool(config.question),
        "question",
        config.question,
        f"a text: {config.path!r} has a folder of pictures for each class, and the class is the answer",
    )
    return Classes(root, pictures)


def _hidden(name: str, root: Place) -> bool:
    """Is a file, or a folder of it, what programs leave behind (.ipynb_checkpoints, __MACOSX, ._a.png)?"""
    return any(part.startswith((".", "__")) for part in name[len(str(root)) + 1 :].split("/"))


class CsvRows:
    """Rows of a table in a text, which are held in memory."""

    def __init__(self, path: Place):
        self.path = path
        file = open_file(path)
        try:
            data = b"".join(file.chunks())
            self.fingerprint: str = digest(data).hexdigest()
            reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
            self._names = next(reader, [])
            if twice := [name for name in self._names if self._names.count(name) > 1]:
                raise ConfigError(f"{path}:1: two columns have the name {twice[0]!r}: rename or remove one of them")
            self._rows = []
            for row in reader:
                if row and len(row) != len(self._names):
                    raise ConfigError(
                        f"{path}:{reader.line_num}: {len(row)} values, expected {len(self._names)} as in the first line"
                    )
                if row:
                    self._rows.append((reader.line_num, tuple(row)))
        except (ValueError, OSError, csv.Error) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: not a table of comma-separated values: {error}") from error
        finally:
            file.close()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(len(self), self.fingerprint, str(self.path)),)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._rows[index][0]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in zip(self._names, self._rows[index][1], strict=True) if value}

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        return readable(self, start, stop)


class Listed:
    """Records that name pictures of their own folder."""

    def __init__(self, table: Records):
        self._table, self.path = table, table.path
        self.fingerprint, self.parts = table.fingerprint, table.parts

    def __len__(self) -> int:
        return len(self._table)

    def where(self, index: int) -> str:
        return self._table.where(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = dict(self._table[index])
        found = [key for key in FILE_KEYS if record.get(key)]
        if len(found) != 1:
            raise SampleError(f"{self.where(index)}: no file_name: expected the name of the picture's file")
        names = record.pop(found[0])
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(name, str) for name in names) or any(record.get(key) for key in IMAGE_KEYS):
            raise SampleError(f"{self.where(index)}: {found[0]} is to be a text, and the only key that names pictures")
        return {**record, "images": [inside(self.path.parent, name) for name in names]}

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        return self._table.rows(fields, start, stop)


class Classes:
    """Pictures in folders that are named by their classes; only their names are held, in one text."""

    def __init__(self, root: Place, pictures: Sequence[str]):
        self.path = root
        groups: dict[bytes, list[bytes]] = {}
        for name in pictures:
            short = name[len(str(root)) + 1 :].encode("utf-8", "surrogateescape")
            groups.setdefault(short.rpartition(b"/")[0], []).append(short)
        ordered = [name for group in groups.values() for name in group]
        self._names, self._ends = b"".join(ordered), np.cumsum([len(name) for name in ordered])
        self.parts = tuple(
            Part(
                len(group), digest(b"\n".join(group)).hexdigest(), str(root / folder.decode("utf-8", "surrogateescape"))
            )
            for folder, group in groups.items()
        )
        self.fingerprint: str = digest(b"\n".join(ordered)).hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def _name(self, index: int) -> str:
        begin = int(self._ends[index - 1]) if index else 0
        return self._names[begin : int(self._ends[index])].decode("utf-8", "surrogateescape")

    def where(self, index: int) -> str:
        return str(self.path / self._name(index))

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._name(index)
        label = name.split("/")[-2]
        return {"id": name, "images": [str(self.path / name)], "label": label}

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        return readable(self, start, stop)


class Joined:
    """Records of several tables, one after the other."""

    def __init__(self, tables: Sequence[Records]):
        self._tables = tables
        self._starts = np.cumsum([0, *map(len, tables)]).tolist()
        self.path = tables[0].path
        self.parts = tuple(part for table in tables for part in table.parts)
        prints = [table.fingerprint for table in tables]
        self.fingerprint: str = digest("\n".join(prints).encode()).hexdigest() if len(prints) > 1 else prints[0]

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> tuple[Records, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._tables[number], index - self._starts[number]

    def where(self, index: int) -> str:
        table, inside_table = self._at(index)
        return table.where(inside_table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        table, inside_table = self._at(index)
        return table[inside_table]

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        return readable(self, start, stop)

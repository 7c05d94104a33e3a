"""Metrics to files: one JSON object per line, and TensorBoard events.

A run that was killed and resumed leaves files that read as one run: rows after the restored step are
dropped (JSONL) or purged (TensorBoard) when a writer opens.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Values = Mapping[str, float | int]
Row = dict[str, float | int]

log = logging.getLogger(__name__)

_BEGIN = b'{"step": '

OF_TIME = (
    "tokens_per_second",
    "images_per_second",
    "step_time",
    "waited_for_data",
    "waited_for_saves",
    "goodput",
    "mfu",
    "hbm_gib",
    "hbm_share",
)
"""Metrics of how long steps took and what memory they had: tokens and pictures in a second, seconds of a step, the
shares of the time that steps waited for data and for saves, the share of the job's time that went into steps, model
FLOPs over those that the devices can do, and the peak memory of the fullest device. They alone differ when a run is
repeated."""


class MetricsWriter(Protocol):
    """Where metrics go."""

    def write(self, step: int, values: Values) -> None:
        """Record the values of one step."""

    def close(self) -> None:
        """Write out what is buffered."""


class JsonlWriter:
    """`metrics.jsonl`: `{"step": 1, "loss": ...}` per line, written out at once."""

    def __init__(self, path: Path, after_step: int):
        """Append to `path`, keeping only rows up to `after_step` of what is there.

        Lines that are no rows are moved to `metrics.jsonl.rejected`, and a warning says so.

        Raises:
            OSError: the file cannot be read or written.
        """
        found = _read(path) if path.exists() else _Found([], [])
        if found.foreign:
            aside = path.with_name(f"{path.name}.rejected")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for _, line in found.foreign)
                file.flush()
                os.fsync(file.fileno())
            log.warning("warning: %s; moved to %s", _in_words(path, found.foreign), aside)
        rewritten = path.with_suffix(".tmp")
        rewritten.write_bytes(b"".join(line + b"\n" for row, line in found.rows if row["step"] <= after_step))
        os.replace(rewritten, path)
        self._path = path
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Values) -> None:
        """One line. A number that is not finite becomes null, which JSON readers take.

        A file that was deleted meanwhile is begun again, with a warning.

        Raises:
            OSError: it cannot be written, or its folder is gone.
        """
        if not os.fstat(self._file.fileno()).st_nlink:
            log.warning("warning: %s was deleted; its rows before step %d are lost", self._path, step)
            self._file.close()
            self._file = self._path.open("a", buffering=1)
        finite = {k: v if v - v == 0 else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """Scalars in a TensorBoard event file, written out at once.

    tensorboardX's SummaryWriter hands events to a thread. When a disk is full that thread dies, and a later write waits
    for it without end; so the file is written here.
    """

    def __init__(self, directory: Path, after_step: int):
        """A new event file; events of earlier files after `after_step` are void.

        Raises:
            OSError: the file cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter  # half a second of import that only this writer needs
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        directory.mkdir(parents=True, exist_ok=True)
        proto: Any = event_pb2  # its classes are made when it is imported
        self._event, self._scalar = proto.Event, scalar
        self._file = EventsWriter(str(directory / "events"))
        if after_step:
            # TensorBoard ignores events of earlier files from this step on.
            start = proto.SessionLog(status=proto.SessionLog.START)
            self._file.write_event(proto.Event(step=after_step + 1, wall_time=time.time(), session_log=start))
        self._file.flush()

    def write(self, step: int, values: Values) -> None:
        """One scalar per value.

        Raises:
            OSError: they cannot be written.
        """
        now = time.time()
        for name, value in values.items():
            self._file.write_event(self._event(step=step, wall_time=now, summary=self._scalar(name, value)))
        self._file.flush()

    def close(self) -> None:
        """Close the event file."""
        self._file.close()


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a metrics file.

    A last line that a killed process left unfinished is left out, and so, with one warning, are lines that are no rows
    of metrics.

    Raises:
        OSError: the file cannot be read.
    """
    found = _read(path)
    if found.foreign:
        log.warning("warning: %s; left out", _in_words(path, found.foreign))
    return [row for row, _ in found.rows]


class _Found(NamedTuple):
    """Lines of a file: rows with their text, and the others with their numbers (from 1)."""

    rows: list[tuple[Row, bytes]]
    foreign: list[tuple[int, bytes]]


def _read(path: Path) -> _Found:
    if path.exists() and not path.is_file():  # reading a pipe could wait forever
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    found = _Found([], [])
    lines = path.read_bytes().split(b"\n")
    if _row(lines[-1]) is None and lines[-1].startswith(_BEGIN[: len(lines[-1])]):
        lines.pop()  # behind the last newline: nothing, or what a killed process began to write
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            found.rows.append((row, line))
        elif line.strip():
            found.foreign.append((number, line))
    return found


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(row, dict) and type(row.get("step")) is int and all(map(_is_value, row.values()))
    return row if good else None


def _is_value(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and abs(value) <= sys.float_info.max)


def _in_words(path: Path, foreign: list[tuple[int, bytes]]) -> str:
    number, line = foreign[0]
    lines = "1 line does not" if len(foreign) == 1 else f"{len(foreign)} lines do not"
    shown = line[:60].decode("utf-8", "backslashreplace")
    return f"{path}: {lines} hold metrics; the first is line {number}: {shown!r}"

"""Metrics to files: one JSON object per line, and TensorBoard events.

A run that was killed and resumed leaves files that read as one run: rows after the restored step are
dropped (JSONL) or purged (TensorBoard) when a writer opens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

Values = Mapping[str, float | int]


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

        Raises:
            OSError: the file cannot be written.
        """
        rows = [row for row in read_jsonl(path) if row["step"] <= after_step] if path.exists() else []
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(rewritten, path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Values) -> None:
        """One line. A number that is not finite becomes null, which JSON readers take."""
        finite = {k: v if v - v == 0 else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """Scalars in a TensorBoard event file."""

    def __init__(self, directory: Path, after_step: int):
        from tensorboardX import SummaryWriter  # half a second of import that only this writer needs

        # TensorBoard ignores events of earlier files from this step on.
        self._writer = SummaryWriter(str(directory), purge_step=after_step + 1 if after_step else None)

    def write(self, step: int, values: Values) -> None:
        """One scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def read_jsonl(path: Path) -> list[dict[str, float | int]]:
    """The rows of a metrics file. A last line that a killed process left unfinished is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows

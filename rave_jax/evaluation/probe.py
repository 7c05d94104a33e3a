"""A probe: what is measured of a model beside the scores of its answers.

A probe asks the subject about some of the samples that were answered. It gives a finding, which is named values, and
pictures, which are files of the evaluation's folder. What an evaluation knows of a probe is this page: the finding's
fields are in `summary.json` under the probe's name, its sentences on the terminal, its values in the metrics of a run,
and the report has the section that the probe makes of the fields.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from rave_jax.data.sample import Sample, Source

if TYPE_CHECKING:
    from rave_jax.evaluation.records import Record
    from rave_jax.evaluation.subject import Answer, Check, Subject


class Finding(Protocol):
    """What a probe found: a dataclass whose fields JSON can hold."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def values(self) -> dict[str, float]:
        """Its main numbers by name."""
        ...

    def sentences(self) -> list[str]:
        """The finding in words."""
        ...


class Found(NamedTuple):
    """A finding, None where nothing was measured, and pictures, relative to the evaluation's folder."""

    finding: Finding | None
    pictures: tuple[str, ...] = ()


class Block(NamedTuple):
    """Some records, at most as many as a batch has rows, with their samples and answers."""

    records: Sequence[Record]
    samples: Sequence[Sample]
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Answered:
    """An evaluation whose samples have been answered.

    Attributes:
        source, subject: who was asked what.
        records: of the samples that could be asked. A probe may give a record the file of its picture.
        rows: samples in a batch.
        out: the evaluation's folder; None writes nothing.
        check: called between two pieces of work; what it raises ends the evaluation.
    """

    source: Source
    subject: Subject
    records: Sequence[Record]
    rows: int
    out: Path | None
    check: Check

    def blocks(self, count: int) -> Iterator[Block]:
        """`count` samples, spread evenly over the tasks."""
        chosen = [self.records[i] for i in spread([record.task for record in self.records], count)]
        for start in range(0, len(chosen), self.rows):
            self.check()
            part = chosen[start : start + self.rows]
            yield Block(part, [self.source[record.index] for record in part], [record.said for record in part])


class Probe(Protocol):
    """Something to measure, as an evaluation's config says it."""

    name: ClassVar[str]
    """The key of its finding in `summary.json`."""

    def measure(self, answered: Answered) -> Found:
        """Measure it. Every process of a job calls it alike."""
        ...

    @staticmethod
    def section(finding: Mapping[str, Any]) -> list[str]:
        """Lines of the report.

        Args:
            finding: the fields of a finding, as `summary.json` has them.
        """
        ...


def spread(tasks: Sequence[str], count: int) -> list[int]:
    """`count` indices, taken from the tasks in turn, each task from its first sample on."""
    seen: defaultdict[str, int] = defaultdict(int)
    turns = []
    for index, task in enumerate(tasks):
        turns.append((seen[task], index))
        seen[task] += 1
    return [index for _, index in sorted(turns)[:count]]

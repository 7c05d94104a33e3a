"""The plan of rows: which samples stand in which row of which step, and how much each may take of its row.

A plan has the order of the samples (`order.py`) and reads none. It is plain data, a pure function of its settings and
the step, so every process and every resumed run has the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rave_jax.data.collate import BatchShape
from rave_jax.data.order import Order
from rave_jax.data.skips import Skip


class Budget(NamedTuple):
    """What a document may take of its row.

    Fields:
        tokens: text and visual together.
        patches: of all its pictures.
        regions: where the visual layout has regions; not read elsewhere.
    """

    tokens: int
    patches: int
    regions: int


class PlannedDocument(NamedTuple):
    """A document of a row.

    Fields:
        source: number of the source of its sample.
        index: of the sample in its source.
        budget: what the sample may take of the row.
        messages: how many of its conversation are used, from the first on; None for all.
    """

    source: int
    index: int
    budget: Budget
    messages: int | None = None


class RowPlan(Protocol):
    """Which samples stand in which rows. Called from several threads, for any step, in any order; it can be pickled."""

    def shape(self, step: int) -> BatchShape:
        """Shape of the whole batch of a step, over all hosts."""
        ...

    def row(self, step: int, row: int) -> tuple[PlannedDocument, ...]:
        """The documents of a row, in the order in which they stand in it.

        The budgets of a row are together at most its tokens and patches. The sample of a draw stands in one row of one
        step, so that each sample comes once in an epoch.

        Args:
            step: from 0.
            row: of the whole batch of the step, from 0.
        """
        ...

    def left_out(self, step: int) -> tuple[Skip, ...]:
        """Samples that no row has because they cannot be used, said at one step each."""
        ...

    def facts(self) -> dict[str, Any]:
        """What has to be the same when a run goes on, by the names of the fields of `DataConfig`: JSON-ready."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """What the plan needs besides its facts to go on with `step`: JSON-ready.

        Its entry `step` is the step, and `taken` the samples of each source that were drawn before the draws that it
        takes up next.
        """
        ...

    def restore(self, state: Mapping[str, Any], changed: Collection[int] = ()) -> int:
        """Take up what `state` gave, among other keys; returns the step to go on with.

        Args:
            state: a state.
            changed: numbers of sources that hold other samples than when it was saved.
        """
        ...


@dataclass(frozen=True)
class EqualRows:
    """The plan in which every row has the same number of documents, each with an equal part of the row.

    Document d of row r at step s is the sample of draw (s * rows + r) * documents + d, so a state is the step alone.
    """

    rows: int
    """Rows of a batch over all hosts."""
    sizes: tuple[tuple[int, int, int], ...]
    """(first step, tokens and patches of a row from it on), ascending, the first at step 0."""
    documents: int
    """Documents of a row."""
    regions: int
    """Regions of a row; not read where the visual layout has none."""
    order: Order
    """Of the samples."""

    def shape(self, step: int) -> BatchShape:
        """Shape of the whole batch of a step, over all hosts."""
        tokens, patches = next(size for first, *size in reversed(self.sizes) if first <= step)
        return BatchShape(self.rows, tokens, patches)

    def row(self, step: int, row: int) -> tuple[PlannedDocument, ...]:
        """The documents of a row: the samples of consecutive draws, with equal budgets."""
        _, tokens, patches = self.shape(step)
        budget = Budget(tokens // self.documents, patches // self.documents, self.regions // self.documents)
        first = (step * self.rows + row) * self.documents
        sources, indices = self.order.draws(first, first + self.documents)
        return tuple(
            PlannedDocument(source, index, budget)
            for source, index in zip(sources.tolist(), indices.tolist(), strict=True)
        )

    def left_out(self, step: int) -> tuple[Skip, ...]:
        """None: what cannot be used is known when it is loaded."""
        return ()

    def facts(self) -> dict[str, Any]:
        """Rows of a batch and documents of a row: they say which draws a step has."""
        return {"rows": self.rows, "documents_per_row": self.documents}

    def state(self, step: int) -> dict[str, Any]:
        """The step, and the samples drawn of each source before it."""
        return {"step": step, "taken": list(self.order.taken(step * self.rows * self.documents))}

    def restore(self, state: Mapping[str, Any], changed: Collection[int] = ()) -> int:
        """The step of a state."""
        return int(state["step"])

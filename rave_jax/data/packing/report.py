"""How well rows are packed, step by step and over a run."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, Protocol

import numpy as np

from rave_jax.data.packing.sizes import Room, Sizes
from rave_jax.data.skips import Skip
from rave_jax.typing import Int, NpArray


class StepReport(NamedTuple):
    """How well the rows of some steps are packed, as planned. Sums over steps, so that reports can be added.

    Fields:
        steps, rows, documents: how many.
        tokens, patches, regions: of all documents.
        room_tokens, room_patches, room_regions: budgets of all rows.
        cut: conversations of which a part is left out.
        balance: for each step, the most patches of a row over the mean of its rows (1 without patches), added up. No
            split of the rows over devices has more.
        worst: the largest of these.
    """

    steps: int = 0
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    patches: int = 0
    regions: int = 0
    room_tokens: int = 0
    room_patches: int = 0
    room_regions: int = 0
    cut: int = 0
    balance: float = 0.0
    worst: float = 1.0

    def also(self, other: StepReport) -> StepReport:
        """Of these steps and the others."""
        sums = StepReport(*(mine + more for mine, more in zip(self, other, strict=True)))
        return sums._replace(worst=max(self.worst, other.worst))

    def values(self) -> dict[str, float]:
        """The numbers that a run writes down, by name."""
        if not self.steps:
            return {}
        found = {"packing/tokens": self.tokens / self.room_tokens}
        if self.room_patches:
            found["packing/patches"] = self.patches / self.room_patches
        if self.room_regions:
            found["packing/regions"] = self.regions / self.room_regions
        found |= {"packing/documents": self.documents / self.rows, "packing/cut": float(self.cut)}
        if self.room_patches:
            found |= {"packing/balance": self.balance / self.steps, "packing/worst_balance": self.worst}
        return {name: round(value, 4) for name, value in found.items()}

    def summary(self) -> str:
        """One line about a run; "" where no step was planned."""
        if not self.steps:
            return ""
        parts = [f"{self.tokens / self.room_tokens:.1%} of the tokens"]
        if self.room_patches:
            parts.append(f"{self.patches / self.room_patches:.1%} of the patches")
        if self.room_regions:
            parts.append(f"{self.regions / self.room_regions:.1%} of the regions")
        line = (
            f"packing: {self.documents:,} samples in {self.rows:,} rows, {self.documents / self.rows:.1f} in each; "
            f"they fill {', '.join(parts)}"
        )
        if self.room_patches:
            line += f"; the row with the most patches had {self.balance / self.steps:.2f} times the mean of its step"
            line += f" (at most {self.worst:.2f})"
        return line + (f"; {self.cut:,} conversations were cut" if self.cut else "")


def report(sizes: Sizes, row: Int[NpArray, "N"], rows: int, room: Room, cut: int, regions: bool) -> StepReport:
    """Of one step.

    Args:
        sizes: of its documents.
        row: of each document.
        rows: of the step.
        room: of a row.
        cut: conversations that are cut.
        regions: does the visual layout have regions?
    """
    work = np.bincount(row, sizes.patches, rows)
    balance = float(work.max() * rows / work.sum()) if work.any() else 1.0
    sums = [int(column.sum()) for column in sizes[:3]]
    rooms = [rows * room.tokens, rows * room.patches, rows * room.regions * regions]
    return StepReport(1, rows, len(row), *sums, *rooms, cut, balance, balance)


class Reports(Protocol):
    """A plan that says how well it packs."""

    def report(self, step: int) -> StepReport: ...

    def left_out(self, step: int) -> tuple[Skip, ...]: ...


class PackingMeter:
    """How well the rows of a run are packed, since it was last asked and since the run began or was continued."""

    def __init__(self, plan: Reports):
        self._plan = plan
        self._since, self._whole = StepReport(), StepReport()
        self._tokens, self._all_tokens = 0, 0
        self._left_out: Counter[str] = Counter()
        self._all_left_out: Counter[str] = Counter()

    def add(self, step: int, tokens: int) -> None:
        """Count a step that was taken; `tokens` are those of its rows that are no padding."""
        self._since = self._since.also(self._plan.report(step))
        self._tokens += tokens
        self._left_out.update(skip.reason for skip in self._plan.left_out(step))

    def take(self) -> dict[str, float]:
        """The numbers of the steps since the last time, by the names under which a run writes them down."""
        found = self._since.values()
        if found:
            found["packing/padding"] = round(1 - self._tokens / self._since.room_tokens, 4)
        for reason, count in sorted(self._left_out.items()):
            found[f"packing/left_out/{reason.replace(' ', '_')}"] = float(count)
        self._gather()
        return found

    def summary(self) -> str:
        """One line about the whole run; "" where no step was taken."""
        self._gather()
        whole = self._whole
        if not whole.steps:
            return ""
        line = f"{whole.summary()}; {1 - self._all_tokens / whole.room_tokens:.1%} of the tokens were padding"
        reasons = [f"{count:,} {reason}" for reason, count in self._all_left_out.most_common()]
        return line + (f"; left out: {', '.join(reasons)}" if reasons else "")

    def _gather(self) -> None:
        self._whole = self._whole.also(self._since)
        self._all_tokens += self._tokens
        self._all_left_out.update(self._left_out)
        self._since, self._tokens, self._left_out = StepReport(), 0, Counter()

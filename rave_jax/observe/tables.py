"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class GroupRow:
    """One line of the parameter table."""

    group: str
    """Name of the parameter group."""
    state: str
    """`trained`, `frozen`, `LoRA`, `trained until step N`."""
    tensors: int
    """Arrays in the group."""
    parameters: int
    """Numbers in the group."""
    bytes: int
    """Bytes of the parameters over all devices, each counted once."""
    optimizer_bytes: int
    """Bytes of optimizer state of these parameters."""
    learning_rate: float
    """Peak learning rate; 0 when frozen."""
    weight_decay: float
    """Weight decay; 0 when frozen."""
    whole: int
    """Arrays of the group that every device holds whole although the mesh splits parameters."""


def size(count: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def print_parameters(rows: Sequence[GroupRow], console: Console | None = None) -> None:
    """What trains and what does not, group by group, with a line of totals; on standard error by default."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    table = Table(title="Parameters", title_justify="left", box=box.SIMPLE_HEAD)
    left = ("group", "state")
    for name in (*left, "tensors", "parameters", "bytes", "optimizer", "learning rate", "decay", "not sharded"):
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        rates = (f"{row.learning_rate:g}", f"{row.weight_decay:g}") if row.learning_rate else ("", "")
        table.add_row(row.group, row.state, *_counts(row), *rates, str(row.whole))
    table.add_section()
    trained = sum(row.parameters for row in rows if row.learning_rate)
    total = GroupRow("all", f"{trained:,} trained", *(sum(getattr(r, n) for r in rows) for n in _SUMMED), 0, 0, 0)
    table.add_row(total.group, total.state, *_counts(total), "", "", str(sum(r.whole for r in rows)))
    console.print(table)


_SUMMED = ("tensors", "parameters", "bytes", "optimizer_bytes")


def _counts(row: GroupRow) -> tuple[str, str, str, str]:
    return f"{row.tensors:,}", f"{row.parameters:,}", size(row.bytes), size(row.optimizer_bytes)

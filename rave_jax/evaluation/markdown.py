"""Tables of a page."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 9) -> list[str]:
    """Lines of a Markdown table.

    Args:
        header: names of the columns.
        rows: cells as text.
        left: columns, from the first on, whose text stands left; numbers behind them stand right.
    """
    rule = [":--" if column < left else "--:" for column in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]

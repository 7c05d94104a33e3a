"""The page of packed rows: one file without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rave_jax.look.rows.html import bar_html, counted, escape, row_html
from rave_jax.look.rows.row import PackedRow

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser lets the page do, whatever stands in the data."""
LEGEND = (
    ("t learned", "learned", "a token that is learned; &times;0.5 where its weight in the loss begins to be 0.5"),
    ("t special", "&lt;|special|&gt;", "a special token"),
    ("t bytes", "\\xe2\\x98", "a piece of a character, which stands behind its last one"),
    ("t context", "context 1", "a context token"),
)
COLUMNS = ("row", "documents", "tokens", "padding", "learned", "visual", "context", "pictures", "regions", "patches")


def page(rows: Sequence[PackedRow], title: str, skips: Sequence[str] = ()) -> str:
    """The page as a text.

    Args:
        rows: in the order in which they stand on it; at least one.
        title: what they are rows of.
        skips: a line for each sample that could not be used for them.
    """
    legend = "".join(f'<span><span class="text {look}">{text}</span> {what}</span>' for look, text, what in LEGEND)
    body = "\n".join(_row(row) for row in rows)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="faint">As the model sees them: tokens, and pictures put together from the patches of the batch. The pointer
on a token or on a cell of a picture says where it stands.</p>
<div class="legend">{legend}</div>
{_counts(rows)}
{_skips(skips)}
</header>
{body}
</body>
</html>
"""


def _name(row: PackedRow) -> str:
    return f"step {row.step}, row {row.number}"


def _row(row: PackedRow) -> str:
    counts = row.counts
    said = f"{counted(counts['documents'], 'document')} · {counts['tokens']:,} of {counts['of']:,} tokens · "
    said += f"{counts['patches']:,} of {counts['of patches']:,} patches"
    return (
        f'<section class="row" id="s{row.step}r{row.number}"><h2>{_name(row)}</h2><p class="named">{said}</p>'
        f"{bar_html(row)}\n{row_html(row)}</section>"
    )


def _counts(rows: Sequence[PackedRow]) -> str:
    """A line for each row, and one for all of them."""
    all_counts = [row.counts for row in rows]
    total = {name: sum(counts[name] for counts in all_counts) for name in all_counts[0]}
    lines = [_cells(f'<a href="#s{row.step}r{row.number}">{_name(row)}</a>', row.counts) for row in rows]
    lines += [_cells("together", total)] if len(rows) > 1 else []
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _cells(name: str, counts: dict[str, int]) -> str:
    padding = 1 - counts["tokens"] / counts["of"]
    values = {
        **{key: f"{value:,}" for key, value in counts.items()},
        "row": name,
        "tokens": f"{counts['tokens']:,} / {counts['of']:,}",
        "padding": f"{padding:.1%}",
        "patches": f"{counts['patches']:,} / {counts['of patches']:,}",
    }
    return f"<tr>{''.join(f'<td>{values[name]}</td>' for name in COLUMNS)}</tr>"


def _skips(skips: Sequence[str]) -> str:
    if not skips:
        return '<p class="faint">No sample was skipped for these rows.</p>'
    lines = "".join(f"<li>{escape(line)}</li>" for line in skips)
    count = f"{counted(len(skips), 'sample')} could not be used for these rows"
    return f"<details open><summary>{count}</summary><ul>{lines}</ul></details>"

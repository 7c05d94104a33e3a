"""HTML of tokens and pictures. Every text of the data is escaped, and what it says can do nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from rave_jax.batch import Kind, Role
from rave_jax.look.rows.pictures import Cell, FrameView
from rave_jax.look.rows.row import PackedRow, Run, Token

HUES = (212, 32, 140, 330, 268, 85, 8, 182)
"""Of documents, in turn."""
WIDEST, NARROWEST = 460, 150
"""CSS pixels of a picture on the page."""


def hue(document: int) -> int:
    """The colour of a document."""
    return HUES[(document - 1) % len(HUES)]


def row_html(row: PackedRow) -> str:
    """The documents and holes of a row, in order."""
    parts, shown = [], set[int]()
    runs = list(row.runs)
    while runs:
        document = runs[0].document
        mine = [runs.pop(0)]
        while runs and runs[0].document == document:
            mine.append(runs.pop(0))
        parts.append(_document(row, mine, shown) if document else _hole(mine))
    return "\n".join(parts)


def bar_html(row: PackedRow) -> str:
    """The row as a strip, its documents and padding as wide as they have tokens."""
    parts = []
    for run in row.runs:
        what, look = (f"picture {run.image}", "seen") if run.image else ("text", "read")
        what, look = (f"document {run.document}, {what}", look) if run.document else ("padding", "pad")
        style = f"flex:{len(run.tokens)} 1 0;--h:{hue(run.document)}"
        parts.append(f'<i class="{look}" style="{style}" title="{what}: {counted(len(run.tokens), "token")}"></i>')
    return f'<div class="bar">{"".join(parts)}</div>'


def token_html(token: Token, stretch_begins: bool) -> str:
    """A token of text.

    Args:
        token: the token.
        stretch_begins: does the token before it have another weight in the loss?
    """
    looks = ["t", *({token.spelt.look} - {"text"}), *(["learned"] if token.learned else [])]
    weight = f"<sup>&times;{token.learned:.3g}</sup>" if token.learned not in (0, 1) and stretch_begins else ""
    text = _visible(token.spelt.text)
    behind = "\n" if text.endswith("\n") else ""  # else the frame of the token would reach into the next line
    whole = f'<span class="whole">{escape(token.spelt.whole)}</span>' if token.spelt.closes else ""
    span = f'<span class="{" ".join(looks)}" title="{_title(token)}">{weight}{text.removesuffix(behind)}</span>'
    return span + whole + behind


def escape(text: str) -> str:
    """Text of the data as text of the page, characters that are not seen by their pictures."""
    return html.escape("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text))


def _visible(text: str) -> str:
    return escape(text).replace("\t", '<i class="ws">⇥</i>\t').replace("\n", '<i class="ws">↵</i>\n')


def _title(token: Token) -> str:
    """What is said of a token when the pointer is on it."""
    places = token.positions[0] if len(token.positions) == 1 else ", ".join(map(str, token.positions))
    parts = [
        f"token {token.index}",
        f"document {token.document}, offset {token.offset}",
        f"{'position' if len(token.positions) == 1 else 'positions'} {places}",
    ]
    if token.role is not Role.NONE:
        parts.append(f"{token.role.name.lower()}, turn {token.turn}")
    if token.region:
        parts.append(f"region {token.region}")
    parts.append(f"id {token.id} {token.spelt.name!r}")
    if token.spelt.whole:
        parts.append(f"part of {token.spelt.whole}")
    if token.learned:
        parts.append(f"learned, weight {token.learned:.6g}")
    return escape(" · ".join(parts))


def _document(row: PackedRow, runs: Sequence[Run], shown: set[int]) -> str:
    tokens = [token for run in runs for token in run.tokens]
    document = runs[0].document
    learned = [token.learned for token in tokens if token.learned]
    counts = [f"document {document}", counted(len(tokens), "token")]
    counts += [f"{len(learned)} learned" + (f" (weights {sum(learned):.4g} together)" if _odd(learned) else "")]
    pictures, regions = {token.image for token in tokens} - {0}, {token.region for token in tokens} - {0}
    counts += [counted(len(pictures), "picture")] if pictures else []
    counts += [counted(len(regions), "region")] if regions else []
    body = "".join(_run(row, run, shown) for run in runs)
    return (
        f'<section class="document" style="--h:{hue(document)}"><div class="named">{" · ".join(counts)}</div>'
        f"{body}</section>"
    )


def _odd(weights: Sequence[float]) -> bool:
    return any(weight != 1 for weight in weights)


def counted(number: int, what: str, many: str = "") -> str:
    """A number of things in words."""
    return f"{number:,} {what if number == 1 else many or f'{what}s'}"


def _hole(runs: Sequence[Run]) -> str:
    return f'<div class="hole">padding · {counted(sum(len(run.tokens) for run in runs), "token")}</div>'


def _run(row: PackedRow, run: Run, shown: set[int]) -> str:
    if run.kind is Kind.VISUAL:
        return _visuals(row, run, shown)
    if run.kind is Kind.CONTEXT:
        spans = [
            f'<span class="t context" title="{_title(token)}">context {number}</span>'
            for number, token in enumerate(run.tokens, start=1)
        ]
        return f'<div class="text">{" ".join(spans)}</div>'
    before, spans = 0.0, []
    for token in run.tokens:
        spans.append(token_html(token, token.learned != before))
        before = token.learned
    return f'<div class="text">{"".join(spans)}</div>'


def _visuals(row: PackedRow, run: Run, shown: set[int]) -> str:
    first, last = run.tokens[0], run.tokens[-1]
    of = f"picture {run.image}: {counted(len(run.tokens), 'visual token')}, {first.index} to {last.index} of the row"
    regions = sorted({token.region for token in run.tokens} - {0})
    of += f", regions {regions[0]} to {regions[-1]}" if regions else ""
    frames = [] if run.image in shown else [frame for frame in row.frames if frame.image == run.image]
    shown.add(run.image)
    tokens = {token.index: token for token in row.tokens} if frames else {}
    figures = "".join(_figure(frame, tokens) for frame in frames)
    return f'<div class="named">{of}</div>' + (f'<div class="pictures">{figures}</div>' if figures else "")


def _figure(frame: FrameView, tokens: dict[int, Token]) -> str:
    width, height = frame.pixels[0].size
    wide = min(max(width, NARROWEST), WIDEST)
    cells = "".join(_cell(cell, tokens[cell.token]) for cell in frame.cells)
    named = "".join(_region_name(cells) for cells in _by_region(frame.cells))
    overlay = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{cells}{named}</svg>'
    look = f'class="frame{" enlarged" if wide > width else ""}" style="width:{wide}px"'
    first = f'<div {look}><img src="{data_uri(frame.pixels[0])}" alt="">{overlay}</div>'
    later = "".join(f'<div {look}><img src="{data_uri(image)}" alt=""></div>' for image in frame.pixels[1:])
    steps = f", {len(frame.pixels)} steps of time in each patch" if later else ""
    caption = f"frame {frame.number}: {width} &times; {height} pixels, {counted(frame.patches, 'patch', 'patches')}"
    pictures = f'<div class="later">{first}{later}</div>' if later else first
    return f"<figure>{pictures}<figcaption>{caption}{steps}</figcaption></figure>"


def _cell(cell: Cell, token: Token) -> str:
    left, top, right, bottom = cell.box
    region = f' class="r" style="--r:{cell.region * 67 % 360}"' if cell.region else ""
    return (
        f'<rect{region} x="{left}" y="{top}" width="{right - left}" height="{bottom - top}">'
        f"<title>{_title(token)}</title></rect>"
    )


def _by_region(cells: Sequence[Cell]) -> list[list[Cell]]:
    found: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.region:
            found.setdefault(cell.region, []).append(cell)
    return list(found.values())


def _region_name(cells: Sequence[Cell]) -> str:
    """The number of a region in the middle of it."""
    x = (min(cell.box[0] for cell in cells) + max(cell.box[2] for cell in cells)) / 2
    y = (min(cell.box[1] for cell in cells) + max(cell.box[3] for cell in cells)) / 2
    size = 0.55 * (cells[0].box[3] - cells[0].box[1])
    where = f'x="{x:g}" y="{y:g}" style="font-size:{size:g}px" text-anchor="middle" dominant-baseline="central"'
    return f"<text {where}>{cells[0].region}</text>"


def data_uri(image: Image.Image) -> str:
    """The picture as a PNG within the page."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

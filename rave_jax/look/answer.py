"""The page of one answer: where it and its question looked, and what hiding parts of the picture costs it. One file
without scripts and without anything from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from rave_jax.look.maps import Box
from rave_jax.look.overlay import BOX, blend
from rave_jax.look.rows.page import POLICY, STYLE
from rave_jax.typing import Float, NpArray

WIDTH = 420
"""Pixels of a map on the page, which is not made smaller than its picture."""


@dataclass(frozen=True)
class Map:
    """A map over the picture.

    Attributes:
        name: what it is of.
        times_even: its values, 1 for the even share.
        note: what it says in numbers.
    """

    name: str
    times_even: Float[NpArray, "y x"]
    note: str


def answer_page(
    question: str, answer: str, image: Image.Image, box: Box | None, maps: Sequence[Map], notes: Sequence[str] = ()
) -> str:
    """The page as a text.

    Args:
        question, answer: what was asked and answered.
        image: the picture.
        box: the evidence in fractions of the picture, or None.
        maps: in their order.
        notes: sentences under the answer.
    """
    figures = [_figure("the picture" if box is None else "the picture, evidence in the box", "", image, None, box)]
    figures += [_figure(one.name, one.note, image, one.times_even, box) for one in maps]
    said = "".join(f'<p class="faint">{html.escape(note)}</p>' for note in notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(question)}</title>
<style>
{STYLE.read_text()}
.maps {{ display: flex; flex-wrap: wrap; gap: 1.2rem; margin-top: 1rem; }}
.maps figure {{ margin: 0; max-width: {WIDTH}px; }}
.maps img {{ width: 100%; display: block; }}
</style>
</head>
<body>
<header>
<h1>{html.escape(question)}</h1>
<p>{html.escape(answer) or "(nothing)"}</p>
{said}
<p class="faint">Red cells have more than their even share of what a map shows, blue ones less, from an eighth to eight
times.</p>
</header>
<div class="maps">
{"".join(figures)}
</div>
</body>
</html>
"""


def _figure(name: str, note: str, image: Image.Image, times_even: Float[NpArray, "y x"] | None, box: Box | None) -> str:
    scale = max(1, round(WIDTH / image.width))
    large = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    if times_even is not None:
        large = Image.fromarray(np.round(255 * blend(large, times_even)).astype(np.uint8))
    if box is not None:
        edges = [side * of for side, of in zip(box, large.size * 2, strict=True)]
        ImageDraw.Draw(large).rectangle(edges, outline=BOX, width=max(2, large.width // 120))
    stream = io.BytesIO()
    large.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    words = f"<b>{html.escape(name)}</b> {html.escape(note)}"
    return (
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>\n"
    )

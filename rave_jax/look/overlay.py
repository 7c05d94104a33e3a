"""Pictures of attention: a sample's image with its evidence box, beside it the same image under the attention.

Colours are multiples of attention spread evenly over the picture, on one scale for all pictures, heads and runs: a cell
with its even share is not coloured, red ones have more and blue ones less. Even attention therefore looks even.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from rave_jax.look.maps import Box
from rave_jax.typing import Float, NpArray

INK, FAINT, RIGHT, WRONG, BOX = "#1b1f24", "#6a737d", "#1a7f37", "#c4320a", "#00b3a4"
COLOURS = "coolwarm"
SCALE = 8.0
"""The strongest colours stand for this many times the even share, or one part in as many, and for what is beyond."""
TICKS = {1 / 8: "1/8", 1 / 4: "1/4", 1 / 2: "1/2", 1: "1.0", 2: "2", 4: "4", 8: "8"}
PANEL, GAP, BAR = 3.6, 0.2, 0.75
"""Inches: width of a picture, of the space around it, and of the colour bar with its numbers."""


@dataclass(frozen=True)
class Caption:
    """The words under a picture."""

    question: str
    answer: str
    prediction: str
    score: float
    note: str = ""


def strength(times_even: Float[NpArray, "y x"]) -> Float[NpArray, "y x"]:
    """Place of each value on the scale: -1 for 1/SCALE of the even share or less, 0 for even, 1 for SCALE or more."""
    values = np.log(np.clip(times_even, 1 / SCALE, SCALE)) / math.log(SCALE)
    return np.clip(values, -1.0, 1.0)


def on_picture(values: Float[NpArray, "y x"], width: int, height: int) -> Float[NpArray, "height width"]:
    """A map resized onto a picture. Cells are shown as the blocks they are: nothing is smoothed."""
    resized = Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized)


def blend(image: Image.Image, times_even: Float[NpArray, "y x"]) -> NpArray:
    """The picture in grey with the map in colour over it, float [height, width, 3] in 0..1.

    The strongest cell keeps a third of the picture, so that what stands there can still be read.
    """
    # Neither black nor white, so that a colour looks alike on all of the picture and on the colour bar.
    grey = 0.3 + 0.55 * np.asarray(image.convert("L"), np.float32) / 255.0
    return _coloured(grey, on_picture(strength(times_even), image.width, image.height))


def _coloured(grey: Float[NpArray, "y x"], values: Float[NpArray, "y x"]) -> NpArray:
    colour = colormaps[COLOURS](0.5 + 0.5 * values)[..., :3]
    # The root makes a difference of a few parts in a hundred visible, and leaves even attention without colour.
    share = (0.67 * np.sqrt(np.abs(values)))[..., None]
    return np.clip((1.0 - share) * grey[..., None] + share * colour, 0.0, 1.0)


def _show(axes: Axes, picture: NpArray, box: Box | None, title: str, fontsize: int = 9, line: float = 2.5) -> None:
    height, width = picture.shape[:2]
    smooth = "antialiased" if max(width, height) > 256 else "nearest"
    axes.imshow(picture, interpolation=smooth)
    if box is not None:
        corner = (box[0] * width - 0.5, box[1] * height - 0.5)
        size = ((box[2] - box[0]) * width, (box[3] - box[1]) * height)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=1.8 * line))
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=to_rgb(BOX), linewidth=line))
    axes.set_title(title, fontsize=fontsize, color=FAINT, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d7de")


def _colour_bar(figure: Figure, left: float, bottom: float, width: float, height: float) -> None:
    """The scale, its colours over middle grey as they are over a picture. Arguments in fractions of the figure."""
    axes = figure.add_axes((left, bottom, width, height))
    values = np.linspace(1, -1, 256)[:, None]
    axes.imshow(_coloured(np.full_like(values, 0.6), values), aspect="auto", extent=(0, 1, -1, 1))
    axes.set_xticks([])
    places = [math.log(value) / math.log(SCALE) for value in TICKS]
    axes.yaxis.tick_right()
    axes.set_yticks(places, list(TICKS.values()), fontsize=7, color=FAINT)
    axes.tick_params(length=2, pad=1.5, color=FAINT)
    axes.set_title("x uniform", fontsize=7, color=FAINT)
    for spine in axes.spines.values():
        spine.set_color("#d0d7de")


def _save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix)
    # The same picture is the same file, and letters in a PDF stay letters.
    with matplotlib.rc_context({"svg.hashsalt": "rave_jax", "pdf.fonttype": 42}):
        figure.savefig(path, metadata=undated)


def save_overlay(
    path: Path,
    image: Image.Image,
    times_even: Float[NpArray, "y x"],
    box: Box | None,
    caption: Caption,
    of: str = "attention of the answer",
) -> None:
    """Write the picture of one sample.

    Args:
        path: where to; its name ends in .png, .pdf or .svg.
        image: the sample's picture.
        times_even: attention on the cells of its grid, 1 for the even share.
        box: evidence, in fractions of the picture, or None.
        caption: the words underneath.
        of: what the map shows.
    """
    image = image.convert("RGB")
    panel_height = min(max(PANEL * image.height / image.width, 1.6), 6.0)
    question = textwrap.wrap(caption.question, 84)[:4] or [""]
    lines = [(line, INK, "bold") for line in question]
    lines += [(_short(f"answer: {caption.answer}"), INK, "normal")]
    colour = RIGHT if caption.score >= 0.5 else WRONG
    lines += [(_short(f"model:   {caption.prediction or '(nothing)'}"), colour, "bold")]
    lines += [(line, FAINT, "normal") for line in textwrap.wrap(caption.note, 100)]
    line_height = 0.21
    foot = line_height * (len(lines) + 0.8)
    width, height = 2 * (PANEL + GAP) + GAP + BAR, panel_height + foot + 0.35
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    most = f"{of} (most: {float(times_even.max()):.3g} x uniform)"
    for number, (picture, title) in enumerate(
        [
            (np.asarray(image, np.float32) / 255.0, "picture" if box is None else "picture, evidence in the box"),
            (blend(image, times_even), most),
        ]
    ):
        left = GAP + number * (PANEL + GAP)
        axes = figure.add_axes((left / width, foot / height, PANEL / width, panel_height / height))
        _show(axes, picture, box, title)
    _colour_bar(figure, (2 * (PANEL + GAP) + GAP) / width, foot / height, 0.16 / width, panel_height / height)
    for number, (line, line_colour, weight) in enumerate(lines):
        y = (foot - 0.12 - line_height * (number + 1)) / height
        # Words come from data: a dollar sign is a dollar sign, not mathematics.
        figure.text(GAP / width, y, line, color=line_colour, weight=weight, fontsize=10, parse_math=False)
    _save(figure, path)


def save_heads(
    path: Path,
    image: Image.Image,
    times_even: Float[NpArray, "H y x"],
    on_picture: Float[NpArray, "H"],
    box: Box | None,
) -> None:
    """Write the attention of every head over the picture of one sample, on the scale of `save_overlay`.

    Args:
        path: where to; its name ends in .png, .pdf or .svg.
        image: the sample's picture.
        times_even: of each head, 1 for the even share.
        on_picture: share of each head's attention that went to the picture.
        box: evidence, in fractions of the picture, or None.
    """
    image = image.convert("RGB")
    columns = min(len(times_even), 8)
    rows = -(-len(times_even) // columns)
    side, tall = 1.5, min(max(1.5 * image.height / image.width, 0.7), 3.0)
    head, bar = 0.3, max(BAR, 1.0)
    width, height = columns * (side + 0.1) + GAP + bar, rows * (tall + head) + 0.15
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    for number, (values, share) in enumerate(zip(times_even, on_picture, strict=True)):
        row, column = divmod(number, columns)
        left, bottom = 0.1 + column * (side + 0.1), height - (row + 1) * (tall + head)
        axes = figure.add_axes((left / width, bottom / height, side / width, tall / height))
        _show(axes, blend(image, values), box, f"head {number}: {share:.0%} on picture", fontsize=7, line=1.2)
    bottom, tallest = 0.15 / height, min(height - 0.15 - head, 3.0) / height
    _colour_bar(figure, (width - bar + 0.1) / width, bottom, 0.14 / width, tallest)
    _save(figure, path)


def _short(line: str) -> str:
    return textwrap.shorten(line, 88, placeholder=" ...") if len(line) > 88 else line

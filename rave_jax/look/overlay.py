"""One picture per sample: the image with its evidence box, beside it the same image under the attention."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

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
HEAT = "inferno"
# Up to this many cells a side, cells are shown as the blocks they are; finer grids are smoothed.
BLOCKS_UP_TO = 8


@dataclass(frozen=True)
class Caption:
    """The words under a picture."""

    question: str
    answer: str
    prediction: str
    score: float
    note: str = ""


def heat_image(heat: Float[NpArray, "y x"], width: int, height: int) -> Float[NpArray, "height width"]:
    """A map resized onto a picture, scaled so that its largest value is 1 (all zero stays zero)."""
    mode = Image.Resampling.NEAREST if max(heat.shape) <= BLOCKS_UP_TO else Image.Resampling.BICUBIC
    scaled = heat / max(float(heat.max()), 1e-30)
    resized = Image.fromarray(scaled.astype(np.float32)).resize((width, height), mode)
    return np.clip(np.asarray(resized), 0.0, 1.0)


def blend(image: Image.Image, heat: Float[NpArray, "y x"]) -> NpArray:
    """The picture in grey with the map in colour over it, float [height, width, 3] in 0..1.

    The strongest cell keeps a third of the picture, so that what stands there can still be read.
    """
    grey = np.asarray(image.convert("L"), np.float32)[..., None] / 255.0
    strength = heat_image(heat, image.width, image.height)
    colour = colormaps[HEAT](0.15 + 0.8 * strength)[..., :3]
    share = (0.25 + 0.42 * strength)[..., None]
    return np.clip((1.0 - share) * grey + share * colour, 0.0, 1.0)


def _show(axes: Axes, picture: NpArray, box: Box | None, title: str) -> None:
    height, width = picture.shape[:2]
    smooth = "antialiased" if max(width, height) > 256 else "nearest"
    axes.imshow(picture, interpolation=smooth)
    if box is not None:
        corner = (box[0] * width - 0.5, box[1] * height - 0.5)
        size = ((box[2] - box[0]) * width, (box[3] - box[1]) * height)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=4.5))
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=to_rgb(BOX), linewidth=2.5))
    axes.set_title(title, fontsize=9, color=FAINT, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d7de")


def save_overlay(
    path: Path, image: Image.Image, heat: Float[NpArray, "y x"], box: Box | None, caption: Caption
) -> None:
    """Write the picture of one sample as PNG.

    Args:
        path: where to.
        image: the sample's picture.
        heat: attention on the cells of its grid.
        box: evidence, in fractions of the picture, or None.
        caption: the words underneath.
    """
    image = image.convert("RGB")
    panel_height = min(max(3.6 * image.height / image.width, 1.6), 6.0)
    question = textwrap.wrap(caption.question, 76)[:4] or [""]
    lines = [(line, INK, "bold") for line in question]
    lines += [(_short(f"answer: {caption.answer}"), INK, "normal")]
    colour = RIGHT if caption.score >= 0.5 else WRONG
    lines += [(_short(f"model:   {caption.prediction or '(nothing)'}"), colour, "bold")]
    lines += [(line, FAINT, "normal") for line in textwrap.wrap(caption.note, 92)]
    line_height = 0.21
    foot = line_height * (len(lines) + 0.8)
    height = panel_height + foot + 0.35
    figure = Figure(figsize=(7.8, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    for number, (picture, title) in enumerate(
        [
            (np.asarray(image, np.float32) / 255.0, "picture" if box is None else "picture, evidence in the box"),
            (blend(image, heat), "attention of the answer"),
        ]
    ):
        axes = figure.add_axes((0.2 / 7.8 + number * 0.5, foot / height, 3.6 / 7.8, panel_height / height))
        _show(axes, picture, box, title)
    for number, (line, line_colour, weight) in enumerate(lines):
        y = (foot - 0.12 - line_height * (number + 1)) / height
        # Words come from data: a dollar sign is a dollar sign, not mathematics.
        figure.text(0.2 / 7.8, y, line, color=line_colour, weight=weight, fontsize=10, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _short(line: str) -> str:
    return textwrap.shorten(line, 88, placeholder=" ...") if len(line) > 88 else line

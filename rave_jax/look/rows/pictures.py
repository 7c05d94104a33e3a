"""Pictures of a row put together again from its patches: what the tower reads, after resizing."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rave_jax.batch import Batch, Kind
from rave_jax.families.config import TowerConfig
from rave_jax.typing import Int, NpArray


class Cell(NamedTuple):
    """A visual token in a picture.

    Fields:
        token: its index in the row.
        box: left, top, right, bottom of its merge unit in pixels.
        region: number of its region in the row; 0 without regions.
    """

    token: int
    box: tuple[int, int, int, int]
    region: int


class FrameView(NamedTuple):
    """A frame of the tower: a picture, a tile of one, or a temporal step of a video.

    Fields:
        number: of the frame in the row, from 1.
        image: number of its picture or video in the row; 0 where no visual token is made of it.
        pixels: what its patches hold, one after another in time where a patch has several and they differ.
        patches: how many patches it has.
        cells: its visual tokens.
    """

    number: int
    image: int
    pixels: tuple[Image.Image, ...]
    patches: int
    cells: tuple[Cell, ...]


def shown_frames(batch: Batch, row: int, tower: TowerConfig) -> list[FrameView]:
    """The frames of a row, in the order of its patches.

    Args:
        batch: of numpy arrays.
        row: which of its rows.
        tower: says how patches are cut.
    """
    frame: Any = batch.patches.frame[row]
    place: Any = batch.patches.place[row]
    owner = _tokens_of_units(batch, row, tower)
    shown = []
    for number in np.unique(frame[frame > 0]).tolist():
        (mine,) = np.nonzero(frame == number)
        seen = mine[(place[mine] >= 0).all(-1)]  # a class token has no place
        cells = []
        for unit in np.unique(seen // tower.merge_unit).tolist():
            corners = place[unit * tower.merge_unit : (unit + 1) * tower.merge_unit] * tower.patch_size
            top, left = corners.min(0).tolist()
            bottom, right = (corners.max(0) + tower.patch_size).tolist()
            for token in owner.get(unit, ()):
                cells.append(Cell(token, (left, top, right, bottom), int(batch.info.region[row, token])))
        image = int(batch.info.image[row, cells[0].token]) if cells else 0
        pixels = _put_together(np.asarray(batch.patches.pixels[row])[seen], place[seen], tower)
        shown.append(FrameView(number, image, pixels, len(mine), tuple(cells)))
    return shown


def _put_together(pixels: Any, place: Int[NpArray, "P 2"], tower: TowerConfig) -> tuple[Image.Image, ...]:
    side, channels = tower.patch_size, tower.in_channels
    blocks = pixels.reshape(len(pixels), channels, -1, side, side)
    height, width = (place.max(0) + 1).tolist() if len(place) else (1, 1)
    whole: Any = np.zeros((blocks.shape[2], height, side, width, side, channels), np.uint8)
    whole[:, place[:, 0], :, place[:, 1]] = blocks.transpose(0, 2, 3, 4, 1)
    whole = whole.reshape(-1, height * side, width * side, channels)
    still = all((one == whole[0]).all() for one in whole)
    return tuple(_picture(one) for one in (whole[:1] if still else whole))


def _picture(pixels: Any) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])


def _tokens_of_units(batch: Batch, row: int, tower: TowerConfig) -> dict[int, list[int]]:
    """The visual tokens that each merge unit of a row is read by."""
    found: dict[int, list[int]] = {}
    (visual,) = np.nonzero(np.asarray(batch.info.kind[row]) == Kind.VISUAL)
    for token in visual.tolist():
        index = int(batch.visual_index[row, token])
        units: Any = [index]
        if tower.mixed:
            units = batch.patches.source[row, index][batch.patches.weight[row, index] != 0]
        for unit in units:
            if unit >= 0:  # -1 is a row that the model has learned
                found.setdefault(int(unit), []).append(token)
    return found

"""Pictures cut into tiles of one size: the part of a tower's config that says how large they are, and their patches.

A tile is a frame: its patches attend to each other and to no others. A row of patches is whole tiles, so that a tower
may look at them tile by tile, with whatever it puts beside their patches (`models.tower.by_tile`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from rave_jax.batch import Patches
from rave_jax.config import require
from rave_jax.families.config import MAX_SIDE, MAX_WIDTH, TowerConfig, within
from rave_jax.families.pictures import CutPicture
from rave_jax.layout import WHOLE, Box, inside
from rave_jax.typing import Int, NpArray, UInt8


class TileGrid(tuple[int, int, int]):
    """The merged grid of a picture in tiles, a frame for each, that knows how its tiles stand.

    Attributes:
        tiles: rows and columns of tiles. The grid has one frame more where the whole picture follows them.
    """

    tiles: tuple[int, int]

    def __new__(cls, tiles: tuple[int, int], whole: bool, side: int) -> Self:
        """The grid of tiles of `side` x `side` visual tokens, with the whole picture or without."""
        grid = super().__new__(cls, (tiles[0] * tiles[1] + whole, side, side))
        grid.tiles = tiles
        return grid


@dataclass(frozen=True)
class TileTowerConfig(TowerConfig):
    """A tower that reads tiles of one size. A family adds the fields of its own tower in a subclass."""

    image_size: int = 56
    """Side of a tile in pixels. What is over at its edges, when patches do not fill it, is cut off."""
    merge_size: int = 2
    """Side, in patches, of the square that becomes one visual token (pixel shuffle)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, {"image_size": MAX_WIDTH, "merge_size": MAX_SIDE})
        divides = self.hidden_size % self.num_heads == 0
        require(divides, "hidden_size", self.hidden_size, f"a multiple of num_heads {self.num_heads}")
        whole = self.side > 0 and self.side % self.merge_size == 0
        expected = f"whole merge units of {self.merge_size} patches of {self.patch_size} pixels"
        require(whole, "image_size", self.image_size, expected)

    @property
    def patch_width(self) -> int:
        """C: numbers in a flattened patch (channel, row, col)."""
        return self.in_channels * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.merge_size**2

    @property
    def side(self) -> int:
        """Patches along the side of a tile."""
        return self.image_size // self.patch_size

    @property
    def token_side(self) -> int:
        """Visual tokens along the side of a tile."""
        return self.side // self.merge_size

    @property
    def window_patches(self) -> int:
        """Patches of a tile; those of a row are whole tiles."""
        return self.side**2

    @property
    def seen(self) -> Box:
        """The part of a tile that its patches cover."""
        covered = self.side * self.patch_size / self.image_size
        return 0.0, 0.0, covered, covered


@functools.lru_cache(maxsize=256)
def tile_places(side: int, merge: int) -> Int[NpArray, "S 2"]:
    """Row and column of each patch of a tile, in the order of its merge units: units row by row, and so the patches of
    a unit."""
    rows, cols = np.indices((side, side), dtype=np.int32).reshape(2, side // merge, merge, side // merge, merge)
    places = np.stack([rows, cols], -1).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    places.setflags(write=False)
    return places


def cut_tiles(tiles: Sequence[UInt8[NpArray, "H W 3"]], vision: TileTowerConfig) -> CutPicture:
    """Patches of tiles of `image_size`, one after another; the merged grid has a frame for each."""
    p, merge, units, count = vision.patch_size, vision.merge_size, vision.token_side, len(tiles)
    whole = np.stack(tiles)[:, : vision.side * p, : vision.side * p]
    squares = whole.reshape(count, units, merge, p, units, merge, p, vision.in_channels)
    pixels: Any = np.ascontiguousarray(squares.transpose(0, 1, 4, 2, 5, 7, 3, 6)).reshape(-1, vision.patch_width)
    frame: Any = np.repeat(np.arange(1, count + 1, dtype=np.int32), vision.side**2)
    place: Any = np.tile(tile_places(vision.side, merge), (count, 1))
    order = np.arange(count * units**2, dtype=np.int32)
    return CutPicture(Patches(pixels, frame, place, frame), order, (count, units, units), (vision.seen,) * count)


def tile_boxes(rows: int, cols: int, whole: bool, vision: TileTowerConfig) -> tuple[Box, ...]:
    """The part of a picture in each of its tiles, row by row, and in the whole picture where that follows them."""
    boxes = [(x / cols, y / rows, (x + 1) / cols, (y + 1) / rows) for y in range(rows) for x in range(cols)]
    return tuple(inside(box, vision.seen) for box in (*boxes, *[WHOLE] * whole))

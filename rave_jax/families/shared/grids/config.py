"""What a tower has that reads pictures of any size."""

from __future__ import annotations

from dataclasses import dataclass

from rave_jax.config import require
from rave_jax.families.config import MAX_SIDE, TowerConfig, within


@dataclass(frozen=True)
class GridTowerConfig(TowerConfig):
    """A tower whose pictures are grids of merge units. A family adds the fields of its own tower in a subclass."""

    temporal_patch_size: int = 2
    """Frames in a patch; a still image is repeated."""
    merge_size: int = 2
    """Side, in patches, of the square that becomes one visual token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, dict.fromkeys(("merge_size", "temporal_patch_size"), MAX_SIDE))
        divides = self.hidden_size % self.num_heads == 0 and self.head_dim % 4 == 0
        require(divides, "hidden_size", self.hidden_size, f"num_heads {self.num_heads} times a multiple of 4")

    @property
    def patch_width(self) -> int:
        """C: numbers in a flattened patch (channel, temporal, row, col)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.merge_size**2

    @property
    def unit_size(self) -> int:
        """Pixels along the side of a merge unit: both sides of a resized picture are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def window_units(self) -> int | None:
        """Merge units along the side of a window; None where a frame is one window."""
        return None

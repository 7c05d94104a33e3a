"""What a tower with a learned table of positions has."""

from __future__ import annotations

from dataclasses import dataclass

from rave_jax.config import require
from rave_jax.families.config import MAX_SIDE, ROPE_THETA, within
from rave_jax.families.shared.grids.config import GridTowerConfig

NORM_EPS = 1e-6
"""Added to the variance in every LayerNorm of the tower."""


@dataclass(frozen=True)
class TableTowerConfig(GridTowerConfig):
    """The vision tower and the mergers after it."""

    patch_size: int = 16
    """Side of a patch in pixels."""
    table_side: int = 4
    """Rows and columns of the table of positions, which is stretched over every frame."""
    deep_blocks: tuple[int, ...] = ()
    """Blocks, in order, whose output becomes features for the decoder too: those of the n-th are added to the visual
    tokens behind the n-th decoder layer."""
    rope_theta: float = 1e4
    """Base of the rotary frequencies of rows and columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, {"table_side": MAX_SIDE})
        ordered = list(self.deep_blocks) == sorted(set(self.deep_blocks))
        known = all(0 <= n < self.depth for n in self.deep_blocks)
        expected = f"numbers from 0 to {self.depth - 1}, each once and in order"
        require(ordered and known, "deep_blocks", self.deep_blocks, expected)
        low, high = ROPE_THETA
        require(low <= self.rope_theta <= high, "rope_theta", self.rope_theta, f"a number from {low:g} to {high:g}")

    @property
    def window_patches(self) -> int:
        """What a row's number of patches is a multiple of: whole merge units."""
        return self.merge_unit

    @property
    def deep_layers(self) -> int:
        """How many decoder layers, from the first on, get features of the tower added behind them."""
        return len(self.deep_blocks)

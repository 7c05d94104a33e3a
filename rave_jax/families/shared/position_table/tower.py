"""A vision tower with a learned table of positions (arXiv 2511.21631): LayerNorm, one mlp with GELU, 2-D rotary.

The table has rows and columns, and is stretched over every frame whatever its size: a patch reads it where it stands
between the frame's corners, mixed from the four entries around. Every block attends over the whole frame. Grids never
appear here: patches bring their place and frame as arrays, so one compiled program serves images of every size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention import block_diagonal_codes
from rave_jax.attention.rotation import Rotation
from rave_jax.batch import Patches
from rave_jax.families.shared.position_table.config import NORM_EPS, TableTowerConfig
from rave_jax.kernels.attention import MaskCodes
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import ImageFeatures
from rave_jax.models.initial import normal
from rave_jax.models.layers import LayerNorm, Linear
from rave_jax.models.rope import patch_rotation
from rave_jax.models.stack import LayerRun
from rave_jax.models.tower import FrameBlock, Merger, check_patches, normalised
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float, Int


class PositionTable(nnx.Module):
    """Learned vectors [side * side, D], row by row, of places that are evenly spread over a frame."""

    def __init__(self, side: int, width: int, *, dtype: jnp.dtype, key: jax.Array):
        self.weight = nnx.Param(normal(key, (side**2, width), 0.02, dtype), axes=(None, "embed"))
        self.side = side

    def __call__(self, place: Int[Array, "B P 2"], size: Int[Array, "B P 2"]) -> Float[Array, "B P D"]:
        """The vectors of patches, float32.

        Args:
            place: row and column of each patch.
            size: rows and columns of its frame; its corners read those of the table.
        """
        # In this order, as the checkpoints' own code rounds.
        at = place.astype(jnp.float32) * (self.side - 1) / jnp.maximum(size - 1, 1).astype(jnp.float32)
        low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, self.side - 1)
        high, part = jnp.minimum(low + 1, self.side - 1), at - low
        table = self.weight[...]
        total = jnp.zeros((*place.shape[:-1], table.shape[-1]), jnp.float32)
        for row, down in ((low[..., 0], 1 - part[..., 0]), (high[..., 0], part[..., 0])):
            for col, across in ((low[..., 1], 1 - part[..., 1]), (high[..., 1], part[..., 1])):
                total += table[row * self.side + col].astype(jnp.float32) * (down * across)[..., None]
        return total


class Tower(nnx.Module):
    """Patches of a row to visual tokens of the decoder's width, and to what is added behind its first layers."""

    def __init__(self, config: TableTowerConfig, options: ModelOptions, *, key: jax.Array):
        dtype, D, unit = options.params, config.hidden_size, config.merge_unit
        patch_key, table_key, merger_key, blocks_key = jax.random.split(key, 4)
        self.patch = Linear((D,), (config.patch_width,), ("embed", "patch"), bias=True, dtype=dtype, key=patch_key)
        self.table = PositionTable(config.table_side, D, dtype=dtype, key=table_key)
        keys = jax.random.split(blocks_key, config.depth)
        self.layer_runs = nnx.List(
            LayerRun(start, stop, lambda k: FrameBlock(config, "gelu_pytorch_tanh", NORM_EPS, options, k), keys)
            for start, stop in block_runs(config.depth, config.deep_blocks, options.scan_layers)
        )
        merger_key, *deep_keys = jax.random.split(merger_key, 1 + len(config.deep_blocks))
        norm = LayerNorm(D, eps=NORM_EPS, dtype=dtype)
        self.merger = Merger(norm, D, config.out_size, unit, dtype=dtype, key=merger_key)
        self.deep_mergers = nnx.List(
            Merger(LayerNorm(D * unit, eps=NORM_EPS, dtype=dtype), D, config.out_size, unit, dtype=dtype, key=k)
            for k in deep_keys
        )
        self.config = config
        self.remat = options.tower_remat
        self.compute = options.compute

    def __call__(self, patches: Patches) -> ImageFeatures:
        """What becomes of these patches [B,P, ...], P / merge_unit visual tokens in the order of their merge units.

        Raises:
            ValueError: P is not a whole number of merge units, or C is not what the patch projection reads.
        """
        config = self.config
        check_patches(patches, config)
        codes = block_diagonal_codes(patches.frame)
        rotation = patch_rotation(patches.place, config.head_dim, config.rope_theta)
        x = self.patch(normalised(patches.pixels, config, self.compute))
        x = x + self.table(patches.place, frame_sizes(patches)).astype(x.dtype)
        x = shard(x, "batch", "length", None)
        deep, mergers = [], iter(self.deep_mergers)
        for run in self.layer_runs:

            def body(block: FrameBlock, x: Array, _: None, at: tuple[Rotation, MaskCodes]) -> tuple[Array, None]:
                return block(x, *at), None

            x, _ = run.scan(body, x, None, (rotation, codes), self.remat)
            if run.stop - 1 in config.deep_blocks:
                # Here the norm is over a merge unit's patches side by side, and not over each patch.
                deep.append(next(mergers)(x.reshape(x.shape[0], -1, config.merge_unit * x.shape[-1])))
        return ImageFeatures(self.merger(x), tuple(deep))


def frame_sizes(patches: Patches) -> Int[Array, "B P 2"]:
    """Rows and columns of each patch's frame, in patches. The last patch of a frame is that at its far corner."""
    frame, P = patches.frame, patches.length
    ends = jnp.pad(frame[:, 1:] != frame[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, jnp.arange(P, dtype=jnp.int32), P), axis=1, reverse=True)
    return jnp.take_along_axis(patches.place, last[..., None], axis=1) + 1


def block_runs(depth: int, deep_blocks: tuple[int, ...], join: bool = True) -> list[tuple[int, int]]:
    """(start, stop) of each run of blocks; one ends behind each deep block, and without `join` behind every block."""
    ends = [n + 1 for n in range(depth) if not join or n in deep_blocks or n == depth - 1]
    return list(zip([0, *ends[:-1]], ends, strict=True))

"""The vision tower of Qwen2-VL (arXiv 2409.12191): LayerNorm, an mlp with quick GELU, 2-D rotary, whole frames.

Grids never appear here: patches bring their place and frame as arrays, so one compiled program serves images of every
size.
"""

from __future__ import annotations

import jax
from flax import nnx

from rave_jax.attention import block_diagonal_codes
from rave_jax.attention.rotation import Rotation
from rave_jax.batch import Patches
from rave_jax.families.qwen2_vl.config import VisionConfig
from rave_jax.kernels.attention import MaskCodes
from rave_jax.models.config import ModelOptions
from rave_jax.models.layers import LayerNorm, Linear
from rave_jax.models.rope import patch_rotation
from rave_jax.models.stack import LayerRun, equal_runs
from rave_jax.models.tower import FrameBlock, Merger, check_patches, normalised
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float

NORM_EPS = 1e-6
"""Added to the variance in every LayerNorm."""


class Tower(nnx.Module):
    """Patches of a row to visual tokens of the decoder's width."""

    def __init__(self, config: VisionConfig, options: ModelOptions, *, key: jax.Array):
        dtype, D = options.params, config.hidden_size
        patch_key, merger_key, blocks_key = jax.random.split(key, 3)
        self.patch = Linear((D,), (config.patch_width,), ("embed", "patch"), bias=False, dtype=dtype, key=patch_key)
        keys = jax.random.split(blocks_key, config.depth)
        self.layer_runs = nnx.List(
            LayerRun(*run, lambda k: FrameBlock(config, "quick_gelu", NORM_EPS, options, k), keys)
            for run in equal_runs(config.depth, options.scan_layers)
        )
        norm = LayerNorm(D, eps=NORM_EPS, dtype=dtype)
        self.merger = Merger(norm, D, config.out_size, config.merge_unit, dtype=dtype, key=merger_key)
        self.config = config
        self.remat = options.tower_remat
        self.compute = options.compute

    def __call__(self, patches: Patches) -> Float[Array, "B M O"]:
        """Visual tokens, M = P / merge_unit of them, in the order of the merge units of these patches [B,P, ...].

        Raises:
            ValueError: P is not a whole number of merge units, or C is not what the patch projection reads.
        """
        check_patches(patches, self.config)
        rotation = patch_rotation(patches.place, self.config.head_dim, self.config.rope_theta)
        shared = rotation, block_diagonal_codes(patches.frame)
        x = shard(self.patch(normalised(patches.pixels, self.config, self.compute)), "batch", "length", None)

        def body(block: FrameBlock, x: Array, _: None, at: tuple[Rotation, MaskCodes]) -> tuple[Array, None]:
            return block(x, *at), None

        for run in self.layer_runs:
            x, _ = run.scan(body, x, None, shared, self.remat)
        return self.merger(x)

"""SigLIP (arXiv 2303.15343) on tiles, pixel shuffle, and a linear.

    x = patches W^T + b + position
    each block: x + attention(norm(x)), then x + mlp(norm(x))
    visual token = W [norm(x) of the patches of a merge unit side by side]

A tile's patches have the embeddings of their rows and columns. transformers finds these by fractions of the tile, which
float32 puts one too low for some numbers of patches a side, depending on the machine; for those of the released models,
27 and 32, all are right.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention import block_diagonal_codes
from rave_jax.batch import Patches
from rave_jax.families.shared.tiles import tile_places
from rave_jax.families.smolvlm.config import VisionConfig
from rave_jax.kernels.attention import MaskCodes
from rave_jax.models.config import ModelOptions
from rave_jax.models.initial import normal
from rave_jax.models.layers import LayerNorm, Linear
from rave_jax.models.stack import LayerRun, equal_runs
from rave_jax.models.tower import by_tile, check_patches, normalised
from rave_jax.models.vit import VitBlock
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float


class Tower(nnx.Module):
    """Tiles of a row to visual tokens of the decoder's width."""

    def __init__(self, config: VisionConfig, options: ModelOptions, *, key: jax.Array):
        dtype, D = options.params, config.hidden_size
        keys = jax.random.split(key, 4)
        self.patch = Linear((D,), (config.patch_width,), ("embed", "patch"), bias=True, dtype=dtype, key=keys[0])
        self.position = nnx.Param(normal(keys[1], (config.places, D), 0.02, dtype), axes=(None, "embed"))
        blocks = jax.random.split(keys[2], config.depth)
        self.layer_runs = nnx.List(
            LayerRun(*run, lambda k: VitBlock(config, options, k), blocks)
            for run in equal_runs(config.depth, options.scan_layers)
        )
        self.post_norm = LayerNorm(D, eps=config.layer_norm_eps, dtype=dtype)
        shape = (config.out_size,), (D * config.merge_unit,)
        self.projector = Linear(*shape, ("embed", "mlp"), bias=False, dtype=dtype, key=keys[3])
        self.config = config
        self.remat = options.tower_remat
        self.compute = options.compute

    def __call__(self, patches: Patches) -> Float[Array, "B M O"]:
        """Visual tokens, M = P / merge_unit of them, in the order of the merge units of these patches [B,P, ...].

        Raises:
            ValueError: the patches are not whole tiles, or C is not what the patch projection reads.
        """
        config = self.config
        check_patches(patches, config)
        x = self.patch(by_tile(normalised(patches.pixels, config, self.compute), config.window_patches))
        row, col = tile_places(config.side, config.merge_size).T
        x = x + self.position[...][row * config.side + col].astype(x.dtype)
        x = shard(x, "batch", "length", None)
        codes = block_diagonal_codes(jnp.ones(x.shape[:2], jnp.int32))

        def body(block: VitBlock, x: Array, _: None, codes: MaskCodes) -> tuple[Array, None]:
            return block(x, codes), None

        for run in self.layer_runs:
            x, _ = run.scan(body, x, None, codes, self.remat)
        return self.projector(self.post_norm(x).reshape(len(patches.pixels), -1, self.projector.in_shape[0]))

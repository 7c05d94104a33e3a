"""InternViT and the projector behind it (arXiv 2312.14238, 2504.10479), tile by tile.

    x = [class token, patches W^T + b] + position
    each block: x + s1 * attention(norm(x)), then x + s2 * mlp(norm(x)), s1 and s2 learned
    visual token = W2 gelu(W1 norm([the 2 x 2 patches of a merge unit side by side]))

Attention goes over the patches of a tile and its class token, which is no visual token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention import block_diagonal_codes
from rave_jax.batch import Patches
from rave_jax.families.internvl.config import VisionConfig
from rave_jax.families.shared.tiles import tile_places
from rave_jax.kernels import attention as attention_kernels
from rave_jax.kernels.attention import Implementation, MaskCodes
from rave_jax.models import lora
from rave_jax.models.config import ModelOptions
from rave_jax.models.initial import normal
from rave_jax.models.layers import ACTIVATIONS, LayerNorm, Linear, Mlp, RmsNorm
from rave_jax.models.stack import LayerRun, equal_runs
from rave_jax.models.tower import by_tile, check_patches, normalised
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float

QK_NORM_EPS, PROJECTOR_NORM_EPS = 1e-6, 1e-5
NORMS = {"layer_norm": LayerNorm, "rms_norm": RmsNorm}


class VisionAttention(nnx.Module):
    """Projections of attention, with an RMSNorm over all heads of queries and keys where the config says so."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, key: jax.Array):
        D, H = config.hidden_size, config.num_heads
        keys, bias = jax.random.split(key, 4), config.qkv_bias
        shape, axes = ((H, D // H), (D,)), ("heads", "head_dim", "embed")
        self.query = Linear(*shape, axes, bias=bias, dtype=dtype, key=keys[0])
        self.key = Linear(*shape, axes, bias=bias, dtype=dtype, key=keys[1])
        self.value = Linear(*shape, axes, bias=bias, dtype=dtype, key=keys[2])
        axes = ("embed", "heads", "head_dim")
        self.output = Linear((D,), (H, D // H), axes, bias=True, dtype=dtype, key=keys[3])
        norms = [RmsNorm(D, eps=QK_NORM_EPS, dtype=dtype) if config.qk_norm else None for _ in range(2)]
        self.query_norm: RmsNorm | None = nnx.data(norms[0])
        self.key_norm: RmsNorm | None = nnx.data(norms[1])

    def __call__(
        self, x: Float[Array, "B P D"], codes: MaskCodes, implementation: Implementation
    ) -> Float[Array, "B P D"]:
        """The same shape as x."""
        q, k = _normed(self.query(x), self.query_norm), _normed(self.key(x), self.key_norm)
        q, k, v = (shard(one, "batch", "length", "heads", None) for one in (q, k, self.value(x)))
        out, _ = attention_kernels.attention(q, k, v, codes, scale=q.shape[-1] ** -0.5, implementation=implementation)
        return self.output(out)


def _normed(x: Float[Array, "B P H h"], norm: RmsNorm | None) -> Float[Array, "B P H h"]:
    return x if norm is None else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class VisionBlock(nnx.Module):
    """x + s1 * attention(norm(x)), then x + s2 * mlp(norm(x))."""

    def __init__(self, config: VisionConfig, options: ModelOptions, key: jax.Array):
        dtype, D, norm = options.params, config.hidden_size, NORMS[config.norm]
        keys = jax.random.split(key, 3)
        self.attention = VisionAttention(config, dtype=dtype, key=keys[0])
        self.mlp = Mlp(D, config.mlp_size, config.activation, dtype=dtype, key=keys[1])
        self.attention_norm = norm(D, eps=config.norm_eps, dtype=dtype)
        self.mlp_norm = norm(D, eps=config.norm_eps, dtype=dtype)
        self.attention_scale = nnx.Param(jnp.full((D,), config.layer_scale, dtype), axes=(None,))
        self.mlp_scale = nnx.Param(jnp.full((D,), config.layer_scale, dtype), axes=(None,))
        self.implementation = options.attention
        lora.attach(self, "vision.", options.lora, dtype, keys[2])

    def __call__(self, x: Float[Array, "B P D"], codes: MaskCodes) -> Float[Array, "B P D"]:
        """The same shape as x."""
        update = self.attention(self.attention_norm(x), codes, self.implementation)
        x = shard(x + self.attention_scale[...].astype(x.dtype) * update, "batch", "length", None)
        update = self.mlp(self.mlp_norm(x))
        return shard(x + self.mlp_scale[...].astype(x.dtype) * update, "batch", "length", None)


class Projector(nnx.Module):
    """Norm over the joined patches of a merge unit, and two linears."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, key: jax.Array):
        joined, out = config.hidden_size * config.merge_unit, config.out_size
        keys = jax.random.split(key)
        self.norm = LayerNorm(joined, eps=PROJECTOR_NORM_EPS, dtype=dtype)
        self.first = Linear((out,), (joined,), ("mlp", "embed"), bias=True, dtype=dtype, key=keys[0])
        self.second = Linear((out,), (out,), ("embed", "mlp"), bias=True, dtype=dtype, key=keys[1])
        self.activation = config.projector_activation

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B M O"]:
        """Visual tokens."""
        x = self.norm(x.reshape(x.shape[0], -1, self.first.in_shape[0]))
        return self.second(ACTIVATIONS[self.activation](self.first(x)))


class Tower(nnx.Module):
    """Tiles of a row to visual tokens of the decoder's width."""

    def __init__(self, config: VisionConfig, options: ModelOptions, *, key: jax.Array):
        dtype, D = options.params, config.hidden_size
        keys = jax.random.split(key, 5)
        self.patch = Linear((D,), (config.patch_width,), ("embed", "patch"), bias=True, dtype=dtype, key=keys[0])
        self.class_token = nnx.Param(normal(keys[1], (D,), 0.02, dtype), axes=(None,))
        places = normal(keys[2], (config.side**2 + 1, D), 0.02, dtype) if config.positions else None
        self.position: nnx.Param | None = nnx.data(None if places is None else nnx.Param(places, axes=(None, "embed")))
        blocks = jax.random.split(keys[3], config.depth)
        self.layer_runs = nnx.List(
            LayerRun(*run, lambda k: VisionBlock(config, options, k), blocks)
            for run in equal_runs(config.depth, options.scan_layers)
        )
        last = LayerNorm(D, eps=config.norm_eps, dtype=dtype) if config.last_norm else None
        self.norm: LayerNorm | None = nnx.data(last)
        self.projector = Projector(config, dtype=dtype, key=keys[4])
        self.config = config
        self.remat = options.tower_remat
        self.compute = options.compute

    def __call__(self, patches: Patches) -> Float[Array, "B M O"]:
        """Visual tokens, M = P / merge_unit of them, in the order of the merge units of these patches [B,P, ...].

        Raises:
            ValueError: the patches are not whole tiles, or C is not what the patch projection reads.
        """
        check_patches(patches, self.config)
        x = self.embedded(by_tile(normalised(patches.pixels, self.config, self.compute), self.config.window_patches))
        x = shard(x, "batch", "length", None)
        codes = block_diagonal_codes(jnp.ones(x.shape[:2], jnp.int32))

        def body(block: VisionBlock, x: Array, _: None, codes: MaskCodes) -> tuple[Array, None]:
            return block(x, codes), None

        for run in self.layer_runs:
            x, _ = run.scan(body, x, None, codes, self.remat)
        x = (x if self.norm is None else self.norm(x))[:, 1:]
        return self.projector(x).reshape(len(patches.pixels), -1, self.config.out_size)

    def embedded(self, tiles: Float[Array, "N S C"]) -> Float[Array, "N P D"]:
        """What enters the first block: the class token, then the patches, all with their places."""
        patches = self.patch(tiles)
        first = jnp.broadcast_to(self.class_token[...].astype(patches.dtype), (len(tiles), 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1)
        if self.position is None:
            return x
        row, col = tile_places(self.config.side, self.config.merge_size).T
        number = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.asarray(row * self.config.side + col + 1)])
        return x + self.position[...][number].astype(x.dtype)

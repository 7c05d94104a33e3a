"""Plain vision transformers with a two-layer projector behind them (`families/shared/vit.py` says which).

    x = patches W^T + position;  x = norm(x) for CLIP;  each block: x + attention(norm(x)), then x + mlp(norm(x))
    visual token = W2 gelu(W1 [x after the blocks `feature_layers`, side by side])

Attention goes over the patches of one picture. Blocks behind the last of `feature_layers`, and the norm behind all
blocks, have their parameters, since checkpoints have them, but nothing is computed with them.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention import block_diagonal_codes
from rave_jax.batch import Patches
from rave_jax.families.shared.vit import VitConfig
from rave_jax.kernels import attention as attention_kernels
from rave_jax.kernels.attention import Implementation, MaskCodes
from rave_jax.models import lora
from rave_jax.models.config import ModelOptions
from rave_jax.models.initial import normal
from rave_jax.models.layers import LayerNorm, Linear, Mlp
from rave_jax.models.parameters import mark_unused
from rave_jax.models.stack import LayerRun
from rave_jax.models.tower import check_patches, mixed_units, normalised
from rave_jax.parallel import residual
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float


class VitAttention(nnx.Module):
    """Projections of attention among the patches of a picture, all with a bias."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, key: jax.Array):
        h = width // num_heads
        keys = jax.random.split(key, 4)
        into = ("heads", "head_dim", "embed")
        self.query = Linear((num_heads, h), (width,), into, bias=True, dtype=dtype, key=keys[0])
        self.key = Linear((num_heads, h), (width,), into, bias=True, dtype=dtype, key=keys[1])
        self.value = Linear((num_heads, h), (width,), into, bias=True, dtype=dtype, key=keys[2])
        out = ("embed", "heads", "head_dim")
        self.output = Linear((width,), (num_heads, h), out, bias=True, dtype=dtype, key=keys[3])

    def __call__(
        self, x: Float[Array, "B P D"], codes: MaskCodes, implementation: Implementation
    ) -> Float[Array, "B P D"]:
        """The same shape as x."""
        x = residual.gathered(x)
        q, k, v = (shard(one(x), "batch", "length", "heads", None) for one in (self.query, self.key, self.value))
        out, _ = attention_kernels.attention(q, k, v, codes, scale=q.shape[-1] ** -0.5, implementation=implementation)
        return residual.scattered(self.output(out))


class VitBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VitConfig, options: ModelOptions, key: jax.Array):
        dtype, D, eps = options.params, config.hidden_size, config.layer_norm_eps
        keys = jax.random.split(key, 3)
        self.attention = VitAttention(D, config.num_heads, dtype=dtype, key=keys[0])
        self.mlp = Mlp(D, config.mlp_size, config.activation, dtype=dtype, key=keys[1])
        self.attention_norm = LayerNorm(D, eps=eps, dtype=dtype)
        self.mlp_norm = LayerNorm(D, eps=eps, dtype=dtype)
        self.implementation = options.attention
        lora.attach(self, "vision.", options.lora, dtype, keys[2])

    def __call__(self, x: Float[Array, "B P D"], codes: MaskCodes) -> Float[Array, "B P D"]:
        """The same shape as x."""
        x = residual.placed(x + self.attention(self.attention_norm(x), codes, self.implementation))
        return residual.placed(x + self.mlp(self.mlp_norm(x)))


class Projector(nnx.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, width: int, out_size: int, *, bias: bool, dtype: jnp.dtype, key: jax.Array):
        keys = jax.random.split(key)
        self.first = Linear((out_size,), (width,), ("mlp", "embed"), bias=bias, dtype=dtype, key=keys[0])
        self.second = Linear((out_size,), (out_size,), ("embed", "mlp"), bias=bias, dtype=dtype, key=keys[1])

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P O"]:
        """Visual tokens."""
        return self.second(jax.nn.gelu(self.first(residual.gathered(x)), approximate=False))


class VitTower(nnx.Module):
    """Patches of a row to visual tokens."""

    def __init__(self, config: VitConfig, options: ModelOptions, *, key: jax.Array):
        dtype, D, eps = options.params, config.hidden_size, config.layer_norm_eps
        keys = jax.random.split(key, 5)
        bias = not config.class_token
        self.patch = Linear((D,), (config.patch_width,), ("embed", "patch"), bias=bias, dtype=dtype, key=keys[0])
        self.position = nnx.Param(normal(keys[1], (config.places, D), 0.02, dtype), axes=(None, "embed"))
        self.class_token: nnx.Param | None = nnx.data(
            nnx.Param(normal(keys[2], (D,), D**-0.5, dtype), axes=(None,)) if config.class_token else None
        )
        self.pre_norm: LayerNorm | None = nnx.data(LayerNorm(D, eps=eps, dtype=dtype) if config.class_token else None)
        blocks = jax.random.split(keys[3], config.depth)
        self.layer_runs = nnx.List(
            LayerRun(start, stop, lambda k: VitBlock(config, options, k), blocks)
            for start, stop in block_runs(config.depth, config.feature_layers, options.scan_layers)
        )
        self.post_norm = LayerNorm(D, eps=eps, dtype=dtype)
        self.read = max(config.feature_layers)
        for unused in (self.post_norm, *(run for run in self.layer_runs if run.start >= self.read)):
            mark_unused(unused)
        joined = D * len(config.feature_layers)
        self.projector = Projector(joined, config.out_size, bias=config.projector_bias, dtype=dtype, key=keys[4])
        self.config = config
        self.remat = options.tower_remat
        self.compute = options.compute

    def __call__(self, patches: Patches) -> Float[Array, "B M O"]:
        """Visual tokens of these patches [B,P, ...].

        Raises:
            ValueError: C is not what the patch projection reads.
        """
        return mixed_units(self.units(patches), patches)

    def units(self, patches: Patches) -> Float[Array, "B P O"]:
        """What the projector makes of each patch."""
        check_patches(patches, self.config)
        layers, codes = self.config.feature_layers, block_diagonal_codes(patches.frame)
        x = residual.placed(self.embedded(patches))
        taken = {0: x}
        for run in self.layer_runs:
            if run.start >= self.read:
                break

            def body(block: VitBlock, x: Array, _: None, codes: MaskCodes) -> tuple[Array, None]:
                return block(x, codes), None

            x, _ = run.scan(body, x, None, codes, self.remat)
            taken[run.stop] = x
        return self.projector(jnp.concatenate([taken[n] for n in layers], axis=-1))

    def embedded(self, patches: Patches) -> Float[Array, "B P D"]:
        """What enters the first block."""
        x = self.patch(normalised(patches.pixels, self.config, self.compute))
        row, col = patches.place[..., 0], patches.place[..., 1]
        number = row * self.config.side + col + self.config.class_token
        if self.class_token is not None and self.pre_norm is not None:
            first = row < 0
            x = jnp.where(first[..., None], self.class_token[...].astype(x.dtype), x)
            number = jnp.where(first, 0, number)
        x = x + self.position[...][number].astype(x.dtype)
        return x if self.pre_norm is None else self.pre_norm(x)


def block_runs(depth: int, taken: tuple[int, ...], join: bool = True) -> list[tuple[int, int]]:
    """(start, stop) of runs of blocks, cut where hidden states are taken; without `join`, each block is a run."""
    cuts = sorted({0, depth, *taken}) if join else range(depth + 1)
    return list(itertools.pairwise(cuts))

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
from rave_jax.models.forward import ImageFeatures
from rave_jax.models.initial import normal
from rave_jax.models.layers import LayerNorm, Linear, Mlp
from rave_jax.models.parameters import mark_unused
from rave_jax.models.stack import LayerRun
from rave_jax.models.tower import check_patches, mixed_units, normalised
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Bool, Float, Int


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
        q, k, v = (shard(one(x), "batch", "length", "heads", None) for one in (self.query, self.key, self.value))
        out, _ = attention_kernels.attention(q, k, v, codes, scale=q.shape[-1] ** -0.5, implementation=implementation)
        return self.output(out)


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
        x = shard(x + self.attention(self.attention_norm(x), codes, self.implementation), "batch", "length", None)
        return shard(x + self.mlp(self.mlp_norm(x)), "batch", "length", None)

    def class_looks(
        self, x: Float[Array, "B P D"], frame: Int[Array, "B P"], first: Bool[Array, "B P"]
    ) -> Float[Array, "B P"]:
        """The attention that the class token of each picture gives its patches, summed over heads, float32; 0 of class
        tokens and padding.

        Args:
            x: what enters the block.
            frame: the picture of each patch, from 1; 0 is padding.
            first: is it a class token?
        """
        x, most = self.attention_norm(x), x.shape[1] + 1
        q, k = self.attention.query(x), self.attention.key(x)

        def of_row(q: Array, k: Array, frame: Array, first: Array) -> Array:
            place = jax.ops.segment_max(jnp.where(first, jnp.arange(len(frame)), -1), frame, most)[frame]
            score = jnp.einsum("PHh,PHh->PH", q[place], k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            weight = jnp.exp(score - jax.ops.segment_max(score, frame, most)[frame])
            share = weight / jax.ops.segment_sum(weight, frame, most)[frame]
            return jnp.where(first | (frame == 0), 0.0, jnp.sum(share, axis=-1))

        return jax.vmap(of_row)(q, k, frame, first)


class Projector(nnx.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, width: int, out_size: int, *, bias: bool, dtype: jnp.dtype, key: jax.Array):
        keys = jax.random.split(key)
        self.first = Linear((out_size,), (width,), ("mlp", "embed"), bias=bias, dtype=dtype, key=keys[0])
        self.second = Linear((out_size,), (out_size,), ("embed", "mlp"), bias=bias, dtype=dtype, key=keys[1])

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P O"]:
        """Visual tokens."""
        return self.second(jax.nn.gelu(self.first(x), approximate=False))


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
        # Whose blocks' class tokens are read: the first, and the last but one.
        self.looking = (0, config.depth - 2) if options.reads_class_token and config.class_looks else ()
        cuts = (*config.feature_layers, *self.looking)
        self.layer_runs = nnx.List(
            LayerRun(start, stop, lambda k: VitBlock(config, options, k), blocks)
            for start, stop in block_runs(config.depth, cuts, options.scan_layers)
        )
        self.post_norm = LayerNorm(D, eps=eps, dtype=dtype)
        self.read = max(cuts)
        for unused in (self.post_norm, *(run for run in self.layer_runs if run.start >= self.read)):
            mark_unused(unused)
        joined = D * len(config.feature_layers)
        self.projector = Projector(joined, config.out_size, bias=config.projector_bias, dtype=dtype, key=keys[4])
        self.config = config
        self.remat = options.tower_remat
        self.compute = options.compute

    def __call__(self, patches: Patches) -> Float[Array, "B M O"] | ImageFeatures:
        """Visual tokens of these patches [B,P, ...].

        Raises:
            ValueError: C is not what the patch projection reads.
        """
        taken = self.states(patches)
        tokens = mixed_units(self.projected(taken), patches)
        return ImageFeatures(tokens, looks=mixed_units(self.looks(taken, patches), patches)) if self.looking else tokens

    def units(self, patches: Patches) -> Float[Array, "B P O"]:
        """What the projector makes of each patch."""
        return self.projected(self.states(patches))

    def projected(self, taken: dict[int, Float[Array, "B P D"]]) -> Float[Array, "B P O"]:
        """The same, from the states."""
        return self.projector(jnp.concatenate([taken[n] for n in self.config.feature_layers], axis=-1))

    def looks(self, taken: dict[int, Float[Array, "B P D"]], patches: Patches) -> Float[Array, "B P 2"]:
        """The attention that each picture's class token gives its patches in two blocks."""
        found = []
        for n in self.looking:
            run = next(run for run in self.layer_runs if run.start == n)
            block: VitBlock = jax.tree.map(lambda stacked: stacked[0], run.layers)
            found.append(block.class_looks(taken[n], patches.frame, patches.place[..., 0] < 0))
        return jnp.stack(found, axis=-1)

    def states(self, patches: Patches) -> dict[int, Float[Array, "B P D"]]:
        """Hidden states, by the number of blocks before them, at the ends of all runs that are read."""
        check_patches(patches, self.config)
        codes = block_diagonal_codes(patches.frame)
        x = shard(self.embedded(patches), "batch", "length", None)
        taken = {0: x}
        for run in self.layer_runs:
            if run.start >= self.read:
                break

            def body(block: VitBlock, x: Array, _: None, codes: MaskCodes) -> tuple[Array, None]:
                return block(x, codes), None

            x, _ = run.scan(body, x, None, codes, self.remat)
            taken[run.stop] = x
        return taken

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

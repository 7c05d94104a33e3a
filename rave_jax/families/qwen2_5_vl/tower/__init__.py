"""The vision tower of Qwen2.5-VL (arXiv 2502.13923): patches in window order, RMSNorm, SwiGLU, 2-D rotary.

Most blocks attend inside windows of 112 pixels, a few over the whole frame. Grids never appear here: patches bring
their place, window and frame as arrays, so one compiled program serves images of every size.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention import block_diagonal_codes
from rave_jax.attention.rotation import Rotation
from rave_jax.batch import Patches
from rave_jax.families.qwen2_5_vl.config import VisionConfig
from rave_jax.families.qwen2_5_vl.tower.windows import chunk_size, padded_size, window_attention, window_codes
from rave_jax.kernels.attention import Implementation, MaskCodes
from rave_jax.models import lora
from rave_jax.models.config import ModelOptions
from rave_jax.models.layers import Linear, RmsNorm, SwiGlu
from rave_jax.models.rope import patch_rotation
from rave_jax.models.stack import LayerRun
from rave_jax.models.tower import JointAttention, Merger, check_patches, normalised
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float


class WindowAttention(JointAttention):
    """Attention inside windows (with `chunk`) or frames."""

    def inside(
        self,
        x: Float[Array, "B P D"],
        rotation: Rotation,
        codes: MaskCodes,
        chunk: int | None,
        implementation: Implementation,
    ) -> Float[Array, "B P D"]:
        """The same shape as x."""
        if chunk is None:
            return self(x, rotation, codes, implementation)
        return self.output(window_attention(*self.heads(x, rotation), codes, chunk, implementation))


class VisionBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig, options: ModelOptions, key: jax.Array):
        dtype, D = options.params, config.hidden_size
        keys = jax.random.split(key, 3)
        self.attention = WindowAttention(D, config.num_heads, dtype=dtype, key=keys[0])
        self.mlp = SwiGlu(D, config.mlp_size, bias=True, dtype=dtype, key=keys[1])
        self.attention_norm = RmsNorm(D, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp_norm = RmsNorm(D, eps=config.rms_norm_eps, dtype=dtype)
        self.implementation = options.attention
        lora.attach(self, "vision.", options.lora, dtype, keys[2])

    def __call__(
        self, x: Float[Array, "B P D"], rotation: Rotation, codes: MaskCodes, chunk: int | None
    ) -> Float[Array, "B P D"]:
        """The same shape as x."""
        x = x + self.attention.inside(self.attention_norm(x), rotation, codes, chunk, self.implementation)
        x = shard(x, "batch", "length", None)
        return shard(x + self.mlp(self.mlp_norm(x)), "batch", "length", None)


class Tower(nnx.Module):
    """Patches of a row to visual tokens of the decoder's width."""

    def __init__(self, config: VisionConfig, options: ModelOptions, *, key: jax.Array):
        dtype = options.params
        patch_key, merger_key, blocks_key = jax.random.split(key, 3)
        width = (config.hidden_size,), (config.patch_width,)
        self.patch = Linear(*width, ("embed", "patch"), bias=False, dtype=dtype, key=patch_key)
        keys = jax.random.split(blocks_key, config.depth)
        runs = block_runs(config.depth, config.full_attention_blocks, options.scan_layers)
        self.layer_runs = nnx.List(
            LayerRun(start, stop, lambda k: VisionBlock(config, options, k), keys) for start, stop, _ in runs
        )
        eps, unit = config.rms_norm_eps, config.merge_unit
        norm = RmsNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.merger = Merger(norm, config.hidden_size, config.out_size, unit, dtype=dtype, key=merger_key)
        self.full = tuple(full for *_, full in runs)
        self.config = config
        self.remat = options.tower_remat
        self.compute = options.compute

    def __call__(self, patches: Patches) -> Float[Array, "B M O"]:
        """Visual tokens, M = P / merge_unit of them, in the order of the merge units of these patches [B,P, ...].

        Raises:
            ValueError: P is not a whole number of merge units, or C is not what the patch projection reads.
        """
        config, P = self.config, patches.length
        check_patches(patches, config)
        extra = padded_size(P, config.window_patches) - P
        patches = Patches(*(jnp.pad(a, [(0, 0), (0, extra)] + [(0, 0)] * (a.ndim - 2)) for a in patches))
        chunk = chunk_size(P, config.window_patches)
        local, whole = window_codes(patches.window, chunk), block_diagonal_codes(patches.frame)
        rotation = patch_rotation(patches.place, config.head_dim, config.rope_theta)
        x = shard(self.patch(normalised(patches.pixels, config, self.compute)), "batch", "length", None)
        for run, full in zip(self.layer_runs, self.full, strict=True):
            codes, width = (whole, None) if full else (local, chunk)

            def body(block: VisionBlock, x: Array, _: None, at: tuple[Rotation, MaskCodes], width: int | None = width):
                return block(x, *at, width), None

            x, _ = run.scan(body, x, None, (rotation, codes), self.remat)
        return self.merger(x[:, :P])


def block_runs(depth: int, full: tuple[int, ...], join: bool = True) -> list[tuple[int, int, bool]]:
    """(start, stop, full attention?) of each run of equal blocks, in order; without `join`, of each block."""
    if not join:
        return [(n, n + 1, n in full) for n in range(depth)]
    runs = []
    for is_full, blocks in itertools.groupby(range(depth), lambda n: n in full):
        numbers = list(blocks)
        runs.append((numbers[0], numbers[-1] + 1, is_full))
    return runs

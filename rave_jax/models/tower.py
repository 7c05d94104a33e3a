"""What the model asks of a vision tower, and what the towers of several families are made of.

Each family has its own tower (`families/*/tower`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rave_jax.attention.rotation import Rotation, rotate
from rave_jax.batch import Patches
from rave_jax.families.config import TowerConfig
from rave_jax.kernels import attention as attention_kernels
from rave_jax.kernels.attention import Implementation, MaskCodes
from rave_jax.models import lora
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import ImageFeatures
from rave_jax.models.layers import LayerNorm, Linear, Mlp
from rave_jax.models.stack import LayerRun
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float, UInt8


class Tower(Protocol):
    """An nnx module, made as `Tower(config, options, key=key)` from its family's `TowerConfig`.

    Attributes:
        layer_runs: its blocks, in runs of equal ones. Adapters on `vision.` paths stand in these.
    """

    @property
    def layer_runs(self) -> Sequence[LayerRun]: ...

    def __call__(self, patches: Patches) -> Float[Array, "B M O"] | ImageFeatures:
        """The visual tokens of rows of patches: P / merge_unit of them in the order of their patches, or where the
        config's `mixed` is above 0, the M that `patches.source` says (`mixed_units`). With them what is added in the
        decoder where the config's `deep_layers` is above 0, and what the class token looks at where a mechanism reads
        that and the config's `class_looks` says it can."""
        ...


def mixed_units(
    units: Float[Array, "B U O"], patches: Patches, learned: Float[Array, "O"] | None = None
) -> Float[Array, "B M O"]:
    """Visual tokens that are sums of units, as `patches.source` and `patches.weight` say; the units themselves where
    these say nothing.

    Args:
        units: what the connector makes of each merge unit.
        patches: of the same rows.
        learned: the row that source -1 means; None: no source is -1.
    """
    source, weight = patches.source, patches.weight
    if source.shape[-1] == 0:
        return units
    if learned is not None:
        row = jnp.broadcast_to(learned.astype(units.dtype), (len(units), 1, units.shape[-1]))
        source = jnp.where(source < 0, units.shape[1], source)
        units = jnp.concatenate([units, row], axis=1)

    def part(k: int) -> Float[Array, "B M O"]:
        taken = jnp.take_along_axis(units, source[..., k, None], axis=1, mode="clip")
        return taken * weight[..., k, None].astype(units.dtype)

    total = part(0)
    for k in range(1, source.shape[-1]):
        total = total + part(k)
    return shard(total, "batch", "length", None)


class JointAttention(nnx.Module):
    """One projection to q, k and v, rotated by the patch's place; attention among patches; projection back."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, key: jax.Array):
        h = width // num_heads
        keys = jax.random.split(key)
        axes = (None, "heads", "head_dim", "embed")
        self.qkv = Linear((3, num_heads, h), (width,), axes, bias=True, dtype=dtype, key=keys[0])
        axes = ("embed", "heads", "head_dim")
        self.output = Linear((width,), (num_heads, h), axes, bias=True, dtype=dtype, key=keys[1])

    def __call__(
        self, x: Float[Array, "B P D"], rotation: Rotation, codes: MaskCodes, implementation: Implementation
    ) -> Float[Array, "B P D"]:
        """The same shape as x."""
        q, k, v = self.heads(x, rotation)
        out, _ = attention_kernels.attention(q, k, v, codes, scale=q.shape[-1] ** -0.5, implementation=implementation)
        return self.output(out)

    def heads(
        self, x: Float[Array, "B P D"], rotation: Rotation
    ) -> tuple[Float[Array, "B P H h"], Float[Array, "B P H h"], Float[Array, "B P H h"]]:
        """Queries, keys and values; the first two rotated."""
        q, k, v = (shard(self.qkv.part(x, n), "batch", "length", "heads", None) for n in range(3))
        return rotate(q, rotation), rotate(k, rotation), v


class FrameBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with LayerNorm and one mlp.

    Args:
        config: sizes of the tower.
        activation: between the two linears of the mlp.
        eps: added to the variance in the norms.
        options: number types, adapters and the attention backend.
    """

    def __init__(self, config: TowerConfig, activation: str, eps: float, options: ModelOptions, key: jax.Array):
        dtype, D = options.params, config.hidden_size
        keys = jax.random.split(key, 3)
        self.attention = JointAttention(D, config.num_heads, dtype=dtype, key=keys[0])
        self.mlp = Mlp(D, config.mlp_size, activation, dtype=dtype, key=keys[1])
        self.attention_norm = LayerNorm(D, eps=eps, dtype=dtype)
        self.mlp_norm = LayerNorm(D, eps=eps, dtype=dtype)
        self.implementation = options.attention
        lora.attach(self, "vision.", options.lora, dtype, keys[2])

    def __call__(self, x: Float[Array, "B P D"], rotation: Rotation, codes: MaskCodes) -> Float[Array, "B P D"]:
        """The same shape as x."""
        x = x + self.attention(self.attention_norm(x), rotation, codes, self.implementation)
        x = shard(x, "batch", "length", None)
        return shard(x + self.mlp(self.mlp_norm(x)), "batch", "length", None)


class Merger(nnx.Module):
    """Norm, the merge unit's patches side by side, two linears with an exact GELU between.

    Args:
        norm: of each patch.
        width: of the tower.
        out_size: of a visual token.
        unit: patches in a merge unit; they stand together in the patch order.
    """

    def __init__(self, norm: nnx.Module, width: int, out_size: int, unit: int, *, dtype: jnp.dtype, key: jax.Array):
        joined = width * unit
        keys = jax.random.split(key)
        self.norm = norm
        self.first = Linear((joined,), (joined,), ("mlp", "embed"), bias=True, dtype=dtype, key=keys[0])
        self.second = Linear((out_size,), (joined,), ("embed", "mlp"), bias=True, dtype=dtype, key=keys[1])

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B M O"]:
        """M = P / unit visual tokens of width O = out_size."""
        x = self.norm(x)
        x = x.reshape(x.shape[0], -1, self.first.in_shape[0])
        return self.second(jax.nn.gelu(self.first(x), approximate=False))


def check_patches(patches: Patches, config: TowerConfig) -> None:
    """Refuse rows that are not of the size that the tower reads.

    Raises:
        ValueError: P is not a whole number of merge units, or C is not what the patch projection reads.
    """
    P, C = patches.pixels.shape[1:]
    if P % config.merge_unit or config.patch_width != C:
        expected = f"a multiple of {config.merge_unit} patches of {config.patch_width}"
        raise ValueError(f"patches are {P} of {C} numbers, expected {expected}")


def normalised(pixels: UInt8[Array, "B P C"], config: TowerConfig, dtype: jnp.dtype) -> Float[Array, "B P C"]:
    """(value / 255 - mean) / std of each channel, computed in float32. A patch has its channels one after another."""
    mean, std = np.asarray(config.pixel_mean), np.asarray(config.pixel_std)
    repeats = config.patch_width // config.in_channels
    scale = np.repeat(1 / (255 * std), repeats).astype(np.float32)
    shift = np.repeat(mean / std, repeats).astype(np.float32)
    return (pixels.astype(jnp.float32) * scale - shift).astype(dtype)


def by_tile(x: Float[Array, "B P C"], size: int) -> Float[Array, "N S C"]:
    """Rows of whole tiles of S = `size` patches as a batch of tiles, those of a row one after another.

    A tower that reads tiles of one size computes on them, padding included: attention costs what the tiles do, whatever
    the row's length.

    Raises:
        ValueError: the rows are not whole tiles.
    """
    B, P, C = x.shape
    if P % size:
        raise ValueError(f"patches are {P} in a row, expected a multiple of {size}: whole tiles")
    return x.reshape(B * (P // size), size, C)

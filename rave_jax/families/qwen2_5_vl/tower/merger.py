"""From the tower to the decoder: neighbouring patches become one visual token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.models.layers import Linear, RmsNorm
from rave_jax.typing import Array, Float


class Merger(nnx.Module):
    """Norm, the merge unit's patches side by side, two linears with an exact GELU between.

    Args:
        width: of the tower.
        out_size: of a visual token.
        unit: patches in a merge unit; they stand together in the patch order.
    """

    def __init__(self, width: int, out_size: int, unit: int, *, eps: float, dtype: jnp.dtype, key: jax.Array):
        joined = width * unit
        keys = jax.random.split(key)
        self.norm = RmsNorm(width, eps=eps, dtype=dtype)
        self.first = Linear((joined,), (joined,), ("mlp", "embed"), bias=True, dtype=dtype, key=keys[0])
        self.second = Linear((out_size,), (joined,), ("embed", "mlp"), bias=True, dtype=dtype, key=keys[1])

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B M O"]:
        """M = P / unit visual tokens of width O = out_size."""
        x = self.norm(x)
        x = x.reshape(x.shape[0], -1, self.first.in_shape[0])
        return self.second(jax.nn.gelu(self.first(x), approximate=False))

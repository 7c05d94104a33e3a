"""An extra mlp in every decoder layer, beside its own: a control that spends parameters elsewhere than on attention.

    x + mlp(n) + up silu(down n)        n = norm(x)

The bottleneck adapter of arXiv 1902.00751 in its parallel form (arXiv 2110.04366, table 1), with silu as in the layer's
mlp and without biases. `up` is zero at the start, so that the model starts as exactly the one without.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.models.config import ExtraMlp
from rave_jax.models.initial import normal
from rave_jax.models.layers import contract
from rave_jax.typing import Array, Float


class ParallelMlp(nnx.Module):
    """down [W,D], up [D,W]; 2 W D parameters.

    Args:
        hidden_size: D.
        width: W.
        dtype: of the parameters.
        key: of `down`.
    """

    def __init__(self, hidden_size: int, width: int, *, dtype: jnp.dtype, key: jax.Array):
        self.down = nnx.Param(normal(key, (width, hidden_size), hidden_size**-0.5, dtype), axes=("rank", "embed"))
        self.up = nnx.Param(jnp.zeros((hidden_size, width), dtype), axes=("embed", "rank"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What is added to the output of the layer's mlp, for the same x."""
        return contract(jax.nn.silu(contract(x, self.down[...])), self.up[...])


def made(config: ExtraMlp | None, hidden_size: int, dtype: jnp.dtype, key: jax.Array) -> ParallelMlp | None:
    """The extra mlp of one layer, or None.

    Args:
        config: its size, or None.
        hidden_size: of the layer.
        dtype: of its parameters.
        key: the layer's; folded, so that other parts do not depend on whether there is one.
    """
    if config is None:
        return None
    return ParallelMlp(
        hidden_size, config.width, dtype=dtype, key=jax.random.fold_in(key, zlib.crc32(b"decoder.extra_mlp"))
    )

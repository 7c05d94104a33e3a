"""The residual stream of a layer: its tokens are split over the mesh axis `tensor` too.

Matmuls that `tensor` splits take all tokens that the device's row has, and their last one gives a part of a sum. In
place of that sum on every device, the parts are reduce-scattered: each device adds, normalises and keeps its share of
the tokens, and gathers the others before the next matmul. That sends what the sum does, norms are computed once and
not by every device, and what is kept of each layer is divided by `tensor`.

Where the axis does not divide the tokens, as it never does the single token of a decoding step, they stay whole.

Source: sequence parallelism of Megatron-LM (arXiv 2205.05198), section 4.2.2.
"""

from __future__ import annotations

import jax

from rave_jax.config import require
from rave_jax.parallel.sharding import current_mesh, partition_spec, shard
from rave_jax.typing import Array, Float

AXIS = "tensor"


def placed(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The stream in its place: tokens over `residual` of the sharding rules."""
    return shard(x, "batch", "residual", None)


def gathered(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The stream as the matmuls of a block take it; its gradient, a sum over `tensor`, is scattered."""
    return _gathered(x) if splits(x) else x


def scattered(y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What the last matmul of a block gives, as the stream lies; its gradient is gathered."""
    return _scattered(y) if splits(y) else y


def splits(x: Float[Array, "B T D"]) -> bool:
    """Does the current mesh split the tokens of the stream finer than those of a row?"""
    mesh = current_mesh()
    if mesh is None or mesh.shape[AXIS] == 1:
        return False
    stream, row = (partition_spec((name,), x.shape[1:2], mesh) for name in ("residual", "length"))
    return stream != row


def check_tokens(tokens: int, context: int, tensor: int, field: str) -> None:
    """Refuse rows of which not every device can have a share.

    Raises:
        ConfigError: names the field that says how many tokens a row has.
    """
    ways = context * tensor
    axes = f"mesh.tensor {tensor}" if context == 1 else f"mesh.context {context} times mesh.tensor {tensor}"
    expected = f"a multiple of {ways}: a share of a row for each of {axes}"
    require(tensor == 1 or tokens % ways == 0, field, tokens, expected)


@jax.custom_vjp
def _gathered(x: Array) -> Array:
    return shard(x, "batch", "length", None)


@jax.custom_vjp
def _scattered(x: Array) -> Array:
    return shard(x, "batch", "residual", None)


_gathered.defvjp(lambda x: (_gathered(x), None), lambda _, gradient: (_scattered(gradient),))
_scattered.defvjp(lambda x: (_scattered(x), None), lambda _, gradient: (_gathered(gradient),))

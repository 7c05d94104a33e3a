"""The residual stream of a layer, whose tokens may be split over the mesh axis `tensor` too (sequence parallelism).

Matmuls that `tensor` splits take all tokens of the device's rows, and the last one of attention and of the mlp gives a
part of a sum. In place of the whole sum on every device, the parts are reduce-scattered: each device adds, normalises
and keeps its share of the tokens, and gathers the others before the next matmul. What is kept of each layer is then
divided by `tensor`, and norms are computed once and not by every device. All that is sent is about what the sums send.

Where the axis does not divide the tokens, as it never does the single token of a decoding step, they stay whole.

Source: Megatron-LM's sequence parallelism (arXiv 2205.05198), section 4.2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from rave_jax.config import require
from rave_jax.parallel.sharding import current_mesh, partition_spec, shard
from rave_jax.typing import Array, Float

AXIS = "tensor"


@dataclass(frozen=True)
class Stream:
    """How a layer's residual stream lies.

    Args:
        split: are its tokens split over `tensor`?
    """

    split: bool = False

    @property
    def tokens(self) -> str:
        """The logical axis of its tokens."""
        return "residual" if self.split else "length"

    def placed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The stream in its place."""
        return shard(x, "batch", self.tokens, None)

    def gathered(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The stream as matmuls take it; its gradient, a sum over `tensor`, is scattered."""
        return _gathered(x) if self.splits(x) else x

    def scattered(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the last matmul of attention or of the mlp gives, as the stream lies; its gradient is gathered."""
        return _scattered(y) if self.splits(y) else y

    def splits(self, x: Float[Array, "B T D"]) -> bool:
        """Does the current mesh split these tokens finer than a row's?"""
        mesh = current_mesh()
        if mesh is None or not self.split:
            return False
        stream, row = (partition_spec((name,), x.shape[1:2], mesh) for name in (self.tokens, "length"))
        return stream != row


WHOLE = Stream()
"""Tokens are split as those of rows."""


def check_tokens(tokens: int, context: int, tensor: int, field: str) -> None:
    """Refuse rows of which not every device can have a share.

    Raises:
        ConfigError: names the field that says how many tokens a row has.
    """
    ways = context * tensor
    axes = f"mesh.tensor {tensor}" if context == 1 else f"mesh.context {context} times mesh.tensor {tensor}"
    expected = f"a multiple of {ways}: model.sequence_parallel gives a share of a row to each of {axes}"
    require(tensor == 1 or tokens % ways == 0, field, tokens, expected)


@jax.custom_vjp
def _gathered(x: Array) -> Array:
    return shard(x, "batch", "length", None)


@jax.custom_vjp
def _scattered(x: Array) -> Array:
    return shard(x, "batch", "residual", None)


_gathered.defvjp(lambda x: (_gathered(x), None), lambda _, gradient: (_scattered(gradient),))
_scattered.defvjp(lambda x: (_scattered(x), None), lambda _, gradient: (_gathered(gradient),))

"""Where the keys of regions stand in the order of the mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.batch import TokenInfo
from rave_jax.kernels.attention import MaskCodes
from rave_jax.typing import Array, Int


def bounds(order: Int[Array, "B S"], region: Int[Array, "B S"], R: int) -> tuple[Int[Array, "B R"], Int[Array, "B R"]]:
    """Least and greatest order of the keys of each region; one without keys has last < first."""

    def reduce(how: Any, x: Array) -> Array:
        return jax.vmap(lambda row, at: how(row, at, num_segments=R + 1))(x, region)[:, 1:]

    return reduce(jax.ops.segment_min, order), reduce(jax.ops.segment_max, order)


def start_of_document(info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> Int[Array, "B T"]:
    """The order at which each query's document begins. What moves tokens in the order moves them towards it, and not
    all of them."""
    most = info_k.document.shape[1] + 1
    begins = jax.vmap(lambda at, number: jax.ops.segment_max(at, number, num_segments=most))
    start = begins(jnp.where(info_k.document > 0, codes.order - info_k.offset, 0), info_k.document)
    return jnp.take_along_axis(start, info_q.document, axis=1, mode="clip")

"""After the softmax: rows whose weights a mechanism changes key by key.

The weights of such rows are made from the log-sum-exp, changed, and multiplied with the values again, in blocks of
queries. A block in which no row is changed costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from rave_jax.attention.base import Mechanism, overrides
from rave_jax.attention.scores import pick
from rave_jax.attention.statistics import BLOCK
from rave_jax.batch import TokenInfo
from rave_jax.typing import Array, Float, Int


def reweighing(mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    """Those that change weights of rows."""
    return [mechanism for mechanism in mechanisms if overrides(mechanism, "reweigh")]


def reweighed(
    mechanisms: Sequence[Mechanism],
    rows: Float[Array, "B N H S"],
    queries: Int[Array, "B N"],
    info_q: TokenInfo,
    info_k: TokenInfo,
) -> Float[Array, "B N H S"]:
    """Rows of some queries, by index, after every mechanism in order."""
    mine = jax.tree.map(lambda code: pick(code, queries), info_q)
    for mechanism in mechanisms:
        changed = mechanism.reweighs(mine)[..., None, None]
        rows = jnp.where(changed, mechanism.reweigh(rows, mine, info_k), rows)
    return rows


def with_reweighed(
    mechanisms: Sequence[Mechanism],
    rows_of: Callable[[Int[Array, "B M"]], Float[Array, "B M H S"]],
    out: Float[Array, "B T H h"],
    values: Float[Array, "B S K h"],
    info_q: TokenInfo,
) -> Float[Array, "B T H h"]:
    """Outputs in which those of changed rows are of their changed weights.

    Args:
        mechanisms: those that change weights of rows.
        rows_of: changed rows of some queries, by index.
        out: as the kernel gave it.
        values: of all keys.
        info_q: of the queries.
    """
    B, T, H, h = out.shape
    K, M = values.shape[2], min(BLOCK, T)
    changed = jnp.stack([mechanism.reweighs(info_q) for mechanism in mechanisms]).any(axis=0)

    def block(number: Int[Array, ""]) -> Float[Array, "B M H h"]:
        queries = jnp.minimum(number * M + jnp.arange(M, dtype=jnp.int32), T - 1)
        queries = jnp.broadcast_to(queries, (B, M))

        def made() -> Float[Array, "B M H h"]:
            rows = rows_of(queries).reshape(B, M, K, H // K, -1)
            return jnp.einsum("BMKGS,BSKh->BMKGh", rows, values.astype(jnp.float32)).reshape(B, M, H, h)

        return jax.lax.cond(jnp.any(pick(changed, queries)), made, lambda: jnp.zeros((B, M, H, h), jnp.float32))

    blocks = jax.lax.map(block, jnp.arange(-(-T // M), dtype=jnp.int32))
    new = jnp.moveaxis(blocks, 0, 1).reshape(B, -1, H, h)[:, :T]
    return jnp.where(changed[..., None, None], new.astype(out.dtype), out)

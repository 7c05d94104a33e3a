"""Rows and columns of the attention map as sums, without the map: spans, entropy, column sums and rises.

With P the attention that a layer applies, after every mechanism, and d = offset of query i - offset of key j:

    span_i    = sum_j P_ij min(d, cap)               over keys with d >= 0
    entropy_i = - sum_j P_ij log P_ij
    column_j  = sum_i w_i P_ij                       over queries with low <= d <= high
    rise_j    = sum_i w_i max(P_ij - P_(i-1)j, 0)    where row i - 1 is of the token before it in the row

for each head. Rows are made in blocks from the log-sum-exp that the kernel gives, so memory is O(T + S) and not O(T S);
a block in which no query is read costs nothing. Gradients are not for these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.batch import TokenInfo
from rave_jax.typing import Array, Float, Int

BLOCK = 64
"""Queries whose rows are made at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WantedStatistics:
    """What is asked of the map. Queries of weight 0 are not read."""

    weights: Float[Array, "B T"]
    """w: of each query in column sums and rises. Spans and entropy are of each query with a weight, as it is."""
    caps: tuple[int | None, ...] = field(default=(), metadata={"static": True})
    """A span is given for each: the most that a distance counts; None: no limit."""
    bands: tuple[tuple[int, int], ...] = field(default=(), metadata={"static": True})
    """Column sums are given for each: the least and the largest distance."""
    entropy: bool = field(default=False, metadata={"static": True})
    """Is the entropy of rows wanted?"""
    rises: bool = field(default=False, metadata={"static": True})
    """Are rises wanted? It makes two rows of each query."""


class Statistics(NamedTuple):
    """What was asked, float32; N counts caps or bands. 0 for queries that are not read; None where not asked for.

    Fields:
        spans: in tokens.
        entropy: in nats.
        columns, rises: of each key.
    """

    spans: Float[Array, "*L B N T H"] | None
    entropy: Float[Array, "*L B T H"] | None
    columns: Float[Array, "*L B N S H"] | None
    rises: Float[Array, "*L B S H"] | None


class _OfKeys(NamedTuple):
    """Sums that grow block by block."""

    columns: Float[Array, "B N S H"] | None
    rises: Float[Array, "B S H"] | None


class _OfQueries(NamedTuple):
    """What a block gives of its queries."""

    spans: Float[Array, "B N M H"] | None
    entropy: Float[Array, "B M H"] | None


def statistics_of(
    rows_of: Callable[[Int[Array, "B M"]], Float[Array, "B M H S"]],
    info_q: TokenInfo,
    info_k: TokenInfo,
    wanted: WantedStatistics,
    heads: int,
) -> Statistics:
    """The statistics of one layer.

    Args:
        rows_of: rows of the map of some queries, by index.
        info_q, info_k: of queries and keys.
        wanted: what is asked for.
        heads: H.
    """
    B, T = info_q.document.shape
    S = info_k.document.shape[1]
    M = min(BLOCK, T)
    blocks = -(-T // M)
    # Queries beyond the last are of weight 0.
    weights = jnp.pad(wanted.weights.astype(jnp.float32), ((0, 0), (0, blocks * M - T)))

    def zeros(*shape: int) -> Float[Array, "..."]:
        return jnp.zeros(shape, jnp.float32)

    nothing = _OfQueries(
        zeros(B, len(wanted.caps), M, heads) if wanted.caps else None,
        zeros(B, M, heads) if wanted.entropy else None,
    )
    empty = _OfKeys(
        zeros(B, len(wanted.bands), S, heads) if wanted.bands else None,
        zeros(B, S, heads) if wanted.rises else None,
    )

    def read(sums: _OfKeys, start: Int[Array, ""], mine: Float[Array, "B M"]) -> tuple[_OfKeys, _OfQueries]:
        first = start - 1 if wanted.rises else start
        queries = jnp.clip(first + jnp.arange(M + wanted.rises, dtype=jnp.int32), 0, T - 1)
        queries = jnp.broadcast_to(queries, (B, len(queries)))
        rows = rows_of(queries)
        own = rows[:, int(wanted.rises) :]
        at = jnp.take_along_axis(info_q.offset, queries[:, int(wanted.rises) :], axis=1)
        away = at[:, :, None] - info_k.offset[:, None]
        found = _OfQueries(
            _spans(own, away, mine, wanted.caps) if wanted.caps else None,
            _entropy(own, mine) if wanted.entropy else None,
        )
        if sums.columns is not None:
            banded = [mine[:, :, None] * ((away >= low) & (away <= high)) for low, high in wanted.bands]
            added = [jnp.einsum("BMS,BMHS->BSH", band, own) for band in banded]
            sums = sums._replace(columns=sums.columns + jnp.stack(added, axis=1))
        if sums.rises is not None:
            more = jnp.maximum(own - rows[:, :-1], 0.0)
            # The first token of a row has none before it.
            more = jnp.where((start + jnp.arange(M) > 0)[:, None, None], more, own)
            sums = sums._replace(rises=sums.rises + jnp.einsum("BM,BMHS->BSH", mine, more))
        return sums, found

    def block(sums: _OfKeys, number: Int[Array, ""]) -> tuple[_OfKeys, _OfQueries]:
        start = number * M
        mine = jax.lax.dynamic_slice_in_dim(weights, start, M, axis=1)
        return jax.lax.cond(
            jnp.any(mine != 0), lambda sums: read(sums, start, mine), lambda sums: (sums, nothing), sums
        )

    sums, found = jax.lax.scan(block, empty, jnp.arange(blocks, dtype=jnp.int32))
    spans = None if found.spans is None else jnp.moveaxis(found.spans, 0, 2)
    entropy = None if found.entropy is None else jnp.moveaxis(found.entropy, 0, 1)
    return Statistics(
        None if spans is None else spans.reshape(B, -1, blocks * M, heads)[:, :, :T],
        None if entropy is None else entropy.reshape(B, blocks * M, heads)[:, :T],
        *sums,
    )


def _spans(
    rows: Float[Array, "B M H S"], away: Int[Array, "B M S"], weights: Float[Array, "B M"], caps: tuple[int | None, ...]
) -> Float[Array, "B N M H"]:
    far = [jnp.maximum(away if cap is None else jnp.minimum(away, cap), 0).astype(jnp.float32) for cap in caps]
    found = jnp.stack([jnp.einsum("BMHS,BMS->BMH", rows, one) for one in far], axis=1)
    return jnp.where((weights != 0)[:, None, :, None], found, 0.0)


def _entropy(rows: Float[Array, "B M H S"], weights: Float[Array, "B M"]) -> Float[Array, "B M H"]:
    found = -jnp.sum(jnp.where(rows > 0, rows * jnp.log(jnp.where(rows > 0, rows, 1.0)), 0.0), axis=-1)
    return jnp.where((weights != 0)[..., None], found, 0.0)

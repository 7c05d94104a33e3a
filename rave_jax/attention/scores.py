"""What the scores of a layer are made of: the features, every mechanism's terms, and who may see whom."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import Features, Keys, Mechanism, OtherQuery, Views
from rave_jax.attention.checks import DOES, name_of
from rave_jax.attention.functions import spread
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.attention import MaskCodes, Terms
from rave_jax.kernels.attention.base import group_heads, of_key_group, tile_allow, tile_scores, ungroup_heads
from rave_jax.typing import Array, Bool, Float, Int


class Scores(NamedTuple):
    """Operands of the scores of all pairs; q and k are as wide as head_dim, twice that under another query, and the
    channels together."""

    q: Float[Array, "B T H h"]
    k: Float[Array, "B S K h"]
    codes: MaskCodes
    terms: Terms
    scale: float
    views: Views | None = None
    """With queries as wide as q; None where all keys are met by q."""


def scores_of(
    x: Features,
    keys: Keys,
    codes: MaskCodes,
    info_q: TokenInfo,
    info_k: TokenInfo,
    mechanisms: Sequence[Mechanism],
) -> Scores:
    """The scores with what every mechanism adds to them; at most one gives a query, and one a term that reads <q, k>
    (`check_owners`)."""
    query, views, key_bias, row, channels, terms = None, None, None, None, [], []
    q, k, scale = x.q, keys.k, x.q.shape[-1] ** -0.5
    for mechanism, remembered in zip(mechanisms, keys.remembered, strict=True):
        added = mechanism.score(x, remembered, info_q, info_k)
        if added is None:
            continue
        if (query or views) is not None and (added.query or added.views) is not None:
            raise ConfigError(
                f"{name_of(mechanism)} {DOES['query']}, and so does another mechanism of its layer, but only one may: "
                "each has to say so in its class, OWNS = ('query',), and they need different layers"
            )
        terms += [spread(term, x.q.shape[2], x.k.shape[2]) for term in added.terms]
        if added.key_bias is not None:
            key_bias = added.key_bias if key_bias is None else key_bias + added.key_bias
        if added.channels is not None:
            channels.append(added.channels)
        if added.query is not None:
            query = added.query
            q, k = _doubled(q, k, query)
        if added.views is not None:
            views = added.views
        if added.scale is not None:
            row = added.scale if row is None else row * added.scale

    def finished(q: Array) -> Array:
        # What the kernel scales comes out of the scale as it was.
        q = q if row is None else (q.astype(jnp.float32) * row[..., None, None]).astype(q.dtype)
        return jnp.concatenate([q, *((columns.q / scale).astype(q.dtype) for columns in channels)], -1)

    if views is not None:
        views = views._replace(q=tuple(finished(q) for q in views.q))
    k = jnp.concatenate([k, *(columns.k.astype(k.dtype) for columns in channels)], -1)
    return Scores(finished(q), k, codes, Terms(tuple(terms), key_bias), scale, views)


def _doubled(q: Array, k: Array, other: OtherQuery) -> tuple[Array, Array]:
    """[q; other q] and [k; 0], or [0; k] for the keys that the other meets: one product picks, exactly."""
    there = other.keys[..., None, None]
    halves = jnp.where(there, 0, k), jnp.where(there, k, 0)
    return jnp.concatenate([q, other.q.astype(q.dtype)], -1), jnp.concatenate(halves, -1)


def by_view(scores: Scores) -> list[Scores]:
    """The scores of each view, with the keys of all others out of reach; of scores without views, themselves."""
    if scores.views is None:
        return [scores]
    groups, q, open_q = scores.views
    codes = [of_key_group(scores.codes._replace(open_q=one), groups, n) for n, one in enumerate(open_q)]
    return [scores._replace(q=q[n], codes=codes[n], views=None) for n in range(groups.count)]


def pick(x: Array, index: Int[Array, "B N"]) -> Array:
    """x [B,S,...] at `index`: [B,N,...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1, mode="clip")


def of_queries(scores: Scores, rows: Int[Array, "B N"]) -> tuple[Float[Array, "B N H S"], Bool[Array, "B N 1 S"]]:
    """Scores of chosen queries and all keys, and which of those they may see."""
    if scores.views is not None:
        of_views = [of_queries(each, rows) for each in by_view(scores)]
        number = scores.views.groups.of[:, None, None]
        return functools.reduce(
            lambda found, n: jax.tree.map(lambda x, y: jnp.where(number == n, y, x), found, of_views[n]),
            range(1, len(of_views)),
            of_views[0],
        )
    codes = map_queries(scores.codes, rows)
    terms = scores.terms.map_queries(lambda x: pick(x, rows))
    q = group_heads(pick(scores.q, rows), scores.k.shape[2])
    found = tile_scores(q, scores.k, terms, scores.scale)
    return ungroup_heads(found), tile_allow(codes)[:, 0, 0, :, None]


def of_keys(scores: Scores, key: Int[Array, "B T"]) -> tuple[Float[Array, "B T H"], Bool[Array, "B T 1"]]:
    """Scores of every query and one key of its own, and whether it may see that."""
    B, T, H, _ = scores.q.shape

    def alone(x: Array) -> Array:
        """Of queries [B,T,...]: every query as a row of its own, [B*T,1,...]."""
        return x.reshape(B * T, 1, *x.shape[2:])

    def met(x: Array) -> Array:
        """The same of keys [B,S,...]."""
        return alone(pick(x, key))

    lo, hi, order, open_q, open_k = scores.codes
    codes = MaskCodes(alone(lo), alone(hi), met(order), alone(open_q), met(open_k))
    # A head's numbers are the same in every row.
    terms = scores.terms.map_queries(alone).map_keys(met)
    k = met(scores.k)
    found = tile_scores(group_heads(alone(scores.q), k.shape[2]), k, terms, scores.scale)
    return found.reshape(B, T, H), tile_allow(codes).reshape(B, T, 1)


def map_queries(codes: MaskCodes, rows: Array) -> MaskCodes:
    """The codes of some queries, by index."""
    return codes._replace(lo=pick(codes.lo, rows), hi=pick(codes.hi, rows), open_q=pick(codes.open_q, rows))


def without_gradient[Tree](tree: Tree) -> Tree:
    """The same arrays, through which no gradient goes."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)

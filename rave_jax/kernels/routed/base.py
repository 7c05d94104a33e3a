"""What routed attention means: which regions a query may choose from, how it chooses, and what it then sees.

    candidate_ir = lo_i <= last_r < before_i                     first, last: least and greatest order of r's keys
    s_ir         = <x_i, d_r> + bias_ir / scale                 routing query and descriptor, float32
    bias_ir      = sum of the score terms' f at r's means        w and key features; dot = scale s; 0 unless asked
    chosen_ir    = candidate, and one of the k_i with the largest s_ir among the n_i candidates (ties: the lower r)
    k_i          = t_i + ceil(dense (n_i - t_i)),  t_i = min(top_k, n_i) or ceil(top_k n_i)
    open_ij      = key j has no region, or its region is no candidate of i, or is chosen

Attention is that of `kernels.attention` over the keys that the mask codes allow and that are open. A region that is no
candidate is left to the mask: what lies ahead is shut there, and the own frame of a visual query stays whole. The
choice has no gradient; a soft choice adds

    soft_bias          tau * log softmax_r(s_i) over the candidates, to every key of r
    straight_through   the same in the backward pass and nothing in the forward pass

and `spans` gives every region that a query reads a softmax of its own, weighted by the softmax over their scores:

    out_i = sum_r softmax_r(s_i) out_ir     r over the chosen, and over those no candidates that it sees with s = 0

out_ir is the attention to the keys of r alone. It needs all scores, and every key of the query in a region. A query
that is not routed has one softmax.

Source: Gaze Attention (arXiv 2605.13080) as its authors describe it: regions, TopK of <q, d>, no router parameters,
nothing evicted; one choice for each query head, as their published demo shows. Choices for a kv group sum the scores
of its heads. `dense` is their schedule, 1 at the start (all candidates) and 0 at its end.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.config import require
from rave_jax.kernels.attention.base import MaskCodes, group_heads, tile_bias
from rave_jax.kernels.attention.score import Term
from rave_jax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class RouteRule:
    """How a query chooses."""

    top_k: int | float = 0.25
    """Regions of a query: a whole number of 1 or more, or below 1 a fraction of its candidates, rounded up. 1.0, which
    may be meant as either, is refused."""
    share: Literal["head", "group"] = "head"
    """Who has a choice of its own: each query head, or each kv head with the query heads that read it."""
    choice: Literal["hard", "soft_bias", "straight_through", "spans"] = "hard"
    """Whether the scores of the regions get a gradient, and how."""
    tau: float = 1.0
    """Scale of the soft choices."""
    with_bias: bool = False
    """Is what score terms would add to a region's keys part of what it is ranked by?"""
    by: Literal["descriptor", "mass"] = "descriptor"
    """What regions are ranked by: the product with their descriptors, or the attention mass they would get (for
    study: it needs all scores)."""

    def __post_init__(self) -> None:
        whole = 1 <= self.top_k < 2**31 and self.top_k == int(self.top_k)
        good = 0 < self.top_k < 1 or (whole and not (isinstance(self.top_k, float) and self.top_k == 1))
        what = "a whole number of regions (1 for one; as many as there may be for all), or a fraction between 0 and 1"
        require(good, "top_k", self.top_k, what)
        require(0 < self.tau <= 1e30, "tau", self.tau, "a positive number, at most 1e30")

    @property
    def reads_scores(self) -> bool:
        """Does a choice need the scores of all keys?"""
        return self.by == "mass" or self.choice == "spans"

    def most(self, regions: int) -> int:
        """How many regions a query chooses of so many candidates, once the schedule has ended."""
        if self.top_k >= 1:
            return min(int(self.top_k), regions)
        # Rounded before it is rounded up: 0.07 * 100 must not become 8.
        return min(max(1, math.ceil(round(self.top_k * regions, 9))), regions)


def of_regions(parts: tuple[Term, ...], keys: Int[Array, "B S"], regions: int) -> tuple[Term, ...]:
    """Score terms of queries and regions, from those of queries and keys whose regions are `keys`: what belongs to a
    key becomes the mean of a region's keys, and a region is switched on where any of its keys is."""

    def sums(x: Array) -> Array:
        return jax.vmap(lambda row, at: jax.ops.segment_sum(row, at, regions + 1))(x, keys)[:, 1:]

    count = jnp.maximum(sums(jnp.ones(keys.shape)), 1.0)

    def of_region(x: Array) -> Array:
        if x.dtype == bool:
            return sums(x.astype(jnp.float32)) > 0
        return sums(x) / count.reshape(*count.shape, *[1] * (x.ndim - 2))

    return tuple(part.map_keys(of_region) for part in parts)


class Routes(NamedTuple):
    """What a choice is made from. Region n of `keys` is entry n - 1 of the others; a region without keys has
    last < first.

    Fields:
        query: routing queries x, float32.
        descriptor: of each region and kv head, float32.
        first, last: least and greatest order of the region's keys.
        before: a query's candidates end before this order; the least int32 for a query that is not routed.
        keys: region of each key, counted from 1; 0 has none.
        dense: where the schedule stands, 1 (all candidates) to 0 (top_k), traced; None where it has ended, and ranking
            may stop at top_k.
        bias: terms of queries and regions (`of_regions`) that the rule ranks by beside descriptors; none where it asks
            for nothing.
    """

    query: Float[Array, "B T H c"]
    descriptor: Float[Array, "B R K c"]
    first: Int[Array, "B R"]
    last: Int[Array, "B R"]
    before: Int[Array, "B T"]
    keys: Int[Array, "B S"]
    dense: Float[Array, ""] | None
    bias: tuple[Term, ...] = ()

    def queries(self) -> dict[str, Any]:
        """What belongs to each query, arrays [B,T,...]."""
        return {"query": self.query, "before": self.before, "bias": tuple(part.of_queries() for part in self.bias)}

    def with_queries(self, mine: dict[str, Any]) -> Routes:
        """The same of other queries."""
        bias = tuple(part.replace(**own) for part, own in zip(self.bias, mine["bias"], strict=True))
        return self._replace(query=mine["query"], before=mine["before"], bias=bias)


class Routing(NamedTuple):
    """What queries choose from, and how. `most_keys` is the most keys that a region may have, where that is known:
    kernels that skip regions get their shapes from it."""

    routes: Routes
    rule: RouteRule
    most_keys: int | None = None


class Choice(NamedTuple):
    """Of every query (N = G, or 1 where the group has one choice) and region: is it chosen, could it be, and what is
    added to the scores of its keys (None: nothing)?"""

    chosen: Bool[Array, "B K N T R"]
    candidate: Bool[Array, "B 1 1 T R"]
    bias: Float[Array, "B K N T R"] | None


def candidates(codes: MaskCodes, routes: Routes) -> Bool[Array, "B 1 1 T R"]:
    """Which regions each query may choose from."""
    first, last = routes.first[:, None], routes.last[:, None]
    found = (codes.lo[..., None] <= last) & (last < routes.before[..., None]) & (first <= last)
    return found[:, None, None]


def region_scores(routes: Routes, scale: float) -> Float[Array, "B K G T R"]:
    """What every query ranks every region by. Keys' scores are `scale` <q, k> and biases: here the biases are in the
    unit of <x, d>."""
    K = routes.descriptor.shape[2]
    found = _products(routes.query, routes.descriptor)
    return functools.reduce(lambda total, term: total + tile_bias(term, scale * found, K) / scale, routes.bias, found)


def _products(x: Float[Array, "B T H c"], y: Float[Array, "B R K c"]) -> Float[Array, "B K G T R"]:
    return jnp.einsum("BKGTc,BRKc->BKGTR", group_heads(x, y.shape[2]), y, precision=jax.lax.Precision.HIGHEST)


def region_masses(scores: Float[Array, "B K G T S"], routes: Routes) -> Float[Array, "B K G T R"]:
    """Log of the attention mass of every region, up to what all regions of a query share; -inf of a region without
    keys."""
    R = routes.descriptor.shape[1]

    def greatest(rows: Array, at: Array) -> Array:
        return jnp.moveaxis(jax.ops.segment_max(jnp.moveaxis(rows, -1, 0), at, R + 1)[1:], 0, -1)

    # Each region has a scale of its own: it may be far below that of keys which nobody here sees.
    top = jax.lax.stop_gradient(jax.vmap(greatest)(scores, routes.keys))
    anchor = jnp.where(jnp.isfinite(top), top, 0.0)
    of = (routes.keys[:, :, None] == jnp.arange(1, R + 1)).astype(jnp.float32)
    shifted = jnp.where(routes.keys[:, None, None, None] > 0, scores - of_keys(anchor, routes.keys, fill=0.0), -jnp.inf)
    mass = jnp.einsum("BKGTS,BSR->BKGTR", jnp.exp(shifted), of)
    return jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.0)) + anchor, -jnp.inf)


def budget(
    candidate: Bool[Array, "B 1 1 T R"], dense: Float[Array, ""] | None, rule: RouteRule
) -> Int[Array, "B 1 1 T"]:
    """How many regions each query chooses."""
    n = jnp.sum(candidate, axis=-1)
    target = jnp.array([rule.most(found) for found in range(candidate.shape[-1] + 1)], n.dtype)[n]
    if dense is None:
        return target
    return target + jnp.ceil(dense * (n - target)).astype(n.dtype)


def choose(
    scores: Float[Array, "B K G T R"],
    candidate: Bool[Array, "B 1 1 T R"],
    dense: Float[Array, ""] | None,
    rule: RouteRule,
) -> Choice:
    """Each query's choice. It goes by rank: as many as its budget says, whatever the ties."""
    if rule.share == "group":
        scores = jnp.sum(scores, axis=2, keepdims=True)
    scores = jnp.where(candidate, scores, -jnp.inf)
    count = budget(candidate, dense, rule)[..., None]
    # One number for each score: a compiler that makes them twice, for the sort and for the comparison, may round twice.
    fixed = jax.lax.optimization_barrier(jax.lax.stop_gradient(scores))
    if dense is None:
        ranked, _ = jax.lax.top_k(fixed, rule.most(fixed.shape[-1]))
    else:
        ranked = jnp.sort(fixed, axis=-1, descending=True)
    # No gather along the ranks: libtpu 0.0.50.1 dies when it compiles one for v6e.
    wanted = jnp.arange(ranked.shape[-1]) == jnp.maximum(count - 1, 0)
    least = jnp.max(jnp.where(wanted, ranked, -jnp.inf), axis=-1, keepdims=True)
    above = fixed > least
    equal = (fixed == least) & candidate
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    chosen = above | (equal & (jnp.cumsum(equal, axis=-1) <= room))
    if rule.choice in ("hard", "spans"):
        return Choice(chosen, candidate, None)
    # A query without candidates has no distribution, and what it would get must have no gradient either.
    some = jnp.any(candidate, axis=-1, keepdims=True)
    soft = rule.tau * jax.nn.log_softmax(jnp.where(some, scores, 0.0), axis=-1, where=candidate | ~some)
    soft = jnp.where(chosen, soft, 0.0)
    return Choice(chosen, candidate, soft if rule.choice == "soft_bias" else soft - jax.lax.stop_gradient(soft))


def span_bias(
    ranks: Float[Array, "B K G T R"], masses: Float[Array, "B K G T R"], choice: Choice
) -> Float[Array, "B K G T R"]:
    """What makes one softmax over all keys the weighted sum of those over each region.

    Args:
        ranks: the regions' scores.
        masses: log of the attention mass that the mask allows of each region; -inf of none.
        choice: a hard one.
    """
    read = (choice.chosen | ~choice.candidate) & (masses > -jnp.inf)
    some = jnp.any(read, axis=-1, keepdims=True)
    logits = jnp.where(choice.candidate, ranks, 0.0)
    share = jax.nn.log_softmax(jnp.where(read, logits, 0.0), axis=-1, where=read | ~some)
    return jnp.where(read, share - jnp.where(read, masses, 0.0), 0.0)


def of_keys(x: Array, keys: Int[Array, "B S"], fill: float | bool) -> Array:
    """x [B,K,N,T,R] at the region of every key [B,K,N,T,S]; `fill` for keys of none."""
    padded = jnp.pad(x, [(0, 0)] * 4 + [(1, 0)], constant_values=fill)
    return jax.vmap(lambda rows, at: rows[..., at])(padded, keys)


def open_keys(choice: Choice, keys: Int[Array, "B S"]) -> Bool[Array, "B K N T S"]:
    """Which keys the choice leaves open to each query."""
    return of_keys(choice.chosen | ~choice.candidate, keys, fill=True)

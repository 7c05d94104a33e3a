"""What attention to chosen regions means. R regions of m entries each; one query a row.

    dot_irj   = scale * <q_i, k_rj>
    score_irj = dot_irj + sum of bias_irj of all terms       as in `kernels.attention`
    open_irj  = chosen_ir and real_rj
    out_i     = sum_rj softmax_rj(score_irj over the open) v_rj,   lse_i = log sum_rj exp(score_irj)

Heads with nothing open give out = 0 and lse = -inf. Heads whose choice breaks the promise of `most` give NaN in both,
and so do all heads of a kv head that together chose more than their promises add up to: the backends read as many
regions as were promised, and a quietly wrong answer would be worse.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention import Term, Tile
from rave_jax.kernels.attention.score import function_of
from rave_jax.kernels.routed.host import HostRegions
from rave_jax.typing import Array, Bool, Float, Int, Int8


class Stack(NamedTuple):
    """Keys or values of several layers, of which one is meant: regions are read where they lie, and what was not chosen
    is neither copied out of the stack nor expanded.

    Fields:
        values: floats, or int8; in host memory perhaps, from where chosen regions are copied.
        scale: what int8 values are multiplied by; None of floats.
        layer: 0 to L - 1.
    """

    values: Float[Array, "L B K R m h"] | Int8[Array, "L B K R m h"] | HostRegions
    scale: Float[Array, "L B K R m"] | None
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """[B,K,R,m,h], of one layer."""
        return self.values.shape[1:]

    @property
    def on_device(self) -> Float[Array, "L B K R m h"] | Int8[Array, "L B K R m h"]:
        """The values of a stack that does not lie in host memory."""
        assert not isinstance(self.values, HostRegions)
        return self.values

    def whole(self) -> Float[Array, "B K R m h"]:
        """All of the layer, in float32."""
        of_host = isinstance(self.values, HostRegions)
        values = self.values.of_layer(self.layer) if of_host else self.values[self.layer]
        values = values.astype(jnp.float32)
        return values if self.scale is None else values * self.scale[self.layer].astype(jnp.float32)[..., None]

    def regions(
        self, index: Int[Array, "B K n"], count: Int[Array, "B K"], dtype: jnp.dtype
    ) -> Float[Array, "B K nm h"]:
        """The listed regions' entries, end to end, in `dtype`; any finite numbers behind the first `count` of them."""
        (B, K, n), m = index.shape, self.shape[3]

        def entries(x: Array) -> Array:
            # A layer is an index like a region's: no slice that the compiler would have to see through.
            of_head = jax.vmap(lambda mine, at: mine.at[self.layer, at].get(mode="promise_in_bounds"), (1, 0))
            return jax.vmap(of_head, (1, 0))(x, index).astype(dtype).reshape(B, K, n * m, *x.shape[5:])

        if isinstance(self.values, HostRegions):
            values = self.values.listed(self.layer, index, count).astype(dtype).reshape(B, K, n * m, -1)
        else:
            values = entries(self.values)
        return values if self.scale is None else values * entries(self.scale)[..., None]


class Operands(NamedTuple):
    """What every backend takes: arrays of `gather_attention` with the query heads beside their kv head."""

    q: Float[Array, "B K G h"]
    k: Stack
    v: Stack
    real: Bool[Array, "B R m"]
    chosen: Bool[Array, "B K N R"]
    terms: tuple[Term, ...]


def union(chosen: Bool[Array, "B K N R"]) -> Bool[Array, "B K R"]:
    """Regions that some head of the group chose: what is read."""
    return jnp.any(chosen, axis=2)


def listed(chosen: Bool[Array, "B K R"], length: int) -> tuple[Int[Array, "B K n"], Int[Array, "B K"]]:
    """(numbers of the chosen regions, rising; how many of them the list holds). What the list of this length has room
    for beyond them repeats the last one (0 where there is none), so that nothing else is ever read."""
    R = chosen.shape[-1]
    number = jnp.arange(R, dtype=jnp.int32)
    last = jnp.max(jnp.where(chosen, number, 0), axis=-1, keepdims=True)
    index = jnp.sort(jnp.where(chosen, number, R), axis=-1)[..., :length]
    index = jnp.pad(index, ((0, 0), (0, 0), (0, max(0, length - R))), constant_values=R)
    return jnp.minimum(index, last), jnp.minimum(jnp.sum(chosen, axis=-1, dtype=jnp.int32), length)


def taken(x: Array, index: Int[Array, "B K n"], *, flat: bool = False) -> Array:
    """The listed regions' entries of x [B,K,R,m,...]: [B,K,n*m,...]. Flat, a region is taken as one run of numbers: so
    a TPU lays out what has few channels, where a cache that is kept flat is not copied first."""
    (B, K, n), (R, m), rest = index.shape, x.shape[2:4], x.shape[4:]
    source = x.reshape(B, K, R, -1) if flat else x
    regions = jax.vmap(jax.vmap(lambda x, at: x.at[at].get(mode="promise_in_bounds")))(source, index)
    return regions.reshape(B, K, n * m, *rest)


def open_entries(operands: Operands, index: Int[Array, "B K n"], count: Int[Array, "B K"]) -> Bool[Array, "B K #G nm"]:
    """Which entries of the listed regions each head may see; `count` of the list are meant."""
    B, K, n = index.shape
    live = jnp.arange(n) < count[..., None]
    mine = jax.vmap(lambda rows, at: rows[at])(operands.real, index) & live[..., None]
    if operands.chosen.shape[2] == 1:
        return mine.reshape(B, K, 1, -1)
    heads = jnp.take_along_axis(operands.chosen, index[:, :, None], axis=3)
    return (mine[:, :, None] & heads[..., None]).reshape(B, K, heads.shape[2], -1)


def with_terms(
    dot: Float[Array, "B K G nm"], terms: tuple[Term, ...], index: Int[Array, "B K n"]
) -> Float[Array, "B K G nm"]:
    """Scores of the listed regions' entries: `dot`, which is scale * <q, k>, and what every term adds to it."""
    scores = dot
    for term in terms:
        scores = scores + bias_of(term, index, dot)
    return scores


def bias_of(term: Term, index: Int[Array, "B K n"], dot: Float[Array, "B K G nm"]) -> Float[Array, "B K G nm"]:
    """What a term adds to the scores of the listed regions' entries."""
    K = index.shape[1]
    tile = Tile(
        dot,
        pair_product(term, index),
        {name: by_kv_head(x, K)[..., None] for name, x in term.query.items()},
        {name: taken(x, index)[:, :, None] for name, x in term.key.items()},
        {name: x.reshape(1, K, -1, 1) for name, x in term.head.items()},
    )
    bias = function_of(term.function)(tile)
    if term.query_on is not None:
        bias = jnp.where(by_kv_head(term.query_on, K)[..., None], bias, 0.0)
    keys_on = switched_on(term, index)
    return bias if keys_on is None else jnp.where(keys_on, bias, 0.0)


def pair_product(term: Term, index: Int[Array, "B K n"]) -> Float[Array, "B K G nm"] | None:
    """<u, w> + OFFSET of the listed regions' entries; None of a term without."""
    if term.u is None or term.w is None:
        return None
    u = by_kv_head(term.u, index.shape[1])
    # As in training: rounded to bfloat16, u and w are too coarse for a bias.
    found = key_products(taken(term.w, index, flat=True), u, precision=jax.lax.Precision.HIGHEST)
    return found + function_of(term.function).OFFSET


def switched_on(term: Term, index: Int[Array, "B K n"]) -> Bool[Array, "B K 1 nm"] | None:
    """Which of the listed regions' entries a term is switched on for; None is all."""
    if term.key_on is None:
        return None
    (B, K, _), (R, m) = index.shape, term.key_on.shape[1:]
    return taken(jnp.broadcast_to(term.key_on[:, None], (B, K, R, m)), index)[:, :, None]


def by_kv_head(x: Float[Array, "B H *rest"], K: int) -> Float[Array, "B K G *rest"]:
    """Query heads beside their kv head."""
    return x.reshape(x.shape[0], K, -1, *x.shape[2:])


def key_products(
    k: Float[Array, "B K S h"], q: Float[Array, "B K G h"], precision: jax.lax.Precision | None = None
) -> Float[Array, "B K G S"]:
    """<q, k> of every head and key, float32. The keys stand on the left of the product: on the right of one with few
    rows a CPU copies them first."""
    found = jnp.einsum("BKSh,BKGh->BKSG", k, q, precision=precision, preferred_element_type=jnp.float32)
    return jnp.swapaxes(found, 2, 3)


def softmax_over(
    scores: Float[Array, "B K G S"], open_: Bool[Array, "B K #G S"], v: Float[Array, "B K S c"]
) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"], Float[Array, "B K G"]]:
    """(sum of weights times values, greatest score, sum of weights), float32; weights are exp(score - greatest), and
    -inf is the greatest of nothing."""
    scores = jnp.where(open_, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top)[..., None])
    part = jnp.einsum("BKGS,BKSc->BKGc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return part, top, jnp.sum(weights, axis=-1)


def finished(
    part: Float[Array, "B K G c"], top: Float[Array, "B K G"], total: Float[Array, "B K G"]
) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Output and log-sum-exp of what `softmax_over` gives."""
    seen = total != 0  # NaN counts as seen, and stays
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(safe), -jnp.inf)
    return jnp.where(seen[..., None], part / safe[..., None], 0.0), lse


def combined(
    a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]
) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"], Float[Array, "B K G"]]:
    """`softmax_over` of the keys of both."""
    top = jnp.maximum(a[1], b[1])
    anchor = jnp.where(top == -jnp.inf, 0.0, top)
    shrink = [jnp.exp(x[1] - anchor) for x in (a, b)]
    part = a[0] * shrink[0][..., None] + b[0] * shrink[1][..., None]
    return part, top, a[2] * shrink[0] + b[2] * shrink[1]


def nothing(B: int, K: int, G: int, c: int) -> tuple[Array, Array, Array]:
    """`softmax_over` of no keys."""
    number = jnp.zeros((B, K, G), jnp.float32)
    return jnp.zeros((B, K, G, c), jnp.float32), number - jnp.inf, number

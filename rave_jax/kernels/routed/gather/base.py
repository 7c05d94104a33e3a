"""What attention to chosen regions means. R regions of m slots each; one query a row.

    score_irj = scale * <q_i, k_rj> + bias_irj
    bias_irj  = f(<u_i, w_rj> + row_i + key_rj)   where head i is switched on, else 0
    open_irj  = chosen_ir and real_rj
    out_i     = sum_rj softmax_rj(score_irj over the open) v_rj,   lse_i = log sum_rj exp(score_irj)

Heads with nothing open give out = 0 and lse = -inf. Heads whose choice breaks the promise of `most` give NaN in both:
the backends read as many regions as were promised, and a quietly wrong answer would be worse.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rave_jax.kernels.pair_bias import PairForm
from rave_jax.typing import Array, Bool, Float, Int


class RegionBias(NamedTuple):
    """Operands of the pair bias (`pair_bias.PairBias`) of one query and keys in regions, float32. Every real key is
    switched on."""

    u: Float[Array, "B H r"]
    w: Float[Array, "B K R m r"]
    row: Float[Array, "B H"]
    key: Float[Array, "B K R m"]
    gain: Float[Array, "H"]
    query_on: Bool[Array, "B H"]


class Operands(NamedTuple):
    """What every backend takes: arrays of `gather_attention` with the query heads beside their kv head."""

    q: Float[Array, "B K G h"]
    k: Float[Array, "B K R m h"]
    v: Float[Array, "B K R m c"]
    real: Bool[Array, "B R m"]
    chosen: Bool[Array, "B K N R"]
    bias: RegionBias | None


def union(chosen: Bool[Array, "B K N R"]) -> Bool[Array, "B K R"]:
    """Regions that some head of the group chose: what is read."""
    return jnp.any(chosen, axis=2)


def listed(chosen: Bool[Array, "B K R"], most: int) -> tuple[Int[Array, "B K most"], Int[Array, "B K"]]:
    """(numbers of the chosen regions, rising; how many). What the list has room for beyond them repeats the last one
    (0 where there is none), so that nothing else is ever read."""
    R = chosen.shape[-1]
    count = jnp.sum(chosen, axis=-1, dtype=jnp.int32)
    rank = jnp.where(chosen, jnp.cumsum(chosen, axis=-1) - 1, most)
    place = jnp.minimum(jnp.arange(most), jnp.maximum(count[..., None] - 1, 0))
    # The region of rank n, as a sum with one term: exact, and no scatter.
    at = rank[..., None, :] == place[..., :, None]
    return jnp.sum(jnp.where(at, jnp.arange(R, dtype=jnp.int32), 0), axis=-1, dtype=jnp.int32), count


def tile_scores(
    q: Float[Array, "B K G h"],
    k: Float[Array, "B K S h"],
    bias: RegionBias | None,
    form: PairForm,
    scale: float,
) -> Float[Array, "B K S G"]:
    """Float32 scores of every query head and key, before the mask; w and key of the bias are of these keys, [B,K,S,r]
    and [B,K,S]."""
    scores = scale * jnp.einsum("BKSh,BKGh->BKSG", k, q, preferred_element_type=jnp.float32)
    if bias is None:
        return scores
    B, K, G, _ = q.shape

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:-1], K, G) if x.ndim == 1 else x.reshape(B, K, G, *x.shape[2:])

    z = jnp.einsum("BKSr,BKGr->BKSG", bias.w, heads(bias.u), preferred_element_type=jnp.float32)
    z = z + heads(bias.row)[:, :, None] + bias.key[..., None]
    added = form(z, heads(bias.gain)[None, :, None])
    return scores + jnp.where(heads(bias.query_on)[:, :, None], added, 0.0)


def softmax_over(
    scores: Float[Array, "B K S G"], open_: Bool[Array, "B K S #G"], v: Float[Array, "B K S c"]
) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"], Float[Array, "B K G"]]:
    """(sum of weights times values, greatest score, sum of weights), float32; weights are exp(score - greatest), and
    -inf is the greatest of nothing."""
    scores = jnp.where(open_, scores, -jnp.inf)
    top = jnp.max(scores, axis=2)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top)[:, :, None])
    part = jnp.einsum("BKSG,BKSc->BKGc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return part, top, jnp.sum(weights, axis=2)


def finished(
    part: Float[Array, "B K G c"], top: Float[Array, "B K G"], total: Float[Array, "B K G"]
) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Output and log-sum-exp of what `softmax_over` gives."""
    seen = total > 0
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

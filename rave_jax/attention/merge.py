"""After the kernel: weights that are changed within a row, from log-sum-exps, without the map.

With out_n and L_n of the keys of group n alone, attention whose weights are multiplied by exp(b_n) within each
group and normalised again is

    out = sum_n w_n out_n / sum_n w_n,    w_n = exp(L_n + b_n)

and multiplying the weight of one key j by g, with a = exp(s_j - L_n) its share of its group, is

    out_n' = (out_n + (g - 1) a v_j) / (1 + (g - 1) a),    L_n' = L_n + log(1 + (g - 1) a)

Both are identities of the softmax; b = 0 and g = 1 are plain attention. All of it is float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import Features, KeyFactor, Mechanism, Parts, overrides
from rave_jax.attention.queries import at_key
from rave_jax.attention.scores import Scores, of_keys, pick
from rave_jax.batch import TokenInfo
from rave_jax.kernels.attention import KeyGroups
from rave_jax.kernels.routed import Routing
from rave_jax.typing import Array, Float, Int


class Partition(NamedTuple):
    """The common refinement of all partitions that mechanisms asked for. With counts a, b, c its key group is numbered
    (n_a * b + n_b) * c + n_c; who asked for nothing counts 1."""

    key_groups: KeyGroups | None
    counts: tuple[int, ...]


def partition_of(
    mechanisms: Sequence[Mechanism], x: Features, remembered: tuple[Any, ...], info_k: TokenInfo, losses: bool
) -> Partition:
    """What is asked of the keys; `key_groups` are None where nobody asks."""
    found = [
        m.key_groups(x, kept, info_k) if overrides(m, "merge") or (losses and overrides(m, "losses")) else None
        for m, kept in zip(mechanisms, remembered, strict=True)
    ]
    counts = tuple(1 if one is None else one.count for one in found)
    asked = [one for one in found if one is not None]
    if not asked:
        return Partition(None, counts)
    of = functools.reduce(lambda number, one: number * one.count + one.of, asked[1:], asked[0].of)
    return Partition(KeyGroups(of, math.prod(counts)), counts)


def parts_of(lse: Float[Array, "B T N H"], partition: Partition) -> tuple[Parts, ...]:
    """Each mechanism's own parts, from log-sum-exps of the refined key groups."""
    B, T, _, H = lse.shape
    split = lse.reshape(B, T, *partition.counts, H)
    axes = range(2, split.ndim - 1)
    whole = log_sum_exp(lse, (2,))
    return tuple(Parts(log_sum_exp(split, tuple(a for a in axes if a != own)), whole) for own in axes)


def log_weights(
    mechanisms: Sequence[Mechanism],
    x: Features,
    parts: tuple[Parts, ...],
    partition: Partition,
    info_q: TokenInfo,
    info_k: TokenInfo,
) -> Float[Array, "B T N H"] | None:
    """Logs of what the refined key groups' weights are multiplied by: the sum of what each `merge` says."""
    total = None
    for n, (mechanism, own) in enumerate(zip(mechanisms, parts, strict=True)):
        said = mechanism.merge(x, own, info_q, info_k)
        if said is not None:
            ones = [1] * len(partition.counts)
            ones[n] = partition.counts[n]
            said = said.reshape(*said.shape[:2], *ones, said.shape[-1])
            total = said if total is None else total + said
    if total is None:
        return None
    B, T, *_, H = total.shape
    return jnp.broadcast_to(total, (B, T, *partition.counts, H)).reshape(B, T, -1, H)


def merged(
    out: Float[Array, "B T N H c"], lse: Float[Array, "B T N H"]
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """One output from those of N key groups, in their type, and its log-sum-exp. Rows that see nothing
    stay 0 and -inf."""
    whole = log_sum_exp(lse, (2,))
    share = Parts(lse, whole).mass
    return jnp.sum(share[..., None] * out.astype(jnp.float32), axis=2).astype(out.dtype), whole


def with_factor(
    out: Float[Array, "B T N H c"],
    lse: Float[Array, "B T N H"],
    values: Float[Array, "B S K c"],
    scores: Scores,
    factor: KeyFactor,
    of: Int[Array, "B S"] | None,
    routing: Routing | None = None,
) -> tuple[Float[Array, "B T N H c"], Float[Array, "B T N H"]]:
    """Outputs and log-sum-exps of the key groups after one key of each query has its weight multiplied.

    Args:
        out, lse: of each key group alone.
        values: of all keys.
        scores: from which out and lse were made.
        factor: the keys, and the logs of what to multiply by.
        of: each key's key group, or None where there is one only.
        routing: how queries choose, or None where nothing routes: a key that was not chosen has no weight.
    """
    N, H = out.shape[2:4]
    score, seen = of_keys(scores, factor.key)
    if routing is not None:
        chosen, bias = at_key(scores, factor.key, routing)
        seen, score = seen & chosen, score if bias is None else score + bias
    inside = seen[:, :, None]
    if of is not None:
        inside = inside & (pick(of, factor.key)[..., None] == jnp.arange(N))[..., None]
    share = jnp.exp(jnp.where(inside, score[:, :, None] - jnp.where(inside, lse, 0.0), -jnp.inf))
    # What is above 1 is rounding. It is taken off as a constant: the gradients of score and lse have to cancel there,
    # and a compiler that computes a comparison twice may decide it once for each of them.
    share = share - jax.lax.stop_gradient(jnp.maximum(share - 1, 0.0))
    added = share * jnp.expm1(factor.log)
    value = jnp.repeat(pick(values, factor.key), H // values.shape[2], axis=2)[:, :, None].astype(jnp.float32)
    changed = (out.astype(jnp.float32) + added[..., None] * value) / (1 + added)[..., None]
    return changed.astype(out.dtype), lse + jnp.log1p(added)


def log_sum_exp(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """log sum exp over `axes`; -inf where all are, with gradients that are finite there too."""
    if not axes:
        return x
    top = jax.lax.stop_gradient(jnp.max(x, axis=axes, keepdims=True))
    anchor = jnp.where(top == -jnp.inf, 0.0, top)
    total = jnp.sum(jnp.exp(x - anchor), axis=axes)
    seen = total != 0  # NaN counts as seen, and stays
    return jnp.where(seen, jnp.log(jnp.where(seen, total, 1.0)) + jnp.squeeze(anchor, axes), -jnp.inf)

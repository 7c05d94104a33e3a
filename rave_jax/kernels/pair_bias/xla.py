"""Blockwise attention in plain XLA: a scan over key blocks with an online softmax, forward and backward.

Memory is O(T): only one [T, block] tile of scores lives at a time, the backward pass recomputes it from the
log-sum-exp. Runs on any device. The gradient is the usual one of flash attention with one more term, because
the log-sum-exp is an output too:

    dS = P * (dO v^T - rowsum(dO * O) + dlse)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.kernels.pair_bias.base import (
    NOWHERE,
    MaskCodes,
    PairForm,
    Terms,
    group_heads,
    take_keys,
    tile_allow,
    tile_scores,
    tile_terms,
    ungroup_heads,
)
from rave_jax.typing import Array, Float


def block_size(T: int, S: int) -> int:
    """Keys per block: all of them where the whole map is no larger than a tile (windows, decoding), else wide enough to
    keep the matrix units busy, at most about 2^22 scores per head, and never all of a long S."""
    if S <= 128 or T * S <= 1 << 14:
        return S
    widest = max(128, min(512, (1 << 22) // max(T, 1) // 128 * 128))
    return min(widest, max(128, S // 8 // 128 * 128))


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Terms,
    form: PairForm,
    scale: float,
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """Blockwise attention; see `api.attention`."""
    T, S = q.shape[1], k.shape[1]
    block = block_size(T, S)
    padding = -S % block
    if padding:
        k, v = _pad(k, padding), _pad(v, padding)
        codes = codes._replace(order=_pad(codes.order, padding, NOWHERE), open_k=_pad(codes.open_k, padding, NOWHERE))
        pair, per_key = terms
        if pair is not None:
            pair = pair._replace(
                w=_pad(pair.w, padding), key=_pad(pair.key, padding), key_on=_pad(pair.key_on, padding)
            )
        terms = Terms(pair, None if per_key is None else _pad(per_key, padding))
    return _attention(q, k, v, terms, codes, form, scale, block)


def _pad(x: Array, count: int, value: int = 0) -> Array:
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, terms, codes, form, scale, block):
    return _forward(q, k, v, terms, codes, form, scale, block)[0]


def _forward(q, k, v, terms, codes, form: PairForm, scale: float, block: int):
    K = k.shape[2]
    qg = group_heads(q, K)
    B, _, G, T, _ = qg.shape

    def visit(carry, start):
        out, top, total = carry
        k_tile, v_tile = (jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (k, v))
        codes_tile, terms_tile = take_keys(codes, terms, start, block)
        scores = jnp.where(tile_allow(codes_tile), tile_scores(qg, k_tile, terms_tile, form, scale), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - anchor[..., None])
        shrink = jnp.exp(top - anchor)
        part = jnp.einsum("BKGTS,BSKc->BKGTc", weights.astype(v.dtype), v_tile, preferred_element_type=jnp.float32)
        return (out * shrink[..., None] + part, new_top, total * shrink + weights.sum(-1)), None

    start = (
        jnp.zeros((B, K, G, T, v.shape[-1]), jnp.float32),
        jnp.full((B, K, G, T), -jnp.inf, jnp.float32),
        jnp.zeros((B, K, G, T), jnp.float32),
    )
    out, top, total = _scan_blocks(visit, start, k.shape[1], block)[0]
    seen = total > 0
    out = out / jnp.where(seen, total, 1.0)[..., None]
    lse = jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    out, lse = ungroup_heads(out).astype(q.dtype), ungroup_heads(lse)
    return (out, lse), (q, k, v, terms, codes, out, lse)


def _backward(form: PairForm, scale: float, block: int, saved, cotangents):
    q, k, v, terms, codes, out, lse = saved
    d_out, d_lse = cotangents
    K = k.shape[2]
    qg, d_outg = group_heads(q, K), group_heads(d_out.astype(v.dtype), K)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    lse_g, shift = group_heads(lse, K)[..., None], group_heads(d_lse - delta, K)[..., None]

    def visit(carry, start):
        d_q, d_rows = carry
        k_tile, v_tile = (jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (k, v))
        codes_tile, terms_tile = take_keys(codes, terms, start, block)
        scores = dots = tile_scores(qg, k_tile, Terms(None, None), form, scale)
        pull_terms = None
        if terms:
            floats, rest = _split(terms_tile)
            scores, pull_terms = jax.vjp(lambda floats: dots + tile_terms(_join(floats, rest), form, K), floats)
        weights = jnp.where(tile_allow(codes_tile), jnp.exp(scores - lse_g), 0.0)
        d_weights = jnp.einsum("BKGTc,BSKc->BKGTS", d_outg, v_tile, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights + shift)
        d_v = jnp.einsum("BKGTS,BKGTc->BSKc", weights.astype(v.dtype), d_outg, preferred_element_type=jnp.float32)
        d_dot = (scale * d_scores).astype(q.dtype)
        d_q = d_q + jnp.einsum("BKGTS,BSKh->BKGTh", d_dot, k_tile, preferred_element_type=jnp.float32)
        d_k = jnp.einsum("BKGTS,BKGTh->BSKh", d_dot, qg, preferred_element_type=jnp.float32)
        d_keys = {"k": d_k.astype(k.dtype), "v": d_v.astype(v.dtype)}
        if pull_terms is not None:
            (found,) = pull_terms(d_scores)
            d_rows = {name: d_rows[name] + found[name] for name in d_rows}
            d_keys |= {name: found[name] for name in found if name not in d_rows}
        return (d_q, d_rows), d_keys

    floats, _ = _split(terms)
    d_rows = {name: jnp.zeros_like(floats[name]) for name in floats if name in ROWS}
    start = (jnp.zeros(qg.shape, jnp.float32), d_rows)
    (d_q, d_rows), d_keys = _scan_blocks(visit, start, k.shape[1], block)
    d_keys = {name: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for name, x in d_keys.items()}
    d_k, d_v = d_keys.pop("k"), d_keys.pop("v")
    d_terms = _cotangents(terms, d_rows | d_keys)
    return ungroup_heads(d_q).astype(q.dtype), d_k, d_v, d_terms, None


def _scan_blocks(visit, start, S: int, block: int):
    """Fold `visit` over block starts; a single block needs no loop."""
    if block == S:
        carry, y = visit(start, 0)
        return carry, jax.tree.map(lambda x: x[None], y)
    return jax.lax.scan(visit, start, jnp.arange(0, S, block))


ROWS = ("u", "row", "gain")
"""Operands of the queries: their gradients are sums over the blocks of keys."""


def _split(terms: Terms) -> tuple[dict[str, Array], Terms]:
    """The float operands by name, and all that `_join` needs beside them."""
    floats = {} if terms.per_key is None else {"per_key": terms.per_key}
    if terms.pair is not None:
        floats |= {name: getattr(terms.pair, name) for name in ("u", "w", "row", "key", "gain")}
    return floats, terms


def _join(floats: dict[str, Array], terms: Terms) -> Terms:
    pair = terms.pair
    if pair is not None:
        pair = pair._replace(**{name: x for name, x in floats.items() if name != "per_key"})
    return Terms(pair, floats.get("per_key"))


def _cotangents(terms: Terms, floats: dict[str, Array]) -> Terms:
    """The gradients in the shape of the terms; switches have none."""
    pair = terms.pair
    if pair is not None:
        switches: dict[str, Any] = {
            name: np.zeros(getattr(pair, name).shape, jax.dtypes.float0) for name in ("query_on", "key_on")
        }
        pair = pair._replace(**switches)
    return _join(floats, Terms(pair, None))


_attention.defvjp(_forward, _backward)

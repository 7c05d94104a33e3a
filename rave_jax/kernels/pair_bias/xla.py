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
    MaskCodes,
    PairBias,
    PairForm,
    group_heads,
    take_keys,
    tile_allow,
    tile_bias,
    tile_scores,
    ungroup_heads,
)
from rave_jax.typing import Array, Float

NOWHERE = jnp.iinfo(jnp.int32).min
"""Order and opening of padding keys: below every lo, equal to no opening."""


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
    v: Float[Array, "B S K h"],
    codes: MaskCodes,
    bias: PairBias | None,
    form: PairForm,
    scale: float,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T H"]]:
    """Blockwise attention; see `api.attention`."""
    T, S = q.shape[1], k.shape[1]
    block = block_size(T, S)
    padding = -S % block
    if padding:
        k, v = _pad(k, padding), _pad(v, padding)
        codes = codes._replace(order=_pad(codes.order, padding, NOWHERE), open_k=_pad(codes.open_k, padding, NOWHERE))
        if bias is not None:
            bias = bias._replace(
                w=_pad(bias.w, padding), key=_pad(bias.key, padding), key_on=_pad(bias.key_on, padding)
            )
    out, lse = _attention(q, k, v, bias, codes, form, scale, block)
    return out, lse


def _pad(x: Array, count: int, value: int = 0) -> Array:
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, bias, codes, form, scale, block):
    return _forward(q, k, v, bias, codes, form, scale, block)[0]


def _forward(q, k, v, bias, codes, form: PairForm, scale: float, block: int):
    K = k.shape[2]
    qg = group_heads(q, K)
    B, _, G, T, h = qg.shape

    def visit(carry, start):
        out, top, total = carry
        k_tile, v_tile = (jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (k, v))
        codes_tile, bias_tile = take_keys(codes, bias, start, block)
        scores = jnp.where(tile_allow(codes_tile), tile_scores(qg, k_tile, bias_tile, form, scale), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - anchor[..., None])
        shrink = jnp.exp(top - anchor)
        part = jnp.einsum("BKGTS,BSKh->BKGTh", weights.astype(v.dtype), v_tile, preferred_element_type=jnp.float32)
        return (out * shrink[..., None] + part, new_top, total * shrink + weights.sum(-1)), None

    start = (
        jnp.zeros((B, K, G, T, h), jnp.float32),
        jnp.full((B, K, G, T), -jnp.inf, jnp.float32),
        jnp.zeros((B, K, G, T), jnp.float32),
    )
    out, top, total = _scan_blocks(visit, start, k.shape[1], block)[0]
    seen = total > 0
    out = out / jnp.where(seen, total, 1.0)[..., None]
    lse = jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    out, lse = ungroup_heads(out).astype(q.dtype), ungroup_heads(lse)
    return (out, lse), (q, k, v, bias, codes, out, lse)


def _backward(form: PairForm, scale: float, block: int, saved, cotangents):
    q, k, v, bias, codes, out, lse = saved
    d_out, d_lse = cotangents
    K = k.shape[2]
    qg, d_outg = group_heads(q, K), group_heads(d_out.astype(v.dtype), K)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    lse_g, shift = group_heads(lse, K)[..., None], group_heads(d_lse - delta, K)[..., None]

    def visit(carry, start):
        d_q, d_rows = carry
        k_tile, v_tile = (jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (k, v))
        codes_tile, bias_tile = take_keys(codes, bias, start, block)
        scores = tile_scores(qg, k_tile, None, form, scale)
        pull_bias = None
        if bias_tile is not None:
            bias_scores, pull_bias = jax.vjp(
                lambda *f: tile_bias(_with_floats(bias_tile, f), form), *_floats(bias_tile)
            )
            scores = scores + bias_scores
        weights = jnp.where(tile_allow(codes_tile), jnp.exp(scores - lse_g), 0.0)
        d_weights = jnp.einsum("BKGTh,BSKh->BKGTS", d_outg, v_tile, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights + shift)
        d_v = jnp.einsum("BKGTS,BKGTh->BSKh", weights.astype(v.dtype), d_outg, preferred_element_type=jnp.float32)
        d_dot = (scale * d_scores).astype(q.dtype)
        d_q = d_q + jnp.einsum("BKGTS,BSKh->BKGTh", d_dot, k_tile, preferred_element_type=jnp.float32)
        d_k = jnp.einsum("BKGTS,BKGTh->BSKh", d_dot, qg, preferred_element_type=jnp.float32)
        d_keys = (d_k.astype(k.dtype), d_v.astype(v.dtype))
        if pull_bias is not None:
            d_u, d_w, d_row, d_key, d_gain = pull_bias(d_scores)
            d_rows = tuple(a + b for a, b in zip(d_rows, (d_u, d_row, d_gain), strict=True))
            d_keys += (d_w, d_key)
        return (d_q, d_rows), d_keys

    d_rows = () if bias is None else tuple(jnp.zeros_like(x) for x in (bias.u, bias.row, bias.gain))
    start = (jnp.zeros(qg.shape, jnp.float32), d_rows)
    (d_q, d_rows), d_keys = _scan_blocks(visit, start, k.shape[1], block)
    d_k, d_v, *d_bias_keys = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in d_keys)
    d_bias = None
    if bias is not None:
        (d_u, d_row, d_gain), (d_w, d_key) = d_rows, d_bias_keys
        switches: list[Any] = [np.zeros(x.shape, jax.dtypes.float0) for x in (bias.query_on, bias.key_on)]
        d_bias = PairBias(d_u, d_w, d_row, d_key, d_gain, *switches)
    return ungroup_heads(d_q).astype(q.dtype), d_k, d_v, d_bias, None


def _scan_blocks(visit, start, S: int, block: int):
    """Fold `visit` over block starts; a single block needs no loop."""
    if block == S:
        carry, y = visit(start, 0)
        return carry, jax.tree.map(lambda x: x[None], y)
    return jax.lax.scan(visit, start, jnp.arange(0, S, block))


def _floats(bias: PairBias) -> tuple[Array, ...]:
    return (bias.u, bias.w, bias.row, bias.key, bias.gain)


def _with_floats(bias: PairBias, floats: tuple[Array, ...]) -> PairBias:
    return bias._replace(**dict(zip(("u", "w", "row", "key", "gain"), floats, strict=True)))


_attention.defvjp(_forward, _backward)

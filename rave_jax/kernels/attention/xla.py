"""Blockwise attention in plain XLA: a scan over key blocks with an online softmax, forward and backward.

Memory is O(T): only one [T, block] tile of scores lives at a time, the backward pass recomputes it from the
log-sum-exp. Runs on any device. The gradient is the usual one of flash attention with one more term, because
the log-sum-exp is an output too:

    dS = P * (dO v^T - rowsum(dO * O) + dlse)

The gate's z is one product, of the channels [u, row term, 1] and [w, 1, key term] with zeros where a side is switched
off, so that its gradient is two products and no sums over tiles. What the form and its slope share is made once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention.base import (
    LOG_GATE_FLOOR,
    NOWHERE,
    MaskCodes,
    PairBias,
    PairForm,
    Terms,
    group_heads,
    tile_allow,
    tile_scores,
    ungroup_heads,
)
from rave_jax.typing import Array, Bool, Float


class Added(NamedTuple):
    """What is added to scores, as the scan reads it. None where the call has none."""

    queries: Float[Array, "B K G T r"] | None
    """Channels of the gate's z."""
    keys: Float[Array, "B S K r"] | None
    gain: Float[Array, "K G 1 1"] | None
    """In a form that has one."""
    per_key: Float[Array, "B S K G"] | None


def block_size(T: int, S: int) -> int:
    """Keys per block: all of them where the whole map is no larger than a tile (windows, decoding), else wide enough to
    keep the matrix units busy, about 2^22 scores per head or 128 keys, and never all of a long S."""
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
    added = _added(terms, form, k.shape[2])
    padding = -S % block
    if padding:
        k, v = _pad(k, padding), _pad(v, padding)
        codes = codes._replace(order=_pad(codes.order, padding, NOWHERE), open_k=_pad(codes.open_k, padding, NOWHERE))
        added = added._replace(**{name: _pad(x, padding) for name, x in _of_keys(added).items()})
    return _attention(q, k, v, added, codes, form, scale, block)


def _pad(x: Array, count: int, value: int = 0) -> Array:
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _added(terms: Terms, form: PairForm, K: int) -> Added:
    """Plain jnp: jax differentiates it, switches included."""
    queries = keys = gain = per_key = None
    if terms.pair is not None:
        pair: PairBias = terms.pair
        one, key_one = jnp.ones_like(pair.row), jnp.ones_like(pair.key)
        queries = _switched(pair.query_on, pair.u, pair.row, one)
        queries = group_heads(queries, K)
        keys = _switched(pair.key_on[..., None], pair.w, key_one, pair.key)
        if form.kind == "centered_sigmoid":
            gain = pair.gain.reshape(K, -1, 1, 1)
    if terms.per_key is not None:
        per_key = terms.per_key.reshape(*terms.per_key.shape[:2], K, -1)
    return Added(queries, keys, gain, per_key)


def _switched(on: Bool[Array, "B n m"], vectors: Float[Array, "B n m r"], *numbers: Float[Array, "B n m"]) -> Array:
    channels = jnp.concatenate([vectors, jnp.stack(numbers, axis=-1)], axis=-1)
    return jnp.where(on[..., None], channels, 0.0)


def _of_keys(added: Added) -> dict[str, Array]:
    found = {"keys": added.keys, "per_key": added.per_key}
    return {name: x for name, x in found.items() if x is not None}


class Gate(NamedTuple):
    """A tile of the gate: the exponential of score + shift, times factor. None: 0, or 1."""

    shift: Array | None
    factor: Array | None
    of_z: Array | float
    """d bias / d z."""
    of_gain: Array | None
    """d bias / d gain, in a form that has one."""


def _gate(
    queries: Float[Array, "B K G T r"], keys: Float[Array, "B s K r"], gain: Array | None, form: PairForm
) -> Gate:
    """The gate of a tile. exp(log_gate(z)) = 1 / (1/2 + e) with e = exp(-z) / 2: no logarithm, and LOG_GATE_FLOOR keeps
    e finite. The slope is made of z again: cheaper than to keep e, and exact where the gate is wide open."""
    z = _gate_product("BKGTr,BSKr->BKGTS", queries, keys)
    if form.kind == "log_gate":
        factor = 1 / (0.5 + 0.5 * jnp.exp(-jnp.maximum(z, LOG_GATE_FLOOR)))
        return Gate(None, factor, jax.nn.sigmoid(-z), None)
    if form.kind == "linear":
        return Gate(z, None, 1.0, None)
    if form.kind == "tanh":
        bent = jnp.tanh(z * (1 / form.limit))
        return Gate(form.limit * bent, None, 1 - bent * bent, None)
    assert gain is not None
    bent = jnp.tanh(z * 0.5)
    return Gate(gain * bent, None, (0.5 * gain) * (1 - bent * bent), bent)


def _gate_product(form: str, a: Array, b: Array) -> Array:
    """In full float32: it carries row and key terms, and has few channels."""
    return jnp.einsum(form, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, added, codes, form, scale, block):
    return _forward(q, k, v, added, codes, form, scale, block)[0]


def _scores(q, k, per_key, scale: float):
    scores = tile_scores(q, k, Terms(None, None), PairForm(), scale)
    return scores if per_key is None else scores + jnp.moveaxis(per_key, 1, 3)[:, :, :, None]


def _forward(q, k, v, added: Added, codes: MaskCodes, form: PairForm, scale: float, block: int):
    K = k.shape[2]
    qg = group_heads(q, K)
    B, _, G, T, _ = qg.shape

    def visit(carry, start):
        out, top, total = carry
        k_tile, v_tile, added_tile, codes_tile = _take((k, v, added, codes), start, block)
        scores = _scores(qg, k_tile, added_tile.per_key, scale)
        factor = None
        if added.queries is not None:
            gate = _gate(added.queries, added_tile.keys, added.gain, form)
            scores, factor = scores if gate.shift is None else scores + gate.shift, gate.factor
        # A factor is no part of the maximum: it lies between e^LOG_GATE_FLOOR and 2, so no row loses its weight by it.
        scores = jnp.where(tile_allow(codes_tile), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - anchor[..., None])
        weights = weights if factor is None else weights * factor
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
    return (out, lse), (q, k, v, added, codes, out, lse)


def _backward(form: PairForm, scale: float, block: int, saved, cotangents):
    q, k, v, added, codes, out, lse = saved
    d_out, d_lse = cotangents
    K = k.shape[2]
    qg, d_outg = group_heads(q, K), group_heads(d_out.astype(v.dtype), K)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    lse_g, shift = group_heads(lse, K)[..., None], group_heads(d_lse - delta, K)[..., None]

    def visit(d_rows, start):
        k_tile, v_tile, added_tile, codes_tile = _take((k, v, added, codes), start, block)
        scores = _scores(qg, k_tile, added_tile.per_key, scale)
        gate = None
        if added.queries is not None:
            gate = _gate(added.queries, added_tile.keys, added.gain, form)
            scores = scores if gate.shift is None else scores + gate.shift
        weights = jnp.exp(scores - lse_g)
        if gate is not None and gate.factor is not None:
            weights = weights * gate.factor
        # Three products need the weights. Without the barrier XLA computes them again for each product. On a CPU this
        # makes a step with a gate slower, and leaves one without a gate as fast.
        weights = jax.lax.optimization_barrier(jnp.where(tile_allow(codes_tile), weights, 0.0))
        d_weights = jnp.einsum("BKGTc,BSKc->BKGTS", d_outg, v_tile, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights + shift)
        d_v = jnp.einsum("BKGTS,BKGTc->BSKc", weights.astype(v.dtype), d_outg, preferred_element_type=jnp.float32)
        d_dot = (scale * d_scores).astype(q.dtype)
        d_q = jnp.einsum("BKGTS,BSKh->BKGTh", d_dot, k_tile, preferred_element_type=jnp.float32)
        d_k = jnp.einsum("BKGTS,BKGTh->BSKh", d_dot, qg, preferred_element_type=jnp.float32)
        found = {"q": d_q}
        d_keys = {"k": d_k.astype(k.dtype), "v": d_v.astype(v.dtype)}
        if gate is not None:
            d_z = d_scores * gate.of_z
            found["queries"] = _gate_product("BKGTS,BSKr->BKGTr", d_z, added_tile.keys)
            d_keys["keys"] = _gate_product("BKGTS,BKGTr->BSKr", d_z, added.queries)
            if gate.of_gain is not None:
                found["gain"] = (d_scores * gate.of_gain).sum((0, 3, 4))[..., None, None]
        if added.per_key is not None:
            d_keys["per_key"] = jnp.moveaxis(d_scores.sum(3), 3, 1)
        return {name: d_rows[name] + found[name] for name in d_rows}, d_keys

    d_rows = {"q": jnp.zeros(qg.shape, jnp.float32)}
    d_rows |= {n: jnp.zeros_like(x) for n, x in (("queries", added.queries), ("gain", added.gain)) if x is not None}
    d_rows, d_keys = _scan_blocks(visit, d_rows, k.shape[1], block)
    d_keys = {name: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for name, x in d_keys.items()}
    d_q, d_k, d_v = ungroup_heads(d_rows.pop("q")).astype(q.dtype), d_keys.pop("k"), d_keys.pop("v")
    return d_q, d_k, d_v, added._replace(**d_rows, **d_keys), None


def _take(operands, start, size: int):
    """The same operands for keys start .. start + size - 1; what belongs to queries as it is."""

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    k, v, added, codes = operands
    codes = codes._replace(order=cut(codes.order), open_k=cut(codes.open_k))
    return cut(k), cut(v), added._replace(**{name: cut(x) for name, x in _of_keys(added).items()}), codes


def _scan_blocks(visit, start, S: int, block: int):
    """Fold `visit` over block starts; a single block needs no loop."""
    if block == S:
        carry, y = visit(start, 0)
        return carry, jax.tree.map(lambda x: x[None], y)
    return jax.lax.scan(visit, start, jnp.arange(0, S, block))


_attention.defvjp(_forward, _backward)

"""Attention with score terms in Mosaic kernels for TPUs; semantics in `kernels.attention.base`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.kernels import saved
from rave_jax.kernels.attention.base import MaskCodes, Terms
from rave_jax.kernels.attention.pallas_tpu import operands, tile
from rave_jax.kernels.attention.pallas_tpu.backward import backward
from rave_jax.kernels.attention.pallas_tpu.blocks import BlockSizes, block_facts
from rave_jax.kernels.attention.pallas_tpu.forward import forward
from rave_jax.kernels.attention.pallas_tpu.operands import Call, Packed, keys_axis
from rave_jax.kernels.attention.pallas_tpu.padding import pad
from rave_jax.typing import Array, Float


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Terms,
    scale: float,
    *,
    blocks: BlockSizes,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """Attention on one device; see `api.attention`.

    Args:
        blocks: sizes of the kernels' blocks.
        interpret: what `pallas_call` takes: True or its InterpretParams run the kernels anywhere, slowly.
    """
    call = operands.make_call(q, k, v, terms, scale, blocks, interpret=interpret)
    whole = operands.pad_codes(codes, call.T, call.S)
    queries_on, keys_on = operands.pack_switches(terms, call)
    out, lse = _attention(operands.pack(q, k, v, terms, call), whole, queries_on, keys_on, call)
    T, G = q.shape[1], call.G
    lse = operands.heads_last(lse[:, :, :G], T)
    lse = jnp.where(lse >= tile.UNSEEN, -jnp.inf, lse * (1 / tile.LOG2E))
    return operands.heads_last(out, T)[..., : v.shape[-1]], lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(packed, codes, queries_on, keys_on, call):
    return _forward(packed, codes, queries_on, keys_on, call)[0]


def _forward(packed, codes, queries_on, keys_on, call):
    facts = block_facts(codes, queries_on, keys_on, *call.forward)
    out, lse = saved.of_attention(*forward(packed, operands.pack_codes(codes), facts, call))
    return (out, lse), (packed, codes, queries_on, keys_on, out, lse)


def _backward(call: Call, kept, cotangents):
    packed, codes, queries_on, keys_on, out, lse = kept
    d_out, d_lse = cotangents
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    delta = pad(delta, 2, call.padded_group) - d_lse * tile.LOG2E
    grads = []
    for chunk, part, codes_k, on in _key_chunks(packed, codes, keys_on, call):
        facts = block_facts(codes_k, queries_on, on, *call.backward)
        grads.append(backward(part, operands.pack_codes(codes_k), facts, d_out, lse, delta, chunk))
    return _joined(grads), *jax.tree.map(_no_gradient, (codes, queries_on, keys_on))


_attention.defvjp(_forward, _backward)


def _no_gradient(x: Array) -> Any:
    return np.zeros(x.shape, jax.dtypes.float0)


def _key_chunks(packed: Packed, codes: MaskCodes, keys_on: Array, call: Call):
    """The operands for as many keys at a time as the backward kernel has room for."""
    step = call.keys_at_once
    for start in range(0, call.S, step):
        size = min(step, call.S - start)
        part = {}
        for name, x in packed.items():
            axis = keys_axis(name)
            part[name] = x if axis is None else jax.lax.slice_in_dim(x, start, start + size, axis=axis)
        inside = slice(start, start + size)
        codes_k = codes._replace(order=codes.order[:, inside], open_k=codes.open_k[:, inside])
        yield dataclasses.replace(call, S=size), part, codes_k, keys_on[:, inside]


def _joined(grads: list[Packed]) -> Packed:
    """Gradients of chunks of keys as one: the keys' side by side, the queries' summed."""
    if len(grads) == 1:
        return grads[0]
    found = {}
    for name, first in grads[0].items():
        parts, axis = [g[name] for g in grads], keys_axis(name)
        if axis is None:
            total = sum((x.astype(jnp.float32) for x in parts[1:]), first.astype(jnp.float32))
            found[name] = total.astype(first.dtype)
        else:
            found[name] = jnp.concatenate(parts, axis=axis)
    return found

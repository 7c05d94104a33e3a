"""From the public operands to what the kernels read, and the sizes they are compiled for.

Heads come before tokens, so that one head's tokens are a matrix; lengths and widths are padded to whole blocks and
lanes. XLA lays an array [B, T, H, h] out like that anyway, so that queries, output and their gradients are where they
are wanted and no copy is made; a block of queries is a piece of each head. What belongs to a token and is a few numbers
(codes, channels and features of score terms, log-sum-exp) lies with tokens in the lanes: a column [T, 1] would be
padded to 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from rave_jax.kernels.attention.base import NOWHERE, MaskCodes, Term, Terms, group_heads, ungroup_heads
from rave_jax.kernels.attention.pallas_tpu.blocks import BlockSizes, ByFacts, Visit
from rave_jax.kernels.attention.pallas_tpu.padding import SUBLANES, extend, pad, up
from rave_jax.kernels.attention.pallas_tpu.terms import TermCall, switched, term_calls
from rave_jax.kernels.attention.pallas_tpu.tile import LANES, LOG2E
from rave_jax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class Call:
    """All that is static of one call: sizes after padding, and what is asked."""

    B: int
    K: int
    G: int
    T: int
    S: int
    h: int
    c: int
    terms: tuple[TermCall, ...]
    key_bias: bool
    scale: float
    forward: tuple[int, int]
    """(queries, keys) in a block of the forward kernel, cut to T and S."""
    backward: tuple[int, int]
    """(queries, keys) in a block of the backward kernel, cut to T and S."""
    key_bytes: int
    """See `BlockSizes`."""
    dtype: str
    interpret: Any
    """Run by an interpreter, on any device."""
    visit: Callable[[int, int], Visit] = ByFacts

    @property
    def padded_group(self) -> int:
        """G up to whole sublanes."""
        return up(self.G, SUBLANES)

    @property
    def folded(self) -> TermCall | None:
        """The term that rides in further channels of <q, k>."""
        return next((term for term in self.terms if term.folded), None)

    @property
    def switches(self) -> int:
        """How many switches the terms have."""
        return max((term.switches + 1 for term in self.terms if term.switches is not None), default=0)

    @property
    def keys_at_once(self) -> int:
        """Keys whose gradients the backward kernel has room for, in whole blocks: about equal chunks of a row, since
        each visits all queries."""
        numbers = self.h + self.c + sum(term.numbers_of_key for term in self.terms)
        numbers += self.padded_group if self.key_bias else 0
        block = self.backward[1]
        most, blocks = max(self.key_bytes // (4 * numbers * block), 1), self.S // block
        chunks = -(-blocks // most)
        return -(-blocks // chunks) * block


Packed = dict[str, Array]
"""The float operands as the kernels read them, by name:

q [B,K,G,T,h], k [B,K,S,h], v [B,K,S,c]; key_bias [B,K,G,S] in log2, G padded to whole sublanes; and of the n-th term
u.n [B,K,G,r,T] as given, w.n [B,K,r,S], rows.n [B,K,n*G,T] (features of queries, then their switch), keys.n [B,K,n,S]
(the same of keys), heads.n [K,n*G].
"""
OF_KEYS = ("k", "v", "w", "keys", "key_bias")
"""Kinds of operands that belong to keys; their axis of keys is the last but of k and v."""


def kind(name: str) -> str:
    """What an operand is, of whatever term."""
    return name.split(".")[0]


def keys_axis(name: str) -> int | None:
    """The axis of keys, None where an operand belongs to queries."""
    return None if kind(name) not in OF_KEYS else 2 if name in ("k", "v") else 3


class Codes(NamedTuple):
    """Mask codes with tokens in the lanes: lo, hi, open_q; order, open_k; then zeros."""

    queries: Int[Array, "B 8 T"]
    keys: Int[Array, "B 8 S"]


def pad_codes(codes: MaskCodes, T: int, S: int) -> MaskCodes:
    """Queries that see nothing and keys that nobody sees, up to whole blocks."""
    shut = jnp.max(codes.open_q) + 1
    open_k = pad(codes.open_k, 1, S)
    there = jnp.arange(S) < codes.open_k.shape[1]
    return MaskCodes(
        pad(codes.lo, 1, T, 1),
        pad(codes.hi, 1, T, 0),
        pad(codes.order, 1, S, NOWHERE),
        pad(codes.open_q, 1, T, -1),
        jnp.where(there, open_k, jnp.maximum(shut, 0)),
    )


def pack_codes(codes: MaskCodes) -> Codes:
    """Codes, padded already, as the kernels read them."""
    queries = jnp.stack([codes.lo, codes.hi, codes.open_q], axis=1).astype(jnp.int32)
    keys = jnp.stack([codes.order, codes.open_k], axis=1).astype(jnp.int32)
    return Codes(pad(queries, 1, SUBLANES), pad(keys, 1, SUBLANES))


def pack(q: Array, k: Array, v: Array, terms: Terms, call: Call) -> Packed:
    """The float operands as the kernels read them. Plain jnp: jax differentiates it, switches included."""
    packed = {
        "q": pad(heads_first(q, call), 4, call.h),
        "k": pad(pad(jnp.moveaxis(k, 2, 1), 2, call.S), 3, call.h),
        "v": pad(pad(jnp.moveaxis(v, 2, 1), 2, call.S), 3, call.c),
    }
    for n, (term, static) in enumerate(zip(terms.parts, call.terms, strict=True)):
        packed |= {f"{name}.{n}": x for name, x in _pack_term(term, static, call).items()}
    if terms.per_key is not None:
        heads = _keys_last(pad(terms.per_key * LOG2E, 1, call.S)).reshape(call.B, call.K, call.G, call.S)
        packed["key_bias"] = pad(heads, 2, call.padded_group)
    return packed


def _pack_term(term: Term, static: TermCall, call: Call) -> Packed:
    """Operands of one term. Its function sees what is padded as it sees the last token, or as what is switched off."""
    filled = pad if static.zeros else extend

    def query_rows(xs: Sequence[Array]) -> Array:
        return jnp.concatenate([group_heads(x, call.K) for x in xs], axis=2)

    packed = {}
    if term.u is not None and term.w is not None:
        packed["u"] = jnp.swapaxes(group_heads(filled(term.u, 1, call.T), call.K), 3, 4)
        w = term.w
        if term.key_on is not None and static.zeros:
            w = w * term.key_on.astype(jnp.float32)[..., None, None]
        packed["w"] = _keys_last(filled(w, 1, call.S))
    rows = [extend(term.query[name], 1, call.T) for name in static.shape.query]
    if term.query_on is not None:
        rows.append(pad(term.query_on.astype(jnp.float32), 1, call.T))
    if rows:
        packed["rows"] = query_rows(rows)
    columns = [extend(term.key[name], 1, call.S) for name in static.shape.key]
    if term.key_on is not None and static.masks:
        on = pad(term.key_on.astype(jnp.float32), 1, call.S)
        columns.append(jnp.broadcast_to(on[..., None], (call.B, call.S, call.K)))
    if columns:
        packed["keys"] = jnp.stack([_keys_last(x) for x in columns], axis=2)
    if static.shape.head:
        packed["heads"] = jnp.concatenate([term.head[name].reshape(call.K, call.G) for name in static.shape.head], 1)
    return packed


def pack_switches(terms: Terms, call: Call) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """A bit for each of the call's switches: is any head of a query on; is a key on?"""
    queries, keys = (jnp.zeros((call.B, n), jnp.int32) for n in (call.T, call.S))

    def bits(on: Bool[Array, "B n"] | None, like: Array, number: int) -> Array:
        whole = jnp.ones(like.shape, bool) if on is None else pad(on, 1, like.shape[1])
        return jnp.left_shift(whole.astype(jnp.int32), number)

    for number, term in switched(terms, call.terms):
        queries |= bits(None if term.query_on is None else term.query_on.any(-1), queries, number)
        keys |= bits(term.key_on, keys, number)
    return queries, keys


def heads_first(x: Float[Array, "B T H *rest"], call: Call) -> Float[Array, "B K G T *rest"]:
    """Query heads by kv head, before tokens."""
    return group_heads(pad(x, 1, call.T), call.K)


def heads_last(x: Float[Array, "B K G T *rest"], T: int) -> Float[Array, "B T H *rest"]:
    """The inverse of `heads_first`, without what was padded."""
    return ungroup_heads(x)[:, :T]


def _keys_last(x: Float[Array, "B S K *rest"]) -> Float[Array, "B K *rest S"]:
    return jnp.moveaxis(x, 1, -1)


def nested(n: int, forward: int, backward: int) -> tuple[int, tuple[int, int]]:
    """A length up to whole blocks, and blocks of both kernels that divide it, none larger than is given.

    The smaller block is cut so that its number stays and least is padded (640 in blocks of 512 are two of 384), the
    larger one is whole smaller ones: a common multiple of blocks that were cut apart may be several times the length.

    Args:
        n: tokens.
        forward, backward: blocks, multiples of LANES.
    """
    least = min(forward, backward)
    count = -(-n // least)
    block = up(-(-n // count), LANES)

    def several(size: int) -> int:
        return max(block * m for m in range(1, size // block + 1) if count % m == 0)

    return block * count, (several(forward), several(backward))


def make_call(
    q: Array,
    k: Array,
    v: Array,
    terms: Terms,
    scale: float,
    blocks: BlockSizes,
    *,
    interpret: Any,
    visit: Callable[[int, int], Visit] = ByFacts,
) -> Call:
    """Sizes of a call: its blocks are cut to it, and its lengths padded to whole ones; see `nested`."""
    B, T, H, h = q.shape
    S, K = k.shape[1:3]
    few = T <= FEW
    wide = (up(h, LANES) + up(v.shape[-1], LANES)) * q.dtype.itemsize * (H // K)

    def fitting(block_q: int) -> int:
        while block_q > LANES and block_q * wide > blocks.query_bytes:
            block_q //= 2
        return up(block_q, LANES)

    sizes = blocks.forward, blocks.backward
    padded_T, sizes_q = nested(T, *(fitting(block_q) for block_q, _ in sizes))
    padded_S, sizes_k = nested(S, *(block_k for _, block_k in sizes))
    if few:
        padded_T = up(T, 16)
        sizes_q = padded_T, padded_T
    return Call(
        B=B,
        K=K,
        G=H // K,
        T=padded_T,
        S=padded_S,
        h=up(h, LANES),
        c=up(v.shape[-1], LANES),
        terms=term_calls(terms, str(q.dtype), blocks.fold_linear),
        key_bias=terms.per_key is not None,
        scale=scale,
        forward=(sizes_q[0], sizes_k[0]),
        backward=(sizes_q[1], sizes_k[1]),
        key_bytes=blocks.key_bytes,
        dtype=str(q.dtype),
        interpret=interpret,
        visit=visit,
    )


FEW = 64
"""So few queries (decoding) are one block, shorter than the lanes are wide."""

"""From the public operands to what the kernels read, and the sizes they are compiled for.

Heads come before tokens, so that one head's tokens are a matrix; lengths and widths are padded to whole blocks and
lanes. XLA lays an array [B, T, H, h] out like that anyway, so that queries, output and their gradients are where they
are wanted and no copy is made; a block of queries is a piece of each head. What belongs to a token and is a few numbers
(codes, gate channels, row term, log-sum-exp) lies with tokens in the lanes: a column [T, 1] would be padded to 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from rave_jax.kernels.attention.base import (
    NOWHERE,
    MaskCodes,
    PairBias,
    PairForm,
    Terms,
    group_heads,
    ungroup_heads,
)
from rave_jax.kernels.attention.pallas_tpu.blocks import BlockSizes, ByFacts, Visit
from rave_jax.kernels.attention.pallas_tpu.tile import LANES, LOG2E, z_scale
from rave_jax.typing import Array, Float, Int

SUBLANES = 8


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
    r: int | None
    """Gate channels, padded; None without a pair bias."""
    key_bias: bool
    form: PairForm
    scale: float
    forward: tuple[int, int]
    """(queries, keys) in a block of the forward kernel, cut to T and S."""
    backward: tuple[int, int]
    """(queries, keys) in a block of the backward kernel, cut to T and S."""
    key_bytes: int
    """See `BlockSizes`."""
    dtype: str
    folded: bool
    """A linear gate rides in further channels of <q, k>."""
    interpret: Any
    """Run by an interpreter, on any device."""
    visit: Callable[[int, int], Visit] = ByFacts

    @property
    def padded_group(self) -> int:
        """G up to whole sublanes."""
        return up(self.G, SUBLANES)

    @property
    def channels(self) -> int:
        """Channels of the gate's product before they are split: u, and eight for row term and one."""
        assert self.r is not None
        return self.r + SUBLANES

    @property
    def split_channels(self) -> int:
        """Channels of the gate's product."""
        return self.channels if self.dtype == "float32" else up(3 * self.channels, 16)

    @property
    def channel_lanes(self) -> int:
        """The same up to whole lanes."""
        return up(self.split_channels, LANES)

    @property
    def rounded_channels(self) -> int:
        """Channels of the products that make the gate's gradients."""
        return self.channels if self.dtype == "float32" else up(self.channels, 16)

    @property
    def keys_at_once(self) -> int:
        """Keys whose gradients the backward kernel has room for, in whole blocks: about equal chunks of a row, since
        each visits all queries."""
        numbers = self.h + self.c + (0 if self.r is None else self.rounded_channels)
        numbers += self.padded_group if self.key_bias else 0
        block = self.backward[1]
        most, blocks = max(self.key_bytes // (4 * numbers * block), 1), self.S // block
        chunks = -(-blocks // most)
        return -(-blocks // chunks) * block

    @property
    def has_gain(self) -> bool:
        """Has the form a gain per head?"""
        return self.r is not None and self.form.kind == "centered_sigmoid"


class Packed(NamedTuple):
    """The float operands as the kernels read them. None where the call has none."""

    q: Float[Array, "B K G T h"]
    k: Float[Array, "B K S h"]
    v: Float[Array, "B K S c"]
    u: Float[Array, "B K G r T"] | None = None
    """As given. The kernels apply switch and scale, which saves a second copy."""
    rows: Float[Array, "B K 2*G T"] | None = None
    """Row terms, then switches times the scale of z'; each padded to whole sublanes."""
    w: Float[Array, "B K r S"] | None = None
    keys: Float[Array, "B K 8 S"] | None = None
    """Switch, key term and a one, then zeros."""
    gain: Float[Array, "K G"] | None = None
    key_bias: Float[Array, "B K G S"] | None = None
    """In log2; G padded to whole sublanes."""


class Codes(NamedTuple):
    """Mask codes with tokens in the lanes: lo, hi, open_q; order, open_k; then zeros."""

    queries: Int[Array, "B 8 T"]
    keys: Int[Array, "B 8 S"]


def up(n: int, to: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // to) * to


def pad(x: Array, axis: int, size: int, value: float = 0) -> Array:
    """x with `axis` filled up to `size`."""
    missing = size - x.shape[axis]
    widths = [(0, missing if n == axis else 0) for n in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


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
    """The float operands as the kernels read them. Plain jnp: jax differentiates it, switches and scales included."""
    packed = Packed(
        q=pad(heads_first(q, call), 4, call.h),
        k=pad(pad(jnp.moveaxis(k, 2, 1), 2, call.S), 3, call.h),
        v=pad(pad(jnp.moveaxis(v, 2, 1), 2, call.S), 3, call.c),
    )
    if terms.pair is not None:
        packed = packed._replace(**_pack_pair(terms.pair, call))
    if terms.per_key is not None:
        heads = _keys_last(terms.per_key * LOG2E, call).reshape(call.B, call.K, call.G, call.S)
        packed = packed._replace(key_bias=pad(heads, 2, call.padded_group))
    return packed


def _pack_pair(pair: PairBias, call: Call) -> dict[str, Array]:
    r = call.r
    assert r is not None
    scaled = heads_first(pair.query_on.astype(jnp.float32), call) * z_scale(
        call.form, call.scale if call.folded else None
    )
    switches, rows = (pad(x, 2, call.padded_group) for x in (scaled, heads_first(pair.row, call) * scaled))
    key_on = pair.key_on.astype(jnp.float32)[..., None]
    ones = jnp.ones_like(pair.key)
    keys = [_keys_last(x, call) for x in (key_on * ones, pair.key * key_on, ones)]
    packed = {
        "u": pad(jnp.swapaxes(heads_first(pair.u, call), 3, 4), 3, r),
        "rows": jnp.concatenate([rows, switches], axis=2),
        "w": pad(_keys_last(pair.w * key_on[..., None], call), 2, r),
        "keys": pad(jnp.stack(keys, axis=2), 2, SUBLANES),
    }
    if call.has_gain:
        packed["gain"] = pair.gain.reshape(call.K, call.G)
    return packed


def heads_first(x: Float[Array, "B T H *rest"], call: Call) -> Float[Array, "B K G T *rest"]:
    """Query heads by kv head, before tokens."""
    return group_heads(pad(x, 1, call.T), call.K)


def heads_last(x: Float[Array, "B K G T *rest"], T: int) -> Float[Array, "B T H *rest"]:
    """The inverse of `heads_first`, without what was padded."""
    return ungroup_heads(x)[:, :T]


def _keys_last(x: Float[Array, "B S K *rest"], call: Call) -> Float[Array, "B K *rest S"]:
    return jnp.moveaxis(pad(x, 1, call.S), 1, -1)


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
    form: PairForm,
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
        r=None if terms.pair is None else up(terms.pair.u.shape[-1], SUBLANES),
        key_bias=terms.per_key is not None,
        form=form,
        scale=scale,
        forward=(sizes_q[0], sizes_k[0]),
        backward=(sizes_q[1], sizes_k[1]),
        key_bytes=blocks.key_bytes,
        dtype=str(q.dtype),
        folded=blocks.fold_linear and terms.pair is not None and form.kind == "linear",
        interpret=interpret,
        visit=visit,
    )


FEW = 64
"""So few queries (decoding) are one block, shorter than the lanes are wide."""

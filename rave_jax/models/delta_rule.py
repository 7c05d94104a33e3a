"""The gated delta rule (arXiv 2412.06464): each head keeps a matrix that tokens write to and read from.

With query q and key k of a key head, value v, decay g <= 0 and strength b of one of its value heads, token after token:

    M <- exp(g) M                          the matrix fades
    M <- M + k (b (v - M^T k))^T           what stands under the key is replaced by the value, as far as b says
    out = M^T q

A document's first token finds M = 0. `recurrent` goes by tokens, and `chunked` computes the same by matrix products
over chunks of tokens, in the WY form of the paper's section 3.3. Both compute in the number type they are given.

Documents of a row share nothing, not even rounding: what a token sees of another document's tokens is multiplied by an
exact zero, and no sum runs over tokens of two documents. Only where its tokens stand in chunks can change a document's
last bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.typing import Array, Bool, Float

CHUNK = 64
"""Tokens of a chunk, a power of two. Longer chunks have fewer steps in a row and more products inside."""


class DeltaTokens(NamedTuple):
    """What tokens say, G value heads for each key head; v is the width of a value head.

    A token that neither fades nor writes (`decay` and `strength` are 0) leaves the matrix as it is: padding.

    Fields:
        q, k: queries, scaled, and keys.
        v: values.
        decay: g.
        strength: b, 0 to 1.
        begins: is it the first token of a document?
    """

    q: Float[Array, "B T K h"]
    k: Float[Array, "B T K h"]
    v: Float[Array, "B T K G v"]
    decay: Float[Array, "B T K G"]
    strength: Float[Array, "B T K G"]
    begins: Bool[Array, "B T"]


Memory = Float[Array, "B K G h v"]
"""The matrix M of every value head."""


def recurrent(x: DeltaTokens, memory: Memory) -> tuple[Float[Array, "B T K G v"], Memory]:
    """Token after token: the rule as it stands above, and what decoding runs.

    Args:
        x: the tokens, those of a document next to each other and in order.
        memory: what came before the first of them.

    Returns:
        what each token reads, and the memory behind the last.
    """

    def token(memory: Memory, x: DeltaTokens) -> tuple[Memory, Array]:
        kept = jnp.where(x.begins[:, None, None], 0, jnp.exp(x.decay))
        memory = kept[..., None, None] * memory
        change = x.strength[..., None] * (x.v - _sum("BKGhv,BKh->BKGv", memory, x.k))
        memory = memory + x.k[:, :, None, :, None] * change[..., None, :]
        return memory, _sum("BKGhv,BKh->BKGv", memory, x.q)

    if x.begins.shape[1] == 1:
        memory, out = token(memory, jax.tree.map(lambda y: y[:, 0], x))
        return out[:, None], memory
    memory, out = jax.lax.scan(token, memory, jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), x))
    return jnp.moveaxis(out, 0, 1), memory


def chunked(x: DeltaTokens, memory: Memory, chunk: int = CHUNK) -> tuple[Float[Array, "B T K G v"], Memory]:
    """`recurrent` by chunks; arguments and results are the same.

    With i and j tokens of a chunk, D_ij = exp(sum of the decays behind j up to i) for j <= i of one document, else 0,
    and e_i = exp(sum of the decays up to i) in the document that the chunk begins in, else 0:

        A = b_i <k_i, k_j> D_ij below the diagonal,     X = (I + A)^-1
        u = X (b v),     w = X (b e k)
        changes = u - w M
        out = e q M + (<q_i, k_j> D_ij) changes
        M <- e_last M + sum_j D_last,j k_j changes_j

    Args:
        chunk: tokens of a chunk, a power of two; fewer where there are fewer tokens.
    """
    T = x.begins.shape[1]
    chunk = min(chunk, 1 << max(T - 1, 0).bit_length())
    parts = _in_chunks(x, chunk)

    def step(memory: Memory, part: _Chunk) -> tuple[Memory, Array]:
        changes = part.u - _sum("BKGih,BKGhv->BKGiv", part.w, memory)
        out = _sum("BKGih,BKGhv->BKGiv", part.q, memory) + _sum("BKGij,BKGjv->BKGiv", part.inner, changes)
        memory = part.kept[..., None, None] * memory + _sum("BKGjh,BKGjv->BKGhv", part.k, changes)
        return memory, out

    memory, out = jax.lax.scan(step, memory, parts)
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # [N,B,K,G,c,v] to [B,N,c,K,G,v]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :T], memory


class _Chunk(NamedTuple):
    """What the walk over chunks needs of each, chunks in front; names as in `chunked`.

    Fields:
        u, w, inner: u, w and <q_i, k_j> D_ij.
        q, k: e q and D_last,j k_j.
        kept: e_last.
    """

    u: Float[Array, "N B K G c v"]
    w: Float[Array, "N B K G c h"]
    inner: Float[Array, "N B K G c c"]
    q: Float[Array, "N B K G c h"]
    k: Float[Array, "N B K G c h"]
    kept: Float[Array, "N B K G"]


def _in_chunks(x: DeltaTokens, chunk: int) -> _Chunk:
    T = x.begins.shape[1]
    count = -(-T // chunk)

    def cut(y: Array) -> Array:
        """[B,T,...] as [N,B,...,c]: tokens last, filled up with zeros."""
        y = jnp.pad(y, ((0, 0), (0, count * chunk - T), *[(0, 0)] * (y.ndim - 2)))
        y = y.reshape(y.shape[0], count, chunk, *y.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(y, 0, 1), 2, -1)

    q, k, v = (jnp.swapaxes(cut(y), -1, -2) for y in (x.q, x.k, x.v))
    decay, strength, begins = cut(x.decay), cut(x.strength), cut(x.begins)
    # Documents that began in the chunk: 0 for tokens of the one that it begins in. The axes K and G come in between.
    document = jnp.cumsum(begins, axis=-1)[:, :, None, None]
    place = jnp.arange(chunk)
    below, together = place[:, None] > place, document[..., :, None] == document[..., None, :]
    # Sums over the tokens between, none of them a difference of two longer ones, which would be rounded.
    upto = (place[:, None] >= place).astype(decay.dtype)
    between = _sum("il,...lj->...ij", upto, jnp.where(below, decay[..., :, None], 0))
    faded = jnp.exp(jnp.where(together & (place[:, None] >= place), between, -jnp.inf))
    since = jnp.where(document == 0, jnp.exp(_sum("il,...l->...i", upto, jnp.where(document == 0, decay, 0))), 0)

    products = _sum("NBKih,NBKjh->NBKij", k, k)[:, :, :, None]
    inverse = unit_inverse(jnp.where(below, strength[..., None] * products * faded, 0))
    wide_q, wide_k = q[:, :, :, None], k[:, :, :, None]
    return _Chunk(
        u=_sum("NBKGij,NBKGjv->NBKGiv", inverse, strength[..., None] * v),
        w=_sum("NBKGij,NBKGjh->NBKGih", inverse, (strength * since)[..., None] * wide_k),
        inner=_sum("NBKih,NBKjh->NBKij", q, k)[:, :, :, None] * faded,
        q=since[..., None] * wide_q,
        k=faded[..., -1, :, None] * wide_k,
        kept=since[..., -1],
    )


@jax.custom_vjp
def unit_inverse(lower: Float[Array, "*axes c c"]) -> Float[Array, "*axes c c"]:
    """(I + lower)^-1 of matrices below the diagonal; c is a power of two.

    By halves: the inverse of [[P, 0], [R, Q]] is [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]. Every number on the way is one of
    the result, so that nothing grows and cancels, as powers of `lower` would.
    """
    c = lower.shape[-1]
    inverse = jnp.ones((*lower.shape[:-2], c, 1, 1), lower.dtype)
    for b in (1 << n for n in range(int(math.log2(c)))):
        pairs = c // (2 * b)
        blocks = lower.reshape(*lower.shape[:-2], pairs, 2 * b, pairs, 2 * b)
        blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        upper, under = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        corner = -_sum("...ij,...jk->...ik", _sum("...ij,...jk->...ik", under, blocks[..., b:, :b]), upper)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, under], axis=-1)], axis=-2)
    return inverse[..., 0, :, :]


def _unit_inverse_forward(lower: Array) -> tuple[Array, Array]:
    inverse = unit_inverse(lower)
    return inverse, inverse


def _unit_inverse_backward(inverse: Array, gradient: Array) -> tuple[Array]:
    back = _sum("...ji,...jk->...ik", inverse, _sum("...ij,...kj->...ik", gradient, inverse))
    return (-jnp.tril(back, -1),)


unit_inverse.defvjp(_unit_inverse_forward, _unit_inverse_backward)


def _sum(letters: str, *arrays: Array) -> Array:
    """A sum of products in full precision: what is kept over thousands of tokens must not be rounded to bfloat16."""
    return jnp.einsum(letters, *arrays, precision=jax.lax.Precision.HIGHEST)

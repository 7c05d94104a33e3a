"""Attention inside windows of the patch order, in memory linear in the number of patches.

Windows are contiguous and hold at most W patches. Cut into chunks of W patches, a window reaches over at most two
neighbouring chunks: each chunk attends to itself and to both neighbours, masked by window numbers.
"""

from __future__ import annotations

import jax.numpy as jnp

from rave_jax.attention import block_diagonal_codes
from rave_jax.kernels import attention as attention_kernels
from rave_jax.kernels.attention import Implementation, MaskCodes
from rave_jax.typing import Array, Float, Int


def chunk_size(P: int, W: int) -> int:
    """Patches in a chunk: W, or all of them when a chunk with its neighbours would be no less."""
    return P if P <= 3 * W else W


def padded_size(P: int, W: int) -> int:
    """P rounded up to whole chunks."""
    chunk = chunk_size(P, W)
    return -(-P // chunk) * chunk


def window_codes(window: Int[Array, "B P"], chunk: int) -> MaskCodes:
    """Mask codes [B P/chunk, chunk] of queries and [B P/chunk, 3 chunk] (or chunk) of keys."""
    keys = _with_neighbours(window, chunk)
    codes = block_diagonal_codes(window.reshape(-1, chunk))
    return codes._replace(order=keys, open_k=jnp.full_like(keys, codes.open_k[0, 0]))


def window_attention(
    q: Float[Array, "B P H h"],
    k: Float[Array, "B P H h"],
    v: Float[Array, "B P H h"],
    codes: MaskCodes,
    chunk: int,
    implementation: Implementation,
) -> Float[Array, "B P H h"]:
    """Attention of each patch to its window; padding gives zeros. P is a multiple of `chunk`."""
    folded = q.reshape(-1, chunk, *q.shape[2:])
    k, v = _with_neighbours(k, chunk), _with_neighbours(v, chunk)
    out, _ = attention_kernels.attention(folded, k, v, codes, scale=q.shape[-1] ** -0.5, implementation=implementation)
    return out.reshape(q.shape)


def _with_neighbours(x: Array, chunk: int) -> Array:
    """[B,P,...] as [B P/chunk, 3 chunk, ...]: each chunk after its left and before its right neighbour, zeros at the
    ends; [B, P, ...] unchanged when there is one chunk."""
    B, P, *rest = x.shape
    if chunk == P:
        return x
    edge = jnp.zeros((B, chunk, *rest), x.dtype)
    padded = jnp.concatenate([edge, x, edge], axis=1)
    parts = [padded[:, n * chunk : n * chunk + P].reshape(B, P // chunk, chunk, *rest) for n in range(3)]
    return jnp.concatenate(parts, axis=2).reshape(-1, 3 * chunk, *rest)

"""The loss: cross-entropy over the vocabulary in chunks, so that no float32 [B,T,V] array exists."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.models.layers import whole_gradient
from rave_jax.typing import Array, Float, Int


class TokenSums(NamedTuple):
    """Float32 sums over tokens; divide by a total weight to get means."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]
    z: Float[Array, ""]
    """Squared log-sum-exp of the logits, weighted; 0 where it was not asked for."""


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    z_loss: bool = False,
) -> TokenSums:
    """Weighted sums of the negative log-likelihood and of right guesses.

    Logits exist for `chunk` tokens of each row at a time, in float32, and are computed again in the backward
    pass unless one chunk takes all. T need not be a multiple of the chunk.

    Args:
        hidden: output of the final norm.
        head: rows of the vocabulary; taken in hidden's dtype, products summed in float32.
        targets: the id that each position predicts.
        weights: weight of each prediction.
        chunk: tokens of a row per chunk.
        z_loss: sum the squares of the log-sum-exp too (section 5 of PaLM, arXiv 2204.02311).
    """
    B, T, _ = hidden.shape
    chunk = min(chunk, T)
    head = head.astype(hidden.dtype)
    whole = T // chunk * chunk

    def of_chunk(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> TokenSums:
        logits = whole_gradient(jnp.einsum("BTD,VD->BTV", hidden, head, preferred_element_type=jnp.float32))
        top = jnp.max(logits, axis=-1)
        shifted = logits - jax.lax.stop_gradient(top)[..., None]
        # A comparison, not a gather: the gradient of a gather is a scatter into a [B,T,V] array of zeros.
        at_target = jax.lax.broadcasted_iota(targets.dtype, shifted.shape, shifted.ndim - 1) == targets[..., None]
        chosen = jnp.sum(jnp.where(at_target, shifted, 0.0), axis=-1)
        # An id that the vocabulary does not have must not pass for a loss: training stops at NaN.
        chosen = jnp.where((targets >= 0) & (targets < logits.shape[-1]), chosen, jnp.nan)
        log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
        loss = log_sum - chosen
        weights = weights.astype(jnp.float32)
        z = jnp.zeros((), jnp.float32)
        if z_loss:
            z = jnp.sum(jnp.square(jax.lax.stop_gradient(top) + log_sum) * weights)
        right = jnp.argmax(logits, axis=-1) == targets
        return TokenSums(jnp.sum(loss * weights), jnp.sum(right * weights), jnp.sum(weights), z)

    if chunk == T:
        # One chunk is what the backward pass would hold anyway: keep its logits.
        return of_chunk(hidden, targets, weights)
    again = jax.checkpoint(of_chunk)

    def body(sums: TokenSums, part: tuple[jax.Array, ...]) -> tuple[TokenSums, None]:
        return jax.tree.map(jnp.add, sums, again(*part)), None

    def split(x: jax.Array) -> jax.Array:
        # Chunks are cut along T so that rows stay on the devices that own them.
        parts = x[:, :whole].reshape(B, whole // chunk, chunk, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(body, TokenSums(zero, zero, zero, zero), tuple(map(split, (hidden, targets, weights))))
    if whole < T:
        sums = jax.tree.map(jnp.add, sums, again(hidden[:, whole:], targets[:, whole:], weights[:, whole:]))
    return sums

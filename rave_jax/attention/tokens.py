"""After a layer: tokens that leave, and what the layers behind it have of those that stay.

Visual tokens alone may leave, those of a prompt. What decides about a picture is the last token of the prompt that
holds it: of its document, the last one before the next answer and its header. So an answer depends on nothing behind
it, and one rule serves training, a prompt that ends a conversation, and one with answers in it. That token and the
first one of a document stay. The released code of FastV and DyVTE reads the last token that is given, the header's.

Whole rows keep their shape: a token that left is hidden from all queries of the layers behind, and goes on as padding.
Beside a cache, tokens that stay are gathered into a shorter chunk, and the layers behind keep entries for them alone
(`short_keys.py`). Positions and mask codes are those of the whole row in both, so both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import Candidates, Mechanism, overrides
from rave_jax.attention.masks import NO_OPEN_K, NO_OPEN_Q
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.attention.base import NOWHERE
from rave_jax.typing import Array, Bool, Float, Int


class Deciding(NamedTuple):
    """Which of the tokens given decides about each of them, by index, and where each stands among the keys. The number
    of tokens stands where nothing decides: that token stays."""

    by: Int[Array, "B T"]
    own: Int[Array, "B T"]


class Standing(NamedTuple):
    """What is left for a layer behind a drop: tokens of a chunk and entries of a row, by their indices among all, in
    order. The number of all stands where there is nothing."""

    tokens: Int[Array, "B W"]
    entries: Int[Array, "B S"]


def deciders(info: TokenInfo) -> Int[Array, "B T"]:
    """For each token that may leave the index of the one that decides about it, T for all others."""
    T = info.document.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)
    last = _next(info.document, 0) != info.document
    answered = (_next(info.role, 0) == Role.RESPONSE) & (info.role != Role.RESPONSE)
    ends = jnp.where(last | answered, index, T)
    by = jax.lax.cummin(ends, axis=1, reverse=True)
    may = (info.kind == Kind.VISUAL) & (info.role != Role.RESPONSE) & (info.document > 0) & (info.offset > 0)
    return jnp.where(may & (by > index), by, T)


def _next(x: Int[Array, "B T"], last: int) -> Int[Array, "B T"]:
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=last)


def of_each_decider[C](by: Int[Array, "B T"], change: Callable[[C, Int[Array, "B 1"]], C], start: C) -> C:
    """Fold over the tokens that decide, one of every row at a time, in order; T where a row has no more. Nothing in it
    may have a gradient."""
    T = by.shape[1]

    def following(before: Array) -> Array:
        return jnp.min(jnp.where(by > before, by, T), axis=1, keepdims=True)

    def body(carry: tuple[Array, C]) -> tuple[Array, C]:
        decider, found = carry
        return following(decider), change(found, decider)

    first = following(jnp.full((by.shape[0], 1), -1, by.dtype))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0] < T), body, (first, start))[1]


def received(rows: Callable[[Int[Array, "B N"]], Float[Array, "B N H S"]], deciding: Deciding) -> Float[Array, "B T"]:
    """The attention that each token gets from the one that decides about it, as a mean over heads; 0 where nothing
    decides.

    Args:
        rows: the attention of some queries over all keys. It may have no gradient.
        deciding: of the tokens.
    """

    def change(found: Array, decider: Array) -> Array:
        mean = jnp.mean(rows(decider)[:, 0], axis=1)
        here = jnp.take_along_axis(mean, deciding.own, axis=1, mode="clip")
        return jnp.where((deciding.by == decider) & (decider < found.shape[1]), here, found)

    return of_each_decider(deciding.by, change, jnp.zeros(deciding.by.shape, jnp.float32))


def kept(mechanisms: Sequence[Mechanism], given: Candidates) -> Bool[Array, "B T"] | None:
    """Which tokens stay behind the layer; None where no mechanism lets one leave."""
    dropping = [mechanism for mechanism in mechanisms if overrides(mechanism, "tokens")]
    if not dropping:
        return None
    given = jax.lax.stop_gradient(given)
    stays = given.by == given.by.shape[1]
    for mechanism in dropping:
        stays |= mechanism.tokens(given)
    return stays


def without(info: TokenInfo, left: Bool[Array, "B T"] | None) -> TokenInfo:
    """The codes with padding in place of tokens that left."""
    return info if left is None else jax.tree.map(lambda code: jnp.where(left, 0, code), info)


def hidden(codes: MaskCodes, left: Bool[Array, "B T"] | None) -> MaskCodes:
    """The codes of whole rows under which tokens that left see none and are seen by none."""
    if left is None:
        return codes
    return jax.tree.map(lambda code, nothing: jnp.where(left, nothing, code), codes, UNSEEN)


NOTHING: list[Any] = [1, 0, NOWHERE, NO_OPEN_Q, NO_OPEN_K]
UNSEEN = MaskCodes(*NOTHING)
"""Codes of what sees nothing and is not seen."""


def compacted(
    tokens: Int[Array, "B W"], stays: Bool[Array, "B W"], total: int
) -> tuple[Int[Array, "B W"], Int[Array, "B W"]]:
    """Tokens that stay, first and in order: which of the present ones each place takes (W: none), and its index among
    the chunk's `total` tokens."""
    W = tokens.shape[1]
    stays = stays & (tokens < total)
    places = jnp.argsort(~stays, axis=1, stable=True).astype(jnp.int32)
    places = jnp.where(jnp.arange(W) < jnp.sum(stays, axis=1, keepdims=True), places, W)
    return places, taken(tokens, places, total)


def taken(x: Array, index: Int[Array, "B N"], nothing: Any = 0) -> Array:
    """x [B,M,...] at `index`, [B,N,...]; `nothing` where that is M or more."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=nothing)


def info_of(info: TokenInfo, index: Int[Array, "B N"]) -> TokenInfo:
    """The token codes at these indices, padding where there is nothing."""
    return jax.tree.map(lambda code: taken(code, index), info)


def codes_of(codes: MaskCodes, standing: Standing) -> MaskCodes:
    """The mask codes of tokens and entries that stand."""
    indices = MaskCodes(standing.tokens, standing.tokens, standing.entries, standing.tokens, standing.entries)
    return jax.tree.map(taken, codes, indices, UNSEEN)


def places_of(tokens: Int[Array, "B W"], total: int) -> Int[Array, "B T"]:
    """Where each of the chunk's `total` tokens stands; W for those that left."""
    B, W = tokens.shape
    rows, places = jnp.arange(B)[:, None], jnp.broadcast_to(jnp.arange(W, dtype=jnp.int32), (B, W))
    return jnp.full((B, total), W, jnp.int32).at[rows, tokens].set(places, mode="drop")

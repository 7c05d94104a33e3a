"""Layers behind a drop: whole rows with tokens hidden, or a shorter chunk beside a cache with fewer entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention import tokens as of_tokens
from rave_jax.attention.base import Candidates, overrides
from rave_jax.attention.short_keys import ShortKeys
from rave_jax.attention.tokens import Deciding, Standing
from rave_jax.batch import TokenInfo
from rave_jax.models.decoder_layer import Asked, Layer, Situation
from rave_jax.models.stack import LayerRun
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Bool, Float, Int

Sizes = tuple[int, ...]
"""Sizes that the tokens of a chunk, or of a row, are gathered into behind a drop, ascending."""
NO_UNIT = 2**30
"""A merge unit that no picture has."""


class Here(NamedTuple):
    """Where a pass beside a cache stands.

    Fields:
        x: hidden states of the tokens that have not left.
        tokens: their indices in the chunk of T, in order, T where there is nothing; None: all of it.
        sizes: for the layers up to the next drop; None: one, that of the cache.
    """

    x: Float[Array, "B W D"]
    tokens: Int[Array, "B W"] | None
    sizes: Sizes | None = None

    def whole(self, total: int) -> Float[Array, "B T D"]:
        """The chunk of `total` tokens, with zeros in place of those that left."""
        return self.x if self.tokens is None else of_tokens.taken(self.x, of_tokens.places_of(self.tokens, total))

    def places(self, wanted: Int[Array, "B N"], total: int) -> Int[Array, "B N"]:
        """Where tokens, by index in the chunk, stand in `x`; beyond it where they left."""
        return wanted if self.tokens is None else _places(self.tokens, wanted, total)


def drops(run: LayerRun[Layer]) -> bool:
    """Do tokens leave behind the run?"""
    return any(overrides(mechanism, "tokens") for mechanism in run.layers.mechanisms)


def deciding(info: TokenInfo, own: Int[Array, "B T"], left: Bool[Array, "B T"] | None) -> Deciding:
    """Which tokens decide about those that have not left."""
    by = of_tokens.deciders(info)
    return Deciding(by if left is None else jnp.where(left, by.shape[1], by), own)


def decided(layer: Layer, x: Float[Array, "B T D"], at: Situation, asked: Asked) -> Asked:
    """What was asked of a layer, with which tokens stay behind it."""
    if at.deciding is None:
        return asked
    given = Candidates(x, asked.received, at.deciding.by, at.info_q)
    return asked._replace(kept=of_tokens.kept(layer.mechanisms, given), received=None)


def with_left(at: Situation, left: Bool[Array, "B T"] | None) -> Situation:
    """Whole rows in which some tokens have left; None: none has."""
    if left is None:
        return at
    info = of_tokens.without(at.info_q, left)
    return at._replace(codes=of_tokens.hidden(at.codes, left), info_q=info, info_k=info)


def left_behind(left: Bool[Array, "B T"] | None, of_run: Asked) -> Bool[Array, "B T"] | None:
    """Which tokens of whole rows have left behind a run."""
    if of_run.kept is None:
        return left
    gone = ~of_run.kept[0]
    return gone if left is None else left | gone


def gathered(here: Here, of_run: Asked, info: TokenInfo, sizes: Sizes | None) -> Here:
    """The tokens of a chunk that stay behind a run."""
    T = info.document.shape[1]
    tokens = here.tokens
    if tokens is None:
        tokens = jnp.where(info.document > 0, jnp.arange(T, dtype=jnp.int32), T)
    if of_run.kept is None:
        return Here(here.x, tokens, sizes)
    width = tokens.shape[1] if sizes is None else min(tokens.shape[1], sizes[-1])
    places, tokens = of_tokens.compacted(tokens, of_run.kept[0], T)
    x = shard(of_tokens.taken(here.x, places[:, :width]), "batch", "length", None)
    return Here(x, tokens[:, :width], sizes)


Through = Callable[[Array, Any, Situation], tuple[Array, Any, Asked]]
"""A layer run on hidden states, beside what it keeps."""


def through_short(
    through: Through, here: Here, kept: ShortKeys, at: Situation, own: Int[Array, "B T"]
) -> tuple[Here, ShortKeys, Asked]:
    """A layer run behind a drop, in the smallest size that holds what stands of every row.

    Args:
        through: the run.
        here: tokens that stand.
        kept: what the run keeps.
        at: of the whole chunk and all entries.
        own: which entry of the row each token of the chunk has.
    """
    assert here.tokens is not None
    T, S, W = own.shape[1], at.info_k.document.shape[1], here.tokens.shape[1]
    short, standing = kept.admit(here.tokens, own, S)
    sizes = (*(size for size in here.sizes or () if size < kept.size), kept.size)

    def at_size(size: int) -> tuple[Array, Any, Asked]:
        width = min(W, size)
        some = Standing(standing.tokens[:, :width], standing.entries[:, :size])
        x, keys, asked = through(here.x[:, :width], kept.keys, _situation(at, some, kept.index[0], T))
        if at.wanted is None:
            x = jnp.pad(x, ((0, 0), (0, W - width), (0, 0)))
        return x, keys, _spread(asked, some, at.queries, T, S, W)

    if len(sizes) == 1:
        x, keys, asked = at_size(sizes[0])
    else:
        real = jnp.any(here.tokens < T, axis=1)
        need = jnp.max(jnp.where(real, short.index[0], 0))
        branch = jnp.sum(need > jnp.array(sizes[:-1], jnp.int32))
        x, keys, asked = jax.lax.switch(branch, [lambda size=size: at_size(size) for size in sizes])
    after = Here(x, None) if at.wanted is not None else here._replace(x=x)
    return after, short._replace(keys=keys), asked


def _situation(at: Situation, standing: Standing, start: Int[Array, "B"], total: int) -> Situation:
    """Of the tokens and entries that stand."""
    tokens, entries = standing

    def places(index: Array | None) -> Array | None:
        return None if index is None else _places(tokens, index, total)

    decides = None
    if at.deciding is not None:
        by = _places(tokens, of_tokens.taken(at.deciding.by, tokens, total), total)
        decides = Deciding(by, start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32))
    return at._replace(
        rotation=jax.tree.map(lambda x: of_tokens.taken(x, tokens), at.rotation),
        codes=of_tokens.codes_of(at.codes, standing),
        info_q=of_tokens.info_of(at.info_q, tokens),
        info_k=of_tokens.info_of(at.info_k, entries),
        entries=start,
        queries=places(at.queries),
        wanted=places(at.wanted),
        unit=None if at.unit is None else of_tokens.taken(at.unit, tokens, NO_UNIT),
        deciding=decides,
    )


def _places(tokens: Int[Array, "B W"], index: Int[Array, "B N"], total: int) -> Int[Array, "B N"]:
    """Where tokens, by index in the chunk, stand; W where they do not."""
    return of_tokens.taken(of_tokens.places_of(tokens, total), index, tokens.shape[1])


def _spread(
    asked: Asked, standing: Standing, queries: Int[Array, "B N"] | None, total: int, entries: int, width: int
) -> Asked:
    """What was asked for, over the whole chunk and all entries."""
    attention, inputs, kept = asked.attention, asked.inputs, asked.kept
    if attention is not None and queries is not None:
        there = _places(standing.tokens, queries, total) < standing.tokens.shape[1]
        at = of_tokens.places_of(standing.entries, entries)[None, :, None, None]
        at = jnp.broadcast_to(at, (*attention.shape[:-1], entries))
        found = jnp.take_along_axis(attention, at, axis=-1, mode="fill", fill_value=0)
        attention = jnp.where(there[:, :, None, None], found, 0.0)
    if inputs is not None:
        places = of_tokens.places_of(standing.tokens, total)
        inputs = jax.vmap(lambda x: of_tokens.taken(x, places))(inputs)
    if kept is not None:
        kept = jnp.pad(kept, ((0, 0), (0, 0), (0, width - kept.shape[2])))
    return asked._replace(attention=attention, inputs=inputs, kept=kept)

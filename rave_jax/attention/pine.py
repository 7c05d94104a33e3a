"""PINE: a prompt's pictures are read in no order; each token ranks them by its own attention.

Source: PINE, arXiv 2407.01100, and its released code, for a prompt of a beginning, N segments of l_n positions, and the
rest. In every layer and head, with P0 the softmax of queries and keys before RoPE over the keys of all other segments:

    stacked    every segment ends where the last one does, at E; the rest begins at E, as ever
    weight     of segment m to segment n: the sum over n's tokens i and m's tokens j of P0_ij, divided by m's tokens;
               of m to a token i of the rest: the sum over j of P0_ij, divided by m's tokens; of n to itself: the
               largest
    positions  seen from there, a segment moves back by the lengths of all segments that have more weight
    mask       a token of a segment sees the other segments whole, its own causally, and the beginning

so the prompt's answer does not depend on the order of its segments. It needs no training.

Our reading for pictures: a segment is a picture or video of the document's first turn with pictures, with the tokens
that wrap it and the text behind it up to the next one. Under M-RoPE a segment's length is the number of positions that
it takes, and all three positions move alike. Segments of equal weight keep their order, the last nearest.

To move keys back by n positions is to move the query forward by n, so each segment's keys are met by a query of its
own, one run of the kernel for each, and the cache keeps keys as they are rotated once, and before RoPE. P0 is one more
run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Mechanism, Score, Views
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.masks import NO_OPEN_K, NO_OPEN_Q
from rave_jax.attention.rotation import moved
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import KeyGroups, MaskCodes
from rave_jax.kernels.attention import attention as run_kernel
from rave_jax.typing import Array, Bool, Float, Int

FAR = jnp.iinfo(jnp.int32).max
"""Beyond every place and position."""


@dataclass(frozen=True)
class Pine(MechanismConfig):
    """The pictures of a prompt are read in no order; each token ranks them by its own attention."""

    pictures: int = 4
    """The most pictures of a prompt that are read so; those behind them are read in their order. Each costs one run of
    the kernel. 1 changes nothing."""
    wrapped: int = 1
    """Tokens before and behind a picture that belong to it: 1 where a model marks its ends, as Qwen's do, 0 else."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all. The source has it in all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.pictures <= 64, "pictures", self.pictures, "a number from 1 to 64")
        require(0 <= self.wrapped <= 64, "wrapped", self.wrapped, "a number of tokens from 0 to 64")

    @property
    def looks_ahead(self) -> bool:
        """Pictures see those behind them."""
        return True

    @property
    def needs_order(self) -> bool:
        """The rest of a prompt ranks its pictures by all of their keys."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if one picture alone is read so."""
        return PineViews(self) if self.pictures > 1 else Mechanism()


class Segments(NamedTuple):
    """The segments of each token's document, N at most.

    Fields:
        own: the segment that a token is in, counted from 1; 0 in none.
        behind: does it stand behind them all?
        number: of each segment, its number in the row; 0 where the document has no such segment.
    """

    own: Int[Array, "B T"]
    behind: Bool[Array, "B T"]
    number: Int[Array, "B T N"]

    @property
    def there(self) -> Bool[Array, "B T N"]:
        """Which segments the document has."""
        return self.number > 0

    @property
    def own_number(self) -> Int[Array, "B T"]:
        """The number in the row of the segment that a token is in; 0 in none."""
        at = jnp.maximum(self.own - 1, 0)[..., None]
        return jnp.where(self.own > 0, jnp.take_along_axis(self.number, at, axis=-1)[..., 0], 0)


def segments_of(info: TokenInfo, info_k: TokenInfo, config: Pine) -> Segments:
    """The segments of these tokens; a picture's number in the row is its segment's.

    Args:
        info: of the tokens.
        info_k: of all tokens of their documents that are there.
        config: how many, and what belongs to one.
    """
    starts, ends, turns, documents = (
        _of_numbers(how, x, info_k.image)
        for how, x in (("min", info_k.offset), ("max", info_k.offset), ("min", info_k.turn), ("max", info_k.document))
    )
    firsts = _of_numbers("min", jnp.where(info_k.image > 0, info_k.image, FAR), info_k.document)
    first = _pick(firsts, info.document)
    number = jnp.minimum(first, FAR - config.pictures)[..., None] + jnp.arange(config.pictures)
    number = jnp.where(number < starts.shape[1], number, 0)
    there = (number > 0) & (_pick(documents, number) == info.document[..., None]) & (info.document > 0)[..., None]
    there &= _pick(turns, number) == _pick(turns, jnp.where(first < starts.shape[1], first, 0))[..., None]
    number, place = jnp.where(there, number, 0), info.offset[..., None]
    start, end = (jnp.where(there, _pick(x, number), other) for x, other in ((starts, FAR), (ends, -1)))
    before = jnp.pad(end[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1)
    begun = jnp.sum(there & (place >= jnp.maximum(start - config.wrapped, before + 1)), axis=-1)
    last = jnp.max(end, axis=-1) + config.wrapped
    inside = (begun > 0) & (info.offset <= last)
    return Segments(jnp.where(inside, begun, 0), jnp.any(there, axis=-1) & (info.offset > last), number)


class PineKeys(NamedTuple):
    """What is kept of a key: itself before RoPE, and its least and greatest position."""

    k0: Float[Array, "B S K h"]
    low: Int[Array, "B S K"]
    high: Int[Array, "B S K"]


class PineViews(Mechanism):
    """Meets the keys of each segment with a query of its own. Without parameters."""

    OWNS = ("positions", "query", "opening")
    NEEDS = ("order", "hi", "factor", "route")

    def __init__(self, config: Pine):
        self.config = config

    def positions(
        self, info_q: TokenInfo, info_k: TokenInfo, own: Int[Array, "B T"], positions: Int[Array, "3 B T"]
    ) -> Int[Array, "3 B T"]:
        """Every segment ends where the last one does."""
        segments = segments_of(info_q, info_k, self.config)
        ends = _of_numbers("max", jnp.max(positions, axis=0), segments.own_number)
        last = jnp.max(jnp.where(segments.there, _pick(ends, segments.number), -FAR), axis=-1)
        return positions + jnp.where(segments.own > 0, last - _pick(ends, segments.own_number), 0)

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """Keys of segments can be opened; `Views` say to whom."""
        inside = segments_of(info_k, info_k, self.config).own > 0
        return codes._replace(open_k=jnp.where(inside, info_k.document, NO_OPEN_K))

    def remember(self, x: Features) -> PineKeys:
        """Keys before RoPE, and where they stand."""
        assert x.rope is not None
        low, high = (
            jnp.broadcast_to(f(x.rope.positions, axis=0)[..., None], x.k.shape[:3]) for f in (jnp.min, jnp.max)
        )
        return PineKeys(x.k0, low, high)

    def score(self, x: Features, remembered: PineKeys, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """One query for each segment, moved by the lengths of those with more weight."""
        assert x.rope is not None
        N = self.config.pictures
        ours, keys = (segments_of(info, info_k, self.config) for info in (info_q, info_k))
        by = jax.lax.stop_gradient(self._moves(x.q0, remembered, ours, keys, info_q, info_k))
        elsewhere = (ours.own > 0) & (info_q.kind != Kind.CONTEXT)
        open_q = [jnp.where(elsewhere & (ours.own != n), info_q.document, NO_OPEN_Q) for n in range(1, N + 1)]
        return Score(
            views=Views(
                KeyGroups(keys.own, N + 1),
                (x.q, *(moved(x.q, by[:, :, n], x.rope) for n in range(N))),
                (jnp.full_like(open_q[0], NO_OPEN_Q), *open_q),
            )
        )

    def _moves(
        self,
        q0: Float[Array, "B T H h"],
        remembered: PineKeys,
        ours: Segments,
        keys: Segments,
        info_q: TokenInfo,
        info_k: TokenInfo,
    ) -> Int[Array, "B T N H"]:
        """How far each segment moves back, seen from each token and head."""
        own_keys = keys.own_number
        low, high = (
            _of_numbers("min", remembered.low[..., 0], own_keys),
            _of_numbers("max", remembered.high[..., 0], own_keys),
        )
        count = _of_numbers("sum", jnp.ones_like(own_keys), own_keys)
        lengths = jnp.where(ours.there, _pick(high, ours.number) + 1 - _pick(low, ours.number), 0)
        weight = self._masses(q0, remembered.k0, ours, keys, info_q, info_k)
        weight = weight / jnp.maximum(_pick(count, ours.number), 1)[..., None]
        if q0.shape[1] > 1:  # a single token has no others to be ranked with
            of_segment = _of_numbers("sum", weight, ours.own_number)
            weight = jnp.where((ours.own > 0)[..., None, None], _pick(of_segment, ours.own_number), weight)
        numbers = jnp.arange(1, self.config.pictures + 1)
        weight = jnp.where((ours.own[..., None] == numbers)[..., None], jnp.inf, weight)
        one, other = weight[:, :, :, None], weight[:, :, None]
        later = (numbers[:, None] > numbers)[..., None]
        above = (one > other) | ((one == other) & later)
        return jnp.sum(jnp.where(above, lengths[:, :, :, None, None], 0), axis=2)

    def _masses(
        self,
        q0: Float[Array, "B T H h"],
        k0: Float[Array, "B S K h"],
        ours: Segments,
        keys: Segments,
        info_q: TokenInfo,
        info_k: TokenInfo,
    ) -> Float[Array, "B T N H"]:
        """The attention before RoPE that each segment gets among all segments but the token's own."""
        nothing = jnp.zeros_like(info_q.offset)
        codes = MaskCodes(
            nothing + 1,
            nothing,
            jnp.zeros_like(info_k.offset),
            jnp.where((ours.own > 0) | ours.behind, info_q.document, NO_OPEN_Q),
            jnp.where(keys.own > 0, info_k.document, NO_OPEN_K),
        )
        groups = KeyGroups(keys.own - 1, self.config.pictures)
        _, lse = run_kernel(q0, k0, k0, codes, scale=q0.shape[-1] ** -0.5, key_groups=groups)
        same = ours.own[..., None] == jnp.arange(1, self.config.pictures + 1)
        lse = jnp.where(same[..., None] | ~ours.there[..., None], -jnp.inf, lse)
        top = jnp.max(lse, axis=2, keepdims=True)
        parts = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
        total = jnp.sum(parts, axis=2, keepdims=True)
        return parts / jnp.where(total > 0, total, 1.0)


REDUCE = {"min": jax.ops.segment_min, "max": jax.ops.segment_max, "sum": jax.ops.segment_sum}


def _of_numbers(how: str, x: Array, number: Int[Array, "B T"]) -> Array:
    """The least, greatest or sum of x [B,T,...] over the tokens of each number [B,T+1,...]."""
    return jax.vmap(lambda x, at: REDUCE[how](x, at, num_segments=number.shape[1] + 1))(x, number)


def _pick(x: Array, number: Int[Array, "B T *n"]) -> Array:
    """x [B,S,...] at each number; those beyond are the last."""
    return jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="clip"))(x, number)

"""Blocks of queries and keys: their sizes, what is known of each from minima and maxima, and which pairs are visited.

A pair of blocks is *live* when some query may see some key, and *full* when every query sees every key; a score term's
switches are *on* in it when some query and some key of it are. A pair may be called live although nothing is seen, and
not full although everything is, but never the other way round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rave_jax.config import require
from rave_jax.kernels.attention.base import NOWHERE, MaskCodes
from rave_jax.typing import Array, Bool, Int

BIG = jnp.iinfo(jnp.int32).max
FACTS = 8
"""Numbers kept of a block. Of queries: lo min, lo max, hi min, hi max, open bits, bits of switches, first and last
live block of keys. Of keys: order min or NOWHERE where not all can be seen, order max, open bits, bits of switches, and
the order min of those that can."""
MOST_PAIRS = 1 << 15
"""Pairs of blocks of all rows, at most, that have a word each: words lie in scalar memory. With more, what is known of
each block is kept, and a pair is compared when it is visited, which takes some 200 cycles instead of 30."""
MOST_APART = 2
"""So many switches have a variant of a kernel's body for each set of them that is on; with more, all terms are taken
where any is on: bodies would double with each."""


@dataclass(frozen=True)
class BlockSizes:
    """Queries and keys in a block of each kernel."""

    forward: tuple[int, int] = (512, 512)
    """(queries, keys) of the forward kernel."""
    backward: tuple[int, int] = (512, 512)
    """(queries, keys) of the backward kernel."""
    key_bytes: int = 48 << 20
    """Memory of the backward kernel for the gradients of keys; rows with more are taken in chunks of keys."""
    query_bytes: int = 4 << 20
    """What q and the output of a block may be in all heads of a kv head: a block of queries is halved down to that."""
    fold_linear: bool = False
    """Put a linear term into further channels of <q, k>: pays where the matrix unit is deeper than a head."""

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            sizes = getattr(self, name)
            require(all(n > 0 and n % 128 == 0 for n in sizes), name, sizes, "multiples of 128")
        for name in ("key_bytes", "query_bytes"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number of bytes")


def block_facts(
    codes: MaskCodes,
    queries_on: Int[Array, "B T"],
    keys_on: Int[Array, "B S"],
    block_q: int,
    block_k: int,
    most_pairs: int = MOST_PAIRS,
) -> tuple[Int[Array, "facts"], ...]:
    """What the kernels know of blocks before they see them: a word for each pair, [B * blocks * blocks], or, of more
    than `most_pairs`, FACTS numbers for each block of queries and of keys, [B * blocks * FACTS].

    Lengths must be multiples of the blocks. Of `queries_on` and `keys_on` bit n says that the n-th switches are on.
    """
    B = codes.lo.shape[0]
    lo, hi, open_q, queries_on = (x.reshape(B, -1, block_q) for x in (codes.lo, codes.hi, codes.open_q, queries_on))
    order, open_k, keys_on = (x.reshape(B, -1, block_k) for x in (codes.order, codes.open_k, keys_on))
    seeing, seen = lo <= hi, order != NOWHERE
    lo_min = jnp.where(seeing, lo, BIG).min(-1)
    hi_max = jnp.where(seeing, hi, NOWHERE).max(-1)
    order_min = jnp.where(seen, order, BIG).min(-1)
    order_max = order.max(-1)
    bits_q, bits_k = _bits(open_q), _bits(open_k)
    live = (lo_min[:, :, None] <= order_max[:, None]) & (order_min[:, None] <= hi_max[:, :, None])
    live |= (bits_q[:, :, None] & bits_k[:, None]) != 0
    # A key out of reach keeps its block from being full.
    all_order_min = jnp.where(seen.all(-1), order_min, NOWHERE)
    lo_max, hi_min, on_q, on_k = lo.max(-1), hi.min(-1), _any(queries_on), _any(keys_on)
    first, last = _ends(live)
    if live.size <= most_pairs:
        full = (lo_max[:, :, None] <= all_order_min[:, None]) & (order_max[:, None] <= hi_min[:, :, None])
        nearest = jnp.clip(jnp.arange(live.shape[-1]), first[:, :, None], last[:, :, None])
        return (_words(live, full, on_q[:, :, None] & on_k[:, None], nearest).reshape(-1),)
    of_q = (lo_min, lo_max, hi_min, hi_max, bits_q, on_q, first, last)
    of_k = (all_order_min, order_max, bits_k, on_k, order_min)
    of_k += (jnp.zeros_like(order_min),) * (FACTS - len(of_k))
    return _flat(of_q), _flat(of_k)


NOT_LIVE, NOT_FULL, ON, NEAREST = 0, 1, 2, 16
"""First bits of a pair's word: is it not live, is it not full, which switches are on, and the nearest block of keys
that its queries need. A word of 0 is a live and full pair without a term."""


def _words(live: Bool[Array, "*n"], full: Bool[Array, "*n"], on: Int[Array, "*n"], nearest: Int[Array, "*n"]) -> Array:
    room = (1 << NEAREST - ON) - 1
    # So many switches are not told apart.
    on = (on & room) | (on & ~room != 0).astype(jnp.int32)
    found = on << ON | nearest.astype(jnp.int32) << NEAREST
    return found | (~live).astype(jnp.int32) << NOT_LIVE | (~full).astype(jnp.int32) << NOT_FULL


def _flat(facts: tuple[Int[Array, "B n"], ...]) -> Int[Array, "facts"]:
    return jnp.stack([x.astype(jnp.int32) for x in facts], -1).reshape(-1)


def _bits(opening: Int[Array, "B n block"]) -> Int[Array, "B n"]:
    """One bit for each opening in the block, of 32: equal openings share a bit, so none is missed."""
    return _any(jnp.left_shift(1, opening & 31))


def _any(bits: Int[Array, "B n block"]) -> Int[Array, "B n"]:
    return jax.lax.reduce(bits, jnp.int32(0), jax.lax.bitwise_or, (2,))


def _ends(live: Bool[Array, "B n m"]) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """First and last live block of each row; 0 and 0 without one."""
    first = jnp.argmax(live, -1)
    last = live.shape[-1] - 1 - jnp.argmax(live[..., ::-1], -1)
    return first, jnp.where(live.any(-1), last, 0)


class Guards(Protocol):
    """Which work a pair of blocks needs; scalars inside a kernel."""

    def live(self) -> Any: ...

    def full(self) -> Any: ...

    def on(self) -> Any:
        """Bits of the switches that are on."""
        ...


class Visit(Protocol):
    """How a grid step finds its guards and blocks."""

    def guards(self, facts: Sequence[Any], b: Any, i: Any, j: Any) -> Guards:
        """Guards of block i of queries and block j of keys in row b."""
        ...

    def key_block(self, facts: Sequence[Any], b: Any, i: Any, j: Any) -> Any:
        """The block of keys that step (i, j) has at hand: j, or the nearest that queries i need, so that a block that
        is skipped is not copied either."""
        ...


@dataclass(frozen=True)
class ByFacts:
    """Guards that read what `block_facts` gives: what runs."""

    num_q: int
    num_k: int

    def guards(self, facts: Sequence[Any], b: Any, i: Any, j: Any) -> Guards:
        if len(facts) == 1:
            return WordGuards(self._word(facts, b, i, j))
        at_q, at_k = (b * self.num_q + i) * FACTS, (b * self.num_k + j) * FACTS
        return FactGuards(*(facts[0][at_q + n] for n in range(6)), *(facts[1][at_k + n] for n in range(5)))

    def key_block(self, facts: Sequence[Any], b: Any, i: Any, j: Any) -> Any:
        if len(facts) == 1:
            return self._word(facts, b, i, j) >> NEAREST
        at = (b * self.num_q + i) * FACTS
        return jnp.clip(j, facts[0][at + 6], facts[0][at + 7])

    def _word(self, facts: Sequence[Any], b: Any, i: Any, j: Any) -> Any:
        return facts[0][(b * self.num_q + i) * self.num_k + j]


@dataclass(frozen=True)
class WordGuards:
    """See `Guards`; of a pair's word."""

    word: Any

    def live(self) -> Any:
        return (self.word & 1 << NOT_LIVE) == 0

    def full(self) -> Any:
        return (self.word & 1 << NOT_FULL) == 0

    def on(self) -> Any:
        return self.word >> ON & (1 << NEAREST - ON) - 1


@dataclass(frozen=True)
class FactGuards:
    """See `Guards`."""

    lo_min: Any
    lo_max: Any
    hi_min: Any
    hi_max: Any
    bits_q: Any
    queries_on: Any
    all_order_min: Any
    order_max: Any
    bits_k: Any
    keys_on: Any
    order_min: Any

    def live(self) -> Any:
        near = (self.lo_min <= self.order_max) & (self.order_min <= self.hi_max)
        return near | ((self.bits_q & self.bits_k) != 0)

    def full(self) -> Any:
        return (self.lo_max <= self.all_order_min) & (self.order_max <= self.hi_min)

    def on(self) -> Any:
        return self.queries_on & self.keys_on


def when_each(guards: Guards, switches: int, body: Callable[[bool, frozenset[int]], None]) -> None:
    """Run `body(masked, on)` in the cheapest of its variants that the pair of blocks admits, or not at all.

    Args:
        guards: of the pair.
        switches: how many the call has.
        body: writes to refs; takes whether the pair is masked, and the switches whose terms it is to take.
    """
    live, full = guards.live(), guards.full()
    bits = guards.on() if switches else None
    for masked in (False, True):
        here = live & (jnp.logical_not(full) if masked else full)
        for on, found in _sets(bits, switches):
            met = here if found is None else here & found
            pl.when(met)(functools.partial(body, masked, on))


def _sets(bits: Any, switches: int) -> Iterator[tuple[frozenset[int], Any]]:
    """Sets of switches that have a variant of their own, and whether just these are on."""
    everything = frozenset(range(switches))
    if not switches:
        yield everything, None
    elif switches == 1 or switches > MOST_APART:
        yield everything, bits != 0
        yield frozenset(), bits == 0
    else:
        for number in reversed(range(1 << switches)):
            yield frozenset(n for n in everything if number >> n & 1), bits == number

"""Work lists: which queries visit which tile of region keys. Plain XLA, integers alone.

Keys that have a region are laid out in tiles of `lanes` keys. A region fills as many whole tiles as it can; what is
left over of it shares a tile with what is left over of its neighbours, so that lanes are filled. Where a region's keys
lie is known from `most_keys`, the most keys a region may have, so shapes and the map of the lanes are static; a smaller
region leaves lanes empty.

Queries are taken in super-blocks. For each super-block and tile there is a list of the queries that may see a key of
it; a kernel takes so many of them at a time, a *work item*. A query's entry carries a bit for each of the tile's
regions that is open to it. What shares a tile is visited by whoever chose any of it: 1 - (1 - p)^n of the queries for n
regions. Where each query head chooses for itself, a query is listed if any of its heads would be; see `heads`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.config import require
from rave_jax.kernels.attention.base import MaskCodes
from rave_jax.kernels.attention.pallas_tpu.tile import LANES
from rave_jax.kernels.routed.base import Choice, Routes
from rave_jax.kernels.routed.pallas_tpu.heads import ENTRY_BITS, HeadWords
from rave_jax.typing import Array, Bool, Int, NpArray

MOST_SHARING = ENTRY_BITS
"""Regions of a tile, at most: an entry has a bit for each."""
PLACE_BITS = 16
TILE_BITS, KIND_BITS = 14, 2
WHOLE, SHARED, CUT = 0, 1, 2
"""What a tile's visit needs: nothing, since every listed query sees every lane; the bits of regions; these and the mask
codes."""
KEY_CODES = {WHOLE: 0, SHARED: 1, CUT: 3}
"""How many of a key's codes a visit reads: the bit of its region, its order, its opening."""
NOBODY = jnp.iinfo(jnp.int32).max


@dataclass(frozen=True)
class Tiling:
    """Where the keys of regions lie."""

    regions: int
    most_keys: int
    """The most keys of a region."""
    lanes: int = LANES
    """Keys of a tile."""

    def __post_init__(self) -> None:
        require(self.regions >= 1, "regions", self.regions, "at least 1")
        require(self.most_keys >= 1, "most_keys", self.most_keys, "at least 1")
        require(self.lanes % LANES == 0 and self.lanes > 0, "lanes", self.lanes, f"a multiple of {LANES}")

    @property
    def full(self) -> int:
        """Tiles that a region has for itself."""
        return self.most_keys // self.lanes

    @property
    def rest(self) -> int:
        """Keys of a region that do not fill a tile."""
        return self.most_keys % self.lanes

    @property
    def sharing(self) -> int:
        """Regions whose rests share a tile; 0 where nothing is left over."""
        return min(MOST_SHARING, self.lanes // self.rest) if self.rest else 0

    @property
    def tiles(self) -> int:
        """All."""
        return self.regions * self.full + (-(-self.regions // self.sharing) if self.rest else 0)

    @property
    def fill(self) -> float:
        """Share of the lanes that hold a key where every region has `most_keys` keys."""
        return self.regions * self.most_keys / (self.tiles * self.lanes)

    def visits(self, share: float) -> float:
        """Lanes that a query visits for each key there is, if it chooses each region with this chance by itself:
        `share` where no lane is empty and none is shared."""
        shared = 0.0 if not self.rest else (1 - (1 - share) ** self.sharing) / self.sharing
        return (share * self.full + shared) * self.lanes / self.most_keys

    def lane_map(self) -> tuple[Int[NpArray, "tiles lanes"], Int[NpArray, "tiles lanes"]]:
        """(region, number of the key in it) of every lane; -1 and 0 where it is empty."""
        region = np.full((self.tiles, self.lanes), -1)
        place = np.zeros((self.tiles, self.lanes), int)
        for r in range(self.regions):
            own = slice(r * self.full, (r + 1) * self.full)
            region[own] = r
            place[own] = np.arange(self.full * self.lanes).reshape(self.full, self.lanes)
            if self.rest:
                tile, first = self.regions * self.full + r // self.sharing, r % self.sharing * self.rest
                region[tile, first : first + self.rest] = r
                place[tile, first : first + self.rest] = self.full * self.lanes + np.arange(self.rest)
        return region, place

    def tile_regions(self) -> Int[NpArray, "tiles n"]:
        """The regions of each tile, by bit; -1 fills up."""
        count = max(self.sharing, 1)
        found = np.full((self.tiles, count), -1)
        for r in range(self.regions):
            found[r * self.full : (r + 1) * self.full, 0] = r
            if self.rest:
                found[self.regions * self.full + r // self.sharing, r % self.sharing] = r
        return found


class Placed(NamedTuple):
    """Keys of regions in their lanes.

    Fields:
        source: the key in each lane; S where it is empty.
        lane: the lane of each key, counted over all tiles; tiles * lanes for a key without one.
        held: is a key in the lane?
        overfull: does a region of the row have more than `most_keys` keys?
    """

    source: Int[Array, "B tiles*lanes"]
    lane: Int[Array, "B S"]
    held: Bool[Array, "B tiles*lanes"]
    overfull: Bool[Array, "B"]


def place(keys: Int[Array, "B S"], tiling: Tiling) -> Placed:
    """Where the keys go, in each region by their order in the row.

    Args:
        keys: region of each key, counted from 1; 0 has none.
        tiling: for as many regions.
    """
    S, R = keys.shape[1], tiling.regions
    region, number = (jnp.asarray(x.reshape(-1)) for x in tiling.lane_map())
    own = jnp.where(keys > 0, keys - 1, R)
    # Neither a sort nor a plain cumulative sum: the compiler takes minutes for one of a long row.
    of_region = own[..., None] == jnp.arange(R + 1)
    count = jnp.sum(of_region, axis=1)
    held = (region >= 0) & (number < count[:, jnp.maximum(region, 0)])
    rank = jnp.sum(jnp.where(of_region, _running(of_region) - 1, 0), axis=2)
    alone = tiling.full * tiling.lanes
    lane = own * alone + rank
    if tiling.rest:
        tile, turn = tiling.regions * tiling.full + own // tiling.sharing, own % tiling.sharing
        lane = jnp.where(rank < alone, lane, tile * tiling.lanes + turn * tiling.rest + rank - alone)
    lane = jnp.where((own < R) & (rank < tiling.most_keys), lane, len(region))
    # Keys without a lane are many, and all drop out behind the last.
    put = jax.vmap(lambda at: jnp.full(len(region), S).at[at].set(jnp.arange(S), mode="drop"))
    return Placed(put(lane), lane, held, jnp.any(count[:, :R] > tiling.most_keys, axis=1))


def _running(x: Bool[Array, "B S n"]) -> Int[Array, "B S n"]:
    """Cumulative counts along S, by a product within blocks of 128."""
    B, S, n = x.shape
    blocks = jnp.pad(x, [(0, 0), (0, -S % LANES), (0, 0)]).reshape(B, -1, LANES, n).astype(jnp.float32)
    up_to = jnp.triu(jnp.ones((LANES, LANES), jnp.float32))
    within = jnp.einsum("Bbsn,st->Bbtn", blocks, up_to)
    before = jnp.cumsum(within[:, :, -1], axis=1) - within[:, :, -1]
    return (within + before[:, :, None]).astype(jnp.int32).reshape(B, -1, n)[:, :S]


def open_pairs(
    choice: Choice, codes: MaskCodes, routes: Routes, openings: Int[Array, "B R"]
) -> Bool[Array, "B K N T R"]:
    """Which routed queries may see a key of which regions: all they chose, and of those that they cannot choose the
    ones that the mask may reach (`openings` as `region_openings` gives them). No pair is missing; one that is listed
    without need is masked key by key."""
    first, last = routes.first[:, None], routes.last[:, None]
    reached = (codes.lo[..., None] <= last) & (first <= codes.hi[..., None])
    bits_q = 1 << (codes.open_q & 31)
    reached |= (bits_q[..., None] & openings[:, None]) != 0
    routed = routes.before > jnp.iinfo(jnp.int32).min
    open_ = choice.chosen | (~choice.candidate & reached[:, None, None])
    return open_ & routed[:, None, None, :, None] & (first <= last)[:, None, None]


def open_heads(pairs: Bool[Array, "B K N T R"]) -> Int[Array, "B K T R"]:
    """`open_pairs` as one number, with a bit for each of the N choices of a query."""
    return jnp.sum(jnp.moveaxis(pairs, 2, -1) * (1 << jnp.arange(pairs.shape[2])), axis=-1, dtype=jnp.int32)


def whole_pairs(codes: MaskCodes, routes: Routes) -> Bool[Array, "B T R"]:
    """Where the mask allows every key of a region to a query."""
    return (codes.lo[..., None] <= routes.first[:, None]) & (routes.last[:, None] <= codes.hi[..., None])


def region_openings(opening: Int[Array, "B S"], keys: Int[Array, "B S"], R: int) -> Int[Array, "B R"]:
    """One bit of 32 for each opening among a region's keys."""

    of_region = (keys[..., None] == jnp.arange(1, R + 1)).astype(jnp.float32)
    of_bit = ((opening & 31)[..., None] == jnp.arange(32)).astype(jnp.float32)
    there = jnp.einsum("BSR,BSb->BRb", of_region, of_bit) > 0
    return jnp.sum(there * (1 << jnp.arange(32)), axis=-1, dtype=jnp.int32)


class Work(NamedTuple):
    """The lists of all super-blocks.

    Fields:
        lists: of each tile the words of its queries' heads, if any: the first word of every query, then the second.
            Then entries: the query's number in the super-block times `rows`, and the bits of its open regions (or of
            its heads, see `HeadWords`) above PLACE_BITS where the tile is not WHOLE. Filled up with the number behind
            the last query's.
        info: of each super-block the number of tiles that somebody visits, then a word for each of them: its number,
            its kind, how many items it has.
    """

    lists: Int[Array, "B K blocks tiles length"]
    info: Int[Array, "B K blocks 1 words"]


def work(
    open_: Int[Array, "B K T R"],
    whole: Bool[Array, "B T R"],
    full: Bool[Array, "B tiles"],
    tiling: Tiling,
    queries: int,
    item: int,
    length: int,
    rows: int,
    heads: HeadWords,
) -> Work:
    """The lists.

    Args:
        open_: of `open_heads`, T a multiple of `queries`.
        whole: of `whole_pairs`.
        full: tiles without an empty lane.
        tiling: of the tiles.
        queries: of a super-block.
        item: queries of a work item.
        length: of a list, at least `queries`.
        rows: that an entry's number is multiplied by, so that it is an address.
        heads: that have bits in `open_`.
    """
    B, K, T, _ = open_.shape
    require(queries * rows < 1 << PLACE_BITS, "queries", queries, f"fewer than {(1 << PLACE_BITS) // rows}")
    blocks, of_tile = T // queries, tiling.tile_regions()
    bits = jnp.zeros((B, K, T, tiling.tiles), jnp.int32)
    cut, uneven = (jnp.zeros((B, K, T, tiling.tiles), bool) for _ in range(2))
    pairs, every = open_ != 0, jnp.sum(1 << jnp.arange(heads.heads), dtype=jnp.int32)
    partial = pairs & ~whole[:, None]
    for bit in range(of_tile.shape[1]):
        there = of_tile[:, bit] >= 0
        at = np.maximum(of_tile[:, bit], 0)
        bits |= jnp.where(pairs[..., at] & there, 1 << bit, 0)
        cut |= partial[..., at] & there
        uneven |= (open_[..., at] != every) & there
    everything = jnp.asarray(sum((of_tile[:, bit] >= 0) << bit for bit in range(of_tile.shape[1])), jnp.int32)
    listed = bits > 0

    def by_tile(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(B, K, blocks, queries, tiling.tiles), 4, 3)

    count = jnp.sum(by_tile(listed), axis=-1)
    shared = jnp.any(by_tile(listed & ((bits != everything) | uneven)), axis=-1) | ~full[:, None, None]
    kind = jnp.where(jnp.any(by_tile(cut), axis=-1), CUT, jnp.where(shared, SHARED, WHOLE))
    words = heads.pack(open_, of_tile) if heads.heads > 1 else None
    carried = words[..., 0] if words is not None and heads.inside else bits
    entry = jnp.arange(queries)[:, None] * rows + jnp.where(
        jnp.repeat(jnp.moveaxis(kind, 3, -1)[..., None, :], queries, axis=3) == WHOLE,
        0,
        carried.reshape(B, K, blocks, queries, tiling.tiles) << PLACE_BITS,
    )
    entry = jnp.where(listed.reshape(entry.shape), entry, NOBODY)
    ranked = jnp.sort(jnp.moveaxis(entry, 4, 3), axis=-1)
    lists = jnp.where(ranked == NOBODY, queries * rows, ranked)
    lists = jnp.pad(lists, [(0, 0)] * 4 + [(0, length - queries)], constant_values=queries * rows)
    if words is not None and heads.count:
        mine = jnp.moveaxis(words.reshape(B, K, blocks, queries, tiling.tiles, -1), 3, 5)
        lists = jnp.concatenate([mine.reshape(B, K, blocks, tiling.tiles, -1), lists], axis=-1)

    # The tiles that somebody visits come first, in their order.
    visited = count > 0
    rank = jnp.sort(jnp.where(visited, jnp.arange(tiling.tiles), tiling.tiles), axis=-1)
    at = jnp.minimum(rank, tiling.tiles - 1)
    items = jnp.take_along_axis(-(-count // item), at, axis=-1)
    words = at | jnp.take_along_axis(kind, at, axis=-1) << TILE_BITS | items << (TILE_BITS + KIND_BITS)
    info = jnp.concatenate([jnp.sum(visited, axis=-1, keepdims=True), words], axis=-1).astype(jnp.int32)
    return Work(lists.astype(jnp.int32), jnp.pad(info, [(0, 0)] * 3 + [(0, -info.shape[-1] % LANES)])[..., None, :])

"""What every cache of keys and values can do: admit tokens, write and attend, take rows out and put them back.

`KvCache` keeps all keys alike, and `RegionCache` those of pictures region by region, where mechanisms ask for regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from rave_jax.attention.attend import AttentionOutput
from rave_jax.attention.base import Features, Keys, Mechanism
from rave_jax.attention.tokens import Deciding
from rave_jax.batch import TokenInfo
from rave_jax.kernels.attention import Implementation, MaskCodes
from rave_jax.typing import Array, Bool, Float, Int

CacheType = Literal["compute", "bfloat16", "int8"]
RegionMemory = Literal["device", "host"]
"""Where keys and values of regions lie."""


class LayerKeys(Protocol):
    """What a cache keeps of the layers of a run: a pytree, every array with the layer axis in front."""

    def attend(
        self,
        x: Features,
        keys: Keys,
        layer: Int[Array, ""],
        entries: Any,
        codes: MaskCodes,
        info_q: TokenInfo,
        info_k: TokenInfo,
        mechanisms: Sequence[Mechanism],
        *,
        regions: int,
        implementation: Implementation,
        queries: Int[Array, "B N"] | None = None,
        progress: Float[Array, ""] | None = None,
        deciding: Deciding | None = None,
    ) -> tuple[AttentionOutput, Any]:
        """What one layer gives before the output projection, and what is kept, with the new tokens in it.

        Args:
            x: features of the tokens.
            keys: the tokens as keys.
            layer: which layer of the run is meant.
            entries: where the tokens go: `Admitted.entries`.
            codes: mask codes of the tokens and of all entries.
            info_q, info_k: token codes of the same.
            mechanisms, implementation: as `attend` takes them.
            regions: R, `Cache.num_regions`.
            queries: tokens, by index, whose attention over the entries of `Cache.codes` is wanted, and their choice.
            progress: of the training run; None is its end.
            deciding: as `attend` takes it; never with regions.
        """
        ...


class Admitted(NamedTuple):
    """A cache with the codes of a chunk's tokens in it, whose keys the layers are about to write.

    Fields:
        cache: the cache.
        entries: where the keys go; what `LayerKeys.attend` takes.
        info: token codes of all entries.
        own: which of these entries each token has.
    """

    cache: Any
    entries: Any
    info: TokenInfo
    own: Int[Array, "B T"]


class Cache(Protocol):
    """The keys of what rows have read, in all layers. A pytree; every method gives a new one."""

    @property
    def index(self) -> Int[Array, "B"]:
        """Each row's next free entry for a token in no region."""
        ...

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens of each row: the offset of the next one in its document."""
        ...

    @property
    def codes(self) -> TokenInfo:
        """Token codes of all entries [B,S], those in no region first: what the attention of queries is over."""
        ...

    @property
    def size(self) -> int:
        """Entries per row for tokens in no region."""
        ...

    @property
    def num_regions(self) -> int:
        """R: the regions that a row has room for; 0 for a cache without."""
        ...

    @property
    def layer_runs(self) -> tuple[Any, ...]:
        """`LayerKeys` of each layer run of the decoder, `StoredStates` of one without keys."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on devices."""
        ...

    @property
    def host_nbytes(self) -> int:
        """Bytes of the arrays in host memory."""
        ...

    def admit(
        self, info: TokenInfo, region_offset: Int[Array, "B T"] | None, empty_summaries: Callable[[int], Sequence[Any]]
    ) -> Admitted:
        """Give the tokens of a chunk their entries.

        Args:
            info: codes of the tokens, padding on the right.
            region_offset: how many tokens of its region stand before each; None where no token is visual.
            empty_summaries: what the router of each run's layers summarises of R regions without a token
                [L,1,R,K,...]; None of runs without keys.
        """
        ...

    def with_layers(self, layer_runs: tuple[Any, ...]) -> Any:
        """The cache with what its layers have written, where the sharding rules want it."""
        ...

    def take(
        self,
        rows: Int[Array, "n"] | None,
        reach: int,
        regions: RegionReach | None = None,
        reaches: Sequence[int] | None = None,
    ) -> Any:
        """A cache of its own with the first `reach` entries of `rows` and the first of their regions; `rows` None takes
        all rows, and all regions. A number beyond the rows takes the last row. Regions of `rows` lie on the device.
        `reaches` are the entries of each layer run, where tokens leave behind a layer; never with regions."""
        ...

    def put(self, part: Any, rows: Int[Array, "n"] | None) -> Any:
        """This cache with the entries that `take` gave written back. Rows numbered beyond it stand last, and are
        dropped."""
        ...

    def emptied(self, rows: Bool[Array, "B"]) -> Any:
        """The cache with nothing in some of its rows: what is left in their entries counts as not written."""
        ...

    def placed(self) -> Any:
        """The cache where the sharding rules want it: rows and kv heads are split, entries and layers are not."""
        ...

    def with_row(self, n: Int[Array, ""], part: Any, rows: Int[Array, "n"]) -> Any:
        """The cache with row n of `part` in its row rows[n], for `put_rows`."""
        ...


class RegionReach(NamedTuple):
    """The first regions of a row: how many, and how many entries they have."""

    regions: int
    entries: int

"""The hooks: what a mechanism may change of attention.

A mechanism is a small nnx module, with or without parameters, that overrides one to three hooks. The defaults change
nothing. What another mechanism of the layer already owns is refused by name when a model is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.rotation import Rope
from rave_jax.batch import TokenInfo
from rave_jax.kernels.attention import KeyGroups, MaskCodes, Term
from rave_jax.kernels.routed import Routing
from rave_jax.typing import Array, Bool, Float, Int

if TYPE_CHECKING:
    from rave_jax.attention.declared import LayeredConfig


class AttentionDims(NamedTuple):
    """Sizes of one attention layer; `hidden_size`, of what enters it, is 0 where nobody said it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int = 0


class Features(NamedTuple):
    """What one layer projects of the tokens it is given. q0 and k0 are q and k before RoPE, after q/k norm where the
    family has one; hidden is the residual stream that enters the layer, before its norm; rope says how q and k were
    rotated (None: they were not)."""

    q: Float[Array, "B T H h"]
    k: Float[Array, "B T K h"]
    v: Float[Array, "B T K h"]
    q0: Float[Array, "B T H h"]
    k0: Float[Array, "B T K h"]
    hidden: Float[Array, "B T D"]
    rope: Rope | None = None


class Keys(NamedTuple):
    """What queries meet: the keys of the tokens given and, with a cache, of those before them.

    `remembered` holds, for each mechanism of the layer in order, what its `remember` hook said of every key; `summary`,
    what the one that routes said of every region (`summarise`).
    """

    k: Float[Array, "B S K h"]
    v: Float[Array, "B S K h"]
    remembered: tuple[Any, ...]
    summary: Any = None


class Channels(NamedTuple):
    """Columns of queries and of keys whose product is added to the score as it is, without the scale of <q, k>."""

    q: Float[Array, "B T H n"]
    k: Float[Array, "B S K n"]


class OtherQuery(NamedTuple):
    """Queries that meet some of the keys in place of the layer's own: there <q, k> is theirs, under the same scale.
    It makes q and k of the kernel twice as wide."""

    q: Float[Array, "B T H h"]
    keys: Bool[Array, "B S"]


class Views(NamedTuple):
    """Each key group is met by a query of its own, one run of the kernel for each, and the softmax is over them all.

    Fields:
        groups: which keys each view is of; every key has to be in one.
        q: the queries of each view, in place of the layer's own, under the same scale.
        open_q: the mask code of each view, in place of the layer's.
    """

    groups: KeyGroups
    q: tuple[Float[Array, "B T H h"], ...]
    open_q: tuple[Int[Array, "B T"], ...]


class Score(NamedTuple):
    """What a mechanism changes of the scores before the softmax. Key biases (float32, finite) and channels of several
    mechanisms add up, and scales, which <q, k> of a query is multiplied by before they are added, multiply; the other
    query, or the views, have one owner. What is hidden from queries belongs in `mask`: where a row sees nothing but
    keys whose bias is far below -1e4, gradients are wrong.

    Score terms add too (`kernels.attention.Term`). Their operands may be of any type, and what has no axis of heads is
    for all heads: query features [B,T], key features [B,S], switches of queries [B,T]. All functions read the same
    `dot`: <q, k> under the row's scale and the other query, with all channels. One mechanism of a layer may read it.
    """

    terms: tuple[Term, ...] = ()
    key_bias: Float[Array, "B S H"] | None = None
    channels: Channels | None = None
    query: OtherQuery | None = None
    views: Views | None = None
    scale: Float[Array, "B T"] | None = None


class KeyFactor(NamedTuple):
    """One key of each query, by its index, and the log of what its weight is multiplied by."""

    key: Int[Array, "B T"]
    log: Float[Array, "H"]


class Parts(NamedTuple):
    """Log-sum-exps of a query's scores over each key group and over all it sees, float32; -inf over none."""

    groups: Float[Array, "B T N H"]
    whole: Float[Array, "B T H"]

    @property
    def mass(self) -> Float[Array, "B T N H"]:
        """The attention that each key group gets, exp(groups - whole); 0 where nothing is seen. Gradients are finite
        everywhere."""
        whole = jnp.where(self.whole == -jnp.inf, 0.0, self.whole)
        return jnp.exp(self.groups - whole[:, :, None])


class Candidates(NamedTuple):
    """Tokens behind a layer, of which some may leave.

    Fields:
        hidden: what the layer gives.
        received: the attention of the layer that each token gets from the one that decides about it, as a mean over
            heads; 0 where nothing decides. None where no mechanism says `RANKS`.
        by: which token decides about each, by index; T for tokens that stay whatever is said.
        info: token codes; padding in place of tokens that left before.
    """

    hidden: Float[Array, "B T D"]
    received: Float[Array, "B T"] | None
    by: Int[Array, "B T"]
    info: TokenInfo


Owned = Literal["positions", "query", "order", "hi", "opening", "factor", "route", "tokens"]
"""What one mechanism of a layer may own: rotary positions; the query that some keys meet instead; of the mask codes the
order of keys, how far up it a query sees, and the opening; the key whose weight is changed after the softmax; which
regions a query reads; which tokens leave. A score term that reads <q, k> has one owner too, which is found in its
function. Any number may close the interval further, add other score terms, key biases and channels, and weigh key
groups."""
Wanted = Literal["terms"]
"""What a mechanism may want others of its layer to add: score terms."""


class Mechanism(nnx.Module):
    """One way to change attention. `positions` and `mask` may not read parameters: they run once for each layer run,
    outside the scan over its layers."""

    OWNS: ClassVar[tuple[Owned, ...]] = ()
    """What no other mechanism of the layer may own."""
    NEEDS: tuple[Owned, ...] = ()
    """What no other mechanism of the layer may own, although this one does not change it."""
    WANTS: tuple[Wanted, ...] = ()
    """What another mechanism of the layer has to add."""
    RANKS: ClassVar[bool] = False
    """Does `tokens` read the attention that tokens get?"""
    SHUTS: ClassVar[tuple[str, ...]] = ()
    """Hooks that no other mechanism of the layer may override."""
    OWN_REGIONS: ClassVar[bool] = False
    """Does it route over regions of its own (`pool`), and not over those of the model's layout (`summarise`)?"""
    declared: LayeredConfig | None = None
    """The config that it was built from; None where it was made by hand."""

    def try_on(self, rows: int, heads: int, tokens: int) -> None:
        """Get ready for a build that tries the hooks on so many rows, heads and tokens, without data."""

    def positions(
        self, info_q: TokenInfo, info_k: TokenInfo, own: Int[Array, "B T"], positions: Int[Array, "3 B T"]
    ) -> Int[Array, "3 B T"]:
        """Other rotary positions of the queries; `own` is where each stands among the keys."""
        return positions

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """Other mask codes. With a cache, `info_k` is 0 in entries that hold nothing yet.

        Mechanisms that own neither `order` nor `hi` are called first, so they get these plain: `order` numbers the
        keys, and `hi` is where the query itself stands among them.
        """
        return codes

    def remember(self, x: Features) -> Any:
        """What `score` will want to know of these tokens as keys: None, or a pytree of arrays [B,T,K,...].

        A cache keeps it beside k and v, so that a key is looked at once, however many queries come after it.
        """
        return None

    def score(self, x: Features, remembered: Any, info_q: TokenInfo, info_k: TokenInfo) -> Score | None:
        """Terms of the score before the softmax. `remembered` is what `remember` gave, for all keys [B,S,K,...]."""
        return None

    def summarise(self, x: Features, region: Int[Array, "B T"], regions: int) -> Any:
        """What `route` will want to know of the R (`regions`) regions that these tokens are in, from these tokens
        alone: a pytree of arrays [B,R,K,...], float32. A cache keeps it for each region."""
        return None

    def pool(self, keys: Keys, own: int, info_k: TokenInfo) -> Any:
        """What `route` will want to know of regions that are the mechanism's own, from all keys; what it remembers of
        them is `keys.remembered[own]`. It is called where `OWN_REGIONS` says so, in place of `summarise`."""
        return None

    def combine(self, old: Any, new: Any) -> Any:
        """What `summarise` says of the tokens of both."""
        return new

    def route(
        self,
        x: Features,
        summary: Any,
        info_q: TokenInfo,
        info_k: TokenInfo,
        codes: MaskCodes,
        regions: int,
        progress: Float[Array, ""] | None,
    ) -> Routing | None:
        """Which regions each query may read, beside the keys of no region.

        Args:
            x: features of the queries.
            summary: of all regions.
            info_q, info_k: of queries and keys.
            codes: mask codes after the `mask` hooks.
            regions: R, the most there can be.
            progress: of the training run, 0 to 1; None outside training, where it has ended.
        """
        return None

    def factor(self, x: Features, info_q: TokenInfo, info_k: TokenInfo) -> KeyFactor | None:
        """One key of each query whose weight is multiplied, as if the log were added to its score. It is done after the
        kernel, from the log-sum-exp, and costs one score for each query and head."""
        return None

    def key_groups(self, x: Features, remembered: Any, info_k: TokenInfo) -> KeyGroups | None:
        """A partition of the keys whose log-sum-exps `merge` or `losses` will read. Every key has to be in one group.

        The kernel runs once for each key group. The hook is called for mechanisms that override `merge`, and in
        training for those that override `losses`; partitions of several mechanisms are refined to the common one.
        """
        return None

    def merge(self, x: Features, parts: Parts, info_q: TokenInfo, info_k: TokenInfo) -> Float[Array, "B T N H"] | None:
        """Logs of what the weights of each of its own key groups are multiplied by, before all are normalised again.

        `parts` is of the scores with all terms, before any `merge`. Factors of several mechanisms multiply.
        """
        return None

    def reweighs(self, info_q: TokenInfo) -> Bool[Array, "B T"]:
        """Which queries have weights that `reweigh` changes; called for mechanisms that override that."""
        return jnp.zeros(info_q.document.shape, bool)

    def reweigh(self, rows: Float[Array, "B N H S"], info_q: TokenInfo, info_k: TokenInfo) -> Float[Array, "B N H S"]:
        """Other attention weights of N rows, float32, of which those count that `reweighs` names; `rows` is after
        everything that changes weights within the kernel or by key groups. It costs O(N S) for each block of queries
        in which a row is changed, so it is for decoding, where that is one row. One mechanism of a layer may."""
        return rows

    def head_gate(self, x: Features, out: Float[Array, "B T H h"], info_q: TokenInfo) -> Float[Array, "#B #T H"] | None:
        """What the outputs of heads are multiplied by before the output projection, float32, for each token or, with
        axes of 1, for all of a row or of all rows. `out` is before any gate; gates of several mechanisms multiply."""
        return None

    def tokens(self, given: Candidates) -> Bool[Array, "B T"]:
        """Which tokens stay behind the layer, in training, prefill and evaluation; nothing of it has a gradient. Only
        visual tokens of a prompt can leave, and all of a prompt's are decided about by its last token (`tokens.py`).
        The config says in `stays` how many there can be."""
        return jnp.ones(given.by.shape, bool)

    def losses(self, x: Features, parts: Parts, info_q: TokenInfo, info_k: TokenInfo) -> dict[str, Float[Array, ""]]:
        """Terms of the training loss by name, weighted already: float32 sums over rows and whatever else they average.

        `parts` is of the attention that the layer applies, after every `merge`. Layers add up, and training divides by
        `loss_weights` of the whole batch, so that a mean is one over all micro-batches, rows and layers.
        """
        return {}

    def loss_weights(self, info: TokenInfo) -> dict[str, Float[Array, ""]]:
        """What one layer contributes to the weights of `losses`, by the same names. It may not read parameters."""
        return {}


def overrides(mechanism: Mechanism, hook: str) -> bool:
    """Does the mechanism override this hook?"""
    return getattr(type(mechanism), hook) is not getattr(Mechanism, hook)

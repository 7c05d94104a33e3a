"""The hook protocol: what a mechanism may say about attention.

A mechanism is a small nnx module, with or without parameters, that overrides one to three hooks. The
defaults say nothing. What another mechanism of the layer already owns is refused by name when a model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from flax import nnx

from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.pair_bias import MaskCodes, PairBias, PairForm
from rave_jax.typing import Array, Float, Int


class AttentionDims(NamedTuple):
    """Sizes of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class Features(NamedTuple):
    """What one layer projects of the tokens it is given. q0 and k0 are q and k before RoPE, after q/k norm where the
    family has one."""

    q: Float[Array, "B T H h"]
    k: Float[Array, "B T K h"]
    v: Float[Array, "B T K h"]
    q0: Float[Array, "B T H h"]
    k0: Float[Array, "B T K h"]


class Keys(NamedTuple):
    """What queries meet: the keys of the tokens given and, with a cache, of those before them.

    `remembered` holds, for each mechanism of the layer in order, what its `remember` hook said of every key.
    """

    k: Float[Array, "B S K h"]
    v: Float[Array, "B S K h"]
    remembered: tuple[Any, ...]


Owned = Literal["positions", "score", "order", "hi", "opening"]
"""What one mechanism of a layer may own: rotary positions; the term before the softmax; of the mask codes the order of
keys, how far up it a query sees, and the opening. Any number may close the interval further."""


class Mechanism(nnx.Module):
    """One way to change attention. `positions` and `mask` may not read parameters: they run once per segment
    of layers, outside the scan over layers."""

    OWNS: ClassVar[tuple[Owned, ...]] = ()
    """What no other mechanism of the layer may own."""
    NEEDS: ClassVar[tuple[Owned, ...]] = ()
    """What no other mechanism of the layer may own, though this one leaves it plain."""
    LOOKS_AHEAD: ClassVar[bool] = False
    """May a token see later ones? Then a prompt has to be read whole."""

    def positions(
        self, info_q: TokenInfo, info_k: TokenInfo, own: Int[Array, "B T"], positions: Int[Array, "3 B T"]
    ) -> Int[Array, "3 B T"]:
        """Other rotary positions of the queries; `own` is where each stands among the keys."""
        return positions

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """Other mask codes. With a cache, `info_k` is 0 in slots that hold nothing yet.

        Those who own nothing of the codes speak first, so that they find them plain: `order` numbers the keys, and
        `hi` is where the query itself stands among them.
        """
        return codes

    def remember(self, x: Features) -> Any:
        """What `score` will want to know of these tokens as keys: None, or a pytree of arrays [B,T,K,...].

        A cache keeps it beside k and v, so that a key is looked at once, however many queries come after it.
        """
        return None

    def score(
        self, x: Features, remembered: Any, info_q: TokenInfo, info_k: TokenInfo
    ) -> tuple[PairBias, PairForm] | None:
        """An additive term before the softmax. `remembered` is what `remember` gave, for all keys [B,S,K,...]."""
        return None


def check_owners(mechanisms: Sequence[Mechanism]) -> None:
    """Refuse two owners of one thing, and an owner of what another needs plain.

    Raises:
        ConfigError: names the thing and the mechanisms.
    """
    names = [type(mechanism).__name__ for mechanism in mechanisms]
    for thing in get_args(Owned):
        owners = [name for name, mechanism in zip(names, mechanisms, strict=True) if thing in mechanism.OWNS]
        if len(owners) > 1:
            raise ConfigError(f"mechanisms {' and '.join(owners)} both own {thing!r}: keep one of them")
        needing = [name for name, mechanism in zip(names, mechanisms, strict=True) if thing in mechanism.NEEDS]
        if owners and needing:
            raise ConfigError(
                f"mechanism {needing[0]} needs {thing!r} plain, but {owners[0]} owns it: keep one of them"
            )

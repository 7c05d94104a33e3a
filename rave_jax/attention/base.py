"""The hook protocol: what a mechanism may say about attention.

A mechanism is a small nnx module, with or without parameters, that overrides one to three hooks. The
defaults say nothing. Hooks that another mechanism already owns are refused by name when a model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Mechanism(nnx.Module):
    """One way to change attention. `positions` and `mask` may not read parameters: they run once per segment
    of layers, outside the scan over layers."""

    EXCLUSIVE = ("positions", "score")

    def positions(self, info: TokenInfo, positions: Int[Array, "3 B T"]) -> Int[Array, "3 B T"]:
        """Other rotary positions."""
        return positions

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """Other mask codes."""
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


def owns(mechanism: Mechanism, hook: str) -> bool:
    """Does this mechanism override the hook?"""
    return getattr(type(mechanism), hook) is not getattr(Mechanism, hook)


def check_owners(mechanisms: Sequence[Mechanism]) -> None:
    """Refuse two owners of one thing.

    Raises:
        ConfigError: names the hook and both mechanisms.
    """
    for hook in Mechanism.EXCLUSIVE:
        owners = [type(m).__name__ for m in mechanisms if owns(m, hook)]
        if len(owners) > 1:
            raise ConfigError(f"mechanisms {' and '.join(owners)} both own the hook {hook!r}: keep one of them")

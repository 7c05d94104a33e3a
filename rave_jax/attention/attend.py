"""One attention, whatever the mechanisms: the hooks in their order, then one kernel call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rave_jax.attention.base import Features, Keys, Mechanism
from rave_jax.attention.probe import attention_rows
from rave_jax.batch import TokenInfo
from rave_jax.kernels import pair_bias
from rave_jax.kernels.pair_bias import Implementation, MaskCodes, PairForm, Terms
from rave_jax.typing import Array, Float, Int


class AttentionOutput(NamedTuple):
    """What `attend` gives: heads' outputs, and the asked-for rows of the attention map (None if not asked)."""

    out: Float[Array, "B T H h"]
    rows: Float[Array, "B N H S"] | None


def positions(
    mechanisms: Sequence[Mechanism],
    info_q: TokenInfo,
    info_k: TokenInfo,
    own: Int[Array, "B T"],
    positions: Int[Array, "3 B T"],
) -> Int[Array, "3 B T"]:
    """Rotary positions after every mechanism's `positions` hook; `own` is where queries stand among the keys."""
    for mechanism in mechanisms:
        positions = mechanism.positions(info_q, info_k, own, positions)
    return positions


def mask_codes(mechanisms: Sequence[Mechanism], info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
    """Mask codes after every mechanism's `mask` hook, whatever the order they are listed in."""
    for mechanism in sorted(mechanisms, key=lambda mechanism: bool(mechanism.OWNS)):
        codes = mechanism.mask(info_q, info_k, codes)
    return codes


def remember(mechanisms: Sequence[Mechanism], x: Features) -> Keys:
    """The tokens of x as keys, with what each mechanism wants kept of them."""
    return Keys(x.k, x.v, tuple(mechanism.remember(x) for mechanism in mechanisms))


def attend(
    x: Features,
    keys: Keys,
    codes: MaskCodes,
    info_q: TokenInfo,
    info_k: TokenInfo,
    mechanisms: Sequence[Mechanism],
    *,
    implementation: Implementation = "auto",
    rows: Int[Array, "B N"] | None = None,
) -> AttentionOutput:
    """Attention of one layer under its mechanisms.

    Args:
        x: projected features of the queries' tokens; q is rotated already.
        keys: all keys that may be seen, rotated, those of the tokens in x among them.
        codes: mask codes after the `mask` hooks.
        info_q, info_k: token codes of the queries and of the keys (the same without a cache).
        mechanisms: of this layer; at most one scores pairs (`check_owners`).
        implementation: kernel backend.
        rows: queries, by index, whose rows of the attention map are wanted. Costs O(N S).

    Returns:
        outputs before the output projection, and the rows.
    """
    bias, form = None, PairForm()
    for mechanism, remembered in zip(mechanisms, keys.remembered, strict=True):
        term = mechanism.score(x, remembered, info_q, info_k)
        if term is not None:
            bias, form = term
    scale = x.q.shape[-1] ** -0.5
    out, lse = pair_bias.attention(x.q, keys.k, keys.v, codes, bias, form, scale=scale, implementation=implementation)
    wanted = None if rows is None else attention_rows(x.q, keys.k, codes, Terms(bias, None), form, scale, lse, rows)
    return AttentionOutput(out, wanted)

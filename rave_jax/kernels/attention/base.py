"""What the operation means: masks as five vectors, the pair bias, and the score of one (query, key) tile.

    score_ij = scale * <q_i, k_j> + bias_ij + key_bias_j
    bias_ij  = f(<u_i, w_j> + row_i + key_j)   where query i and key j are switched on, else 0
    allow_ij = (lo_i <= order_j <= hi_i) or (open_q_i == open_k_j)
    out_i    = sum_j softmax_j(score_ij over allowed j) v_j,   lse_i = log sum_j exp(score_ij)

Rows with no allowed key give out = 0 and lse = -inf, with finite gradients. With key groups, out and lse exist once
for each key group, as if its keys were all there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rave_jax.config import require
from rave_jax.typing import Array, Bool, Float, Int

Implementation = Literal["auto", "reference", "xla", "pallas_tpu"]
Form = Literal["log_gate", "tanh", "linear", "centered_sigmoid"]
FORMS = get_args(Form)
NOWHERE = jnp.iinfo(jnp.int32).min
"""Order of keys that no interval reaches."""
LOG_GATE_FLOOR = -69.0
"""A log gate shuts no further than e^-69, so that a kernel may multiply by it and no row loses all its weight."""


class MaskCodes(NamedTuple):
    """Who may see whom, as data. Rules that hide keys narrow [lo, hi]; one rule may own the opening (-1 and -2 open
    nothing). The least and the largest int32 are no openings."""

    lo: Int[Array, "B T"]
    hi: Int[Array, "B T"]
    order: Int[Array, "B S"]
    open_q: Int[Array, "B T"]
    open_k: Int[Array, "B S"]


class KeyGroups(NamedTuple):
    """A partition of the keys: key j is in group `of[j]`, one of 0 .. count - 1; any other number is in none."""

    of: Int[Array, "B S"]
    count: int


@dataclass(frozen=True)
class PairForm:
    """How the pair's z becomes a bias; f(0) is exactly 0 in every form, so a zero gate changes no bit."""

    kind: Form = "log_gate"
    """log_gate: log(2 sigmoid(z)), a true multiplicative gate of at most 2; tanh: limit * tanh(z / limit);
    linear: z; centered_sigmoid: gain * (2 sigmoid(z) - 1) with a learned gain per head."""
    limit: float = 4.0
    """Bound of the tanh form, in logits."""

    def __post_init__(self) -> None:
        require(self.kind in FORMS, "form", self.kind, f"one of {', '.join(FORMS)}")
        require(0 < self.limit < math.inf, "limit", self.limit, "a positive number of logits")

    def __call__(self, z: Array, gain: Array) -> Array:
        """The bias of z, elementwise in float32; `gain` broadcasts and is read by centered_sigmoid alone."""
        if self.kind == "log_gate":
            return log_gate(z)
        if self.kind == "tanh":
            return self.limit * jnp.tanh(z / self.limit)
        if self.kind == "centered_sigmoid":
            return gain * jnp.tanh(z / 2)
        return z


@jax.custom_jvp
def log_gate(z: Array) -> Array:
    """log(2 sigmoid(z)), exactly 0 at 0 and accurate for all z down to LOG_GATE_FLOOR; its slope is sigmoid(-z).

    2 sigmoid(-|z|) = e^-|z| / (1 + (e^-|z| - 1) / 2), and the sign of z decides whether e^-|z| stays.
    """
    z = jnp.maximum(z, LOG_GATE_FLOOR)
    return jnp.minimum(z, 0.0) - jnp.log1p(0.5 * jnp.expm1(-jnp.abs(z)))


@log_gate.defjvp
def _log_gate_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (z,), (dz,) = primals, tangents
    return log_gate(z), jax.nn.sigmoid(-z) * dz


class PairBias(NamedTuple):
    """Operands of the bias, float32. H query heads share the K heads of w and key as they share keys."""

    u: Float[Array, "B T H r"]
    w: Float[Array, "B S K r"]
    row: Float[Array, "B T H"]
    key: Float[Array, "B S K"]
    gain: Float[Array, "H"]
    query_on: Bool[Array, "B T H"]
    key_on: Bool[Array, "B S"]


class Terms(NamedTuple):
    """What is added to <q, k> before the softmax; None adds nothing."""

    pair: PairBias | None
    per_key: Float[Array, "B S H"] | None

    def __bool__(self) -> bool:
        return self.pair is not None or self.per_key is not None


def group_heads(x: Float[Array, "B T H *rest"], num_kv_heads: int) -> Float[Array, "B K G T *rest"]:
    """Query heads beside the kv head they read: head n belongs to kv head n // G."""
    B, T, H, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, T, num_kv_heads, H // num_kv_heads, *rest), 1, 3)


def ungroup_heads(x: Float[Array, "B K G T *rest"]) -> Float[Array, "B T H *rest"]:
    """The inverse of `group_heads`."""
    B, K, G, T, *rest = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(B, T, K * G, *rest)


def tile_bias(bias: PairBias, form: PairForm) -> Float[Array, "B K G T S"]:
    """The bias of every pair of the operands' queries and keys."""
    K = bias.w.shape[2]
    u = group_heads(bias.u, K)
    z = jnp.einsum("BKGTr,BSKr->BKGTS", u, bias.w, preferred_element_type=jnp.float32)
    z = z + group_heads(bias.row, K)[..., None] + jnp.moveaxis(bias.key, 1, 2)[:, :, None, None, :]
    on = group_heads(bias.query_on, K)[..., None] & bias.key_on[:, None, None, None, :]
    gain = bias.gain.reshape(1, K, -1, 1, 1)
    return jnp.where(on, form(z, gain), 0.0)


def tile_terms(terms: Terms, form: PairForm, num_kv_heads: int) -> Float[Array, "B K G #T S"]:
    """What the terms add to every pair of the operands' queries and keys."""
    total = jnp.zeros((1, 1, 1, 1, 1), jnp.float32)
    if terms.pair is not None:
        total = tile_bias(terms.pair, form)
    if terms.per_key is not None:
        B, S, _H = terms.per_key.shape
        total = total + jnp.moveaxis(terms.per_key, 1, 2).reshape(B, num_kv_heads, -1, 1, S)
    return total


def tile_scores(
    q: Float[Array, "B K G T h"], k: Float[Array, "B S K h"], terms: Terms, form: PairForm, scale: float
) -> Float[Array, "B K G T S"]:
    """Float32 scores of every pair, before the mask."""
    scores = scale * jnp.einsum("BKGTh,BSKh->BKGTS", q, k, preferred_element_type=jnp.float32)
    return scores + tile_terms(terms, form, k.shape[2]) if terms else scores


def tile_allow(codes: MaskCodes) -> Bool[Array, "B 1 1 T S"]:
    """The one mask predicate."""
    order, open_k = codes.order[:, None, :], codes.open_k[:, None, :]
    inside = (codes.lo[..., None] <= order) & (order <= codes.hi[..., None])
    return (inside | (codes.open_q[..., None] == open_k))[:, None, None]


def of_key_group(codes: MaskCodes, key_groups: KeyGroups, number: int) -> MaskCodes:
    """The same codes with the keys of all other key groups out of reach."""
    inside = key_groups.of == number
    # An opening needs a number that no query has: the largest and one more (of -1, none, that is still no key's).
    shut = jnp.max(codes.open_q, axis=1, keepdims=True) + 1
    return codes._replace(order=jnp.where(inside, codes.order, NOWHERE), open_k=jnp.where(inside, codes.open_k, shut))

"""Random operands of the pair-bias attention, by seed, and the masks that tests draw from."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rave_jax.attention.rave_forms import CenteredSigmoid, Form, Linear, LogGate, Tanh, key_side, query_side
from rave_jax.kernels.attention import MaskCodes, Term

FORMS = ("log_gate", "tanh", "linear", "centered_sigmoid")
FLOATS = ("u", "w", "row", "key", "gain")
MASKS = ("random", "packed", "window", "opened", "nobody")


class PairBias(NamedTuple):
    """Operands of RAVE's gate, float32, before they are a score term: of queries and keys, or of one query and keys by
    region, as `gather_attention` takes them."""

    u: Any
    w: Any
    row: Any
    key: Any
    gain: Any
    query_on: Any
    key_on: Any


def form_of(kind: str) -> Form:
    """A form by name; tanh is bounded by 3."""
    return {
        "log_gate": LogGate(),
        "tanh": Tanh(3.0),
        "linear": Linear(),
        "centered_sigmoid": CenteredSigmoid(),
    }[kind]


def term_of(bias: PairBias, kind: str) -> Term:
    """The gate as a score term, as RAVE makes it."""
    form = form_of(kind)
    return Term(
        form,
        u=query_side(form, bias.u, bias.row, key_term=True),
        w=key_side(bias.w, bias.key, row_term=True),
        head={"gain": bias.gain} if kind == "centered_sigmoid" else {},
        query_on=bias.query_on,
        key_on=bias.key_on,
    )


class Dims(NamedTuple):
    """Sizes of one call."""

    B: int
    T: int
    S: int
    K: int
    G: int
    h: int
    c: int
    r: int


def codes_of(B: int, *vectors: np.ndarray) -> MaskCodes:
    """Codes whose rows all are the given vectors, or [B, n] arrays."""
    return MaskCodes(*(jnp.asarray(np.broadcast_to(x, (B, x.shape[-1])), jnp.int32) for x in vectors))


def random_codes(rng: np.random.Generator, B: int, T: int, S: int) -> MaskCodes:
    """Intervals of every kind (some empty) and openings, over keys in a shuffled order."""
    lo = rng.integers(-1, S, (B, T))
    hi = lo + rng.integers(-2, S, (B, T))
    order = np.stack([rng.permutation(S) for _ in range(B)])
    open_q = np.where(rng.random((B, T)) < 0.1, rng.integers(0, 3, (B, T)), -1)
    open_k = np.where(rng.random((B, S)) < 0.1, rng.integers(0, 3, (B, S)), -2)
    return codes_of(B, lo, hi, order, open_q, open_k)


def drawn_codes(rng: np.random.Generator, mask: str, B: int, T: int, S: int, length: int) -> MaskCodes:
    """Codes of a kind, for `length` keys and as many of the last queries; what lies beyond is padding."""
    if mask == "random":
        codes = random_codes(rng, B, T, S)
        return codes._replace(order=jnp.where(jnp.arange(S) < length, codes.order, np.iinfo(np.int32).min))
    # Queries are the last T of the tokens, as they are with a cache.
    place = np.arange(T) + max(S - T, 0)
    cuts = np.sort(rng.integers(0, S, 3))
    start = np.zeros(S, int)
    for cut in cuts:
        start[cut:] = cut
    lo, hi = start[np.minimum(place, S - 1)], place
    if mask == "window":
        lo = np.maximum(lo, place - rng.integers(0, 40))
    real = (place < length) & (mask != "nobody")
    lo = np.where(real, lo, place + 1)
    order = np.where(np.arange(S) < length, np.arange(S), np.iinfo(np.int32).min)
    open_q, open_k = np.full(T, -1), np.full(S, -2)
    if mask == "opened":
        open_q = np.where(rng.random(T) < 0.5, 7, -1)
        open_k[cuts[1] : cuts[2]] = 7
    return codes_of(B, lo, hi, order, open_q, open_k)


def random_operands(rng: np.random.Generator, d: Dims, visual: float, dtype: str = "float32"):
    """(q, k, v, pair bias) of normal numbers, `visual` of the keys and most of the queries switched on."""
    H = d.K * d.G

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    bias = PairBias(
        u=normal(d.B, d.T, H, d.r) * 0.5,
        w=normal(d.B, d.S, d.K, d.r),
        row=normal(d.B, d.T, H),
        key=normal(d.B, d.S, d.K),
        gain=normal(H),
        query_on=jnp.asarray(rng.random((d.B, d.T, H)) < 0.8),
        key_on=jnp.asarray(rng.random((d.B, d.S)) < visual),
    )
    q, k, v = normal(d.B, d.T, H, d.h), normal(d.B, d.S, d.K, d.h), normal(d.B, d.S, d.K, d.c)
    return *(x.astype(dtype) for x in (q, k, v)), bias


def random_key_bias(rng: np.random.Generator, d: Dims):
    """A term for each key and head."""
    return jnp.asarray(rng.normal(size=(d.B, d.S, d.K * d.G)), jnp.float32)


def random_cotangents(rng: np.random.Generator, d: Dims, *leading: int):
    """Of an output and a log-sum-exp of [B, T, *leading, H]."""
    shape = (d.B, d.T, *leading, d.K * d.G)
    return tuple(jnp.asarray(rng.normal(size=(*shape, *last)), jnp.float32) for last in ((d.c,), ()))

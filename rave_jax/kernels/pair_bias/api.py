"""The public function, and which backend serves it."""

from __future__ import annotations

import functools
import logging

import jax.numpy as jnp

from rave_jax.kernels.pair_bias import reference, shards, support, xla
from rave_jax.kernels.pair_bias.base import (
    Implementation,
    KeySegments,
    MaskCodes,
    PairBias,
    PairForm,
    Terms,
    of_segment,
)
from rave_jax.typing import Array, Float

log = logging.getLogger(__name__)
BACKENDS = {"reference": reference.attention, "xla": xla.attention, "pallas_tpu": shards.pallas_tpu}


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    bias: PairBias | None = None,
    form: PairForm = PairForm(),  # noqa: B008  # frozen
    *,
    scale: float,
    key_bias: Float[Array, "B S H"] | None = None,
    segments: KeySegments | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "B T H c"] | Float[Array, "B T N H c"], Float[Array, "B T H"] | Float[Array, "B T N H"]]:
    """Attention under mask codes with optional score terms; semantics in `base`.

    Args:
        q, k, v: H must be a multiple of K; keys and values are never repeated. Values may have a width of their own.
        codes: who may see whom.
        bias: operands of the additive pair bias, or None.
        form: how the pair bias grows from its operands.
        scale: multiplies <q, k>; usually head_dim ** -0.5.
        key_bias: one more term of the score for each key and head, float32 and finite, or None.
        segments: a partition of the keys; output and log-sum-exp are then given for each of its N segments apart.
        implementation: a backend by name, or "auto".

    Returns:
        (output in q's dtype, float32 log-sum-exp; 0 and -inf for rows that may see nothing), both
        differentiable in q, k, v and every float operand of the terms.

    Raises:
        ValueError: operands whose shapes do not belong together, or an implementation that is unknown or cannot serve.
    """
    _check(q, k, v, codes, bias, key_bias, segments)
    run = BACKENDS[choose(implementation, q, k, v)]
    terms = Terms(bias, key_bias)
    if segments is None:
        return run(q, k, v, codes, terms, form, scale)
    # Blocks without a key of the segment are out of reach, and kernels skip those.
    parts = [run(q, k, v, of_segment(codes, segments, n), terms, form, scale) for n in range(segments.count)]
    out, lse = (jnp.stack(part, axis=2) for part in zip(*parts, strict=True))
    return out, lse


def choose(implementation: Implementation, q: Array, k: Array, v: Array) -> str:
    """The backend that will serve.

    Raises:
        ValueError: there is no such backend, or it cannot serve these operands here.
    """
    if implementation == "auto":
        return _automatic(q, k, v)
    if implementation not in BACKENDS:
        raise ValueError(f"attention implementation {implementation!r}, expected auto, {', '.join(BACKENDS)}")
    against = support.against_pallas_tpu(q, k, v) if implementation == "pallas_tpu" else None
    if against is not None:
        raise ValueError(f"attention implementation 'pallas_tpu' cannot serve: {against}; expected auto, or xla")
    return implementation


def _automatic(q: Array, k: Array, v: Array) -> str:
    if support.target().platform != "tpu":
        _say_once("attention: xla (blockwise, any device); the fused kernels are for TPUs")
        return "xla"
    against = support.against_pallas_tpu(q, k, v)
    if against is not None:
        _say_once(f"attention: xla; pallas_tpu cannot serve: {against}")
        return "xla"
    if q.shape[1] * k.shape[1] <= support.SMALL:
        _say_once(f"attention: xla for maps of at most {support.SMALL} pairs, one tile each")
        return "xla"
    _say_once(f"attention: pallas_tpu, with the blocks of {support.target().device_kind}")
    return "pallas_tpu"


@functools.cache
def _say_once(line: str) -> None:
    log.info(line)


def _check(
    q: Array,
    k: Array,
    v: Array,
    codes: MaskCodes,
    bias: PairBias | None,
    key_bias: Array | None,
    segments: KeySegments | None,
) -> None:
    B, T, H, h = q.shape
    S, K = k.shape[1:3]
    Shape = tuple[int, ...]
    expected: dict[str, tuple[Shape, Shape]] = {"k": (k.shape, (B, S, K, h)), "v": (v.shape[:3], (B, S, K))}
    for name in ("lo", "hi", "open_q"):
        expected[f"codes.{name}"] = (getattr(codes, name).shape, (B, T))
    for name in ("order", "open_k"):
        expected[f"codes.{name}"] = (getattr(codes, name).shape, (B, S))
    if bias is not None:
        r = bias.u.shape[-1]
        shapes = ((B, T, H, r), (B, S, K, r), (B, T, H), (B, S, K), (H,), (B, T, H), (B, S))
        expected |= {f"bias.{n}": (x.shape, s) for n, x, s in zip(bias._fields, bias, shapes, strict=True)}
    if key_bias is not None:
        expected["key_bias"] = (key_bias.shape, (B, S, H))
    if segments is not None:
        expected["segments.of"] = (segments.of.shape, (B, S))
    for name, (given, wanted) in expected.items():
        if tuple(given) != wanted:
            raise ValueError(f"attention operand {name} has shape {tuple(given)}, expected {wanted} beside q {q.shape}")
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} kv heads: {H} is not a multiple of {K}")

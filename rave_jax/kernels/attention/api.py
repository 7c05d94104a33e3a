"""The public function, and which backend serves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.kernels import support
from rave_jax.kernels.attention import reference, shards, xla
from rave_jax.kernels.attention.base import (
    NOWHERE,
    Implementation,
    KeyGroups,
    MaskCodes,
    Terms,
    of_key_group,
)
from rave_jax.kernels.attention.checks import TermShapes, check_terms, refuse
from rave_jax.kernels.attention.score import Term
from rave_jax.kernels.dispatch import Backend, Operation
from rave_jax.typing import Array, Float

TYPES = ("float32", "bfloat16", "float16", "float64")
"""Of queries, keys and values. `pallas_tpu` takes the first two."""


def _small(q: Array, k: Array, v: Array) -> str | None:
    few = q.shape[1] * k.shape[1] <= support.SMALL
    return f"maps of at most {support.SMALL} pairs are one tile each" if few else None


OPERATION = Operation(
    "attention",
    {
        "reference": Backend(shards.over_context(reference.attention), "the whole map at once"),
        "xla": Backend(shards.over_context(xla.attention), "blockwise"),
        "pallas_tpu": Backend(shards.pallas_tpu, "tuned blocks", ("tpu",), support.against_pallas_tpu, _small),
    },
)


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Sequence[Term] = (),
    *,
    scale: float,
    key_bias: Float[Array, "B S H"] | None = None,
    key_groups: KeyGroups | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "B T H c"] | Float[Array, "B T N H c"], Float[Array, "B T H"] | Float[Array, "B T N H"]]:
    """Attention under mask codes with optional score terms; semantics in `base`.

    Args:
        q, k, v: of one number type; H must be a multiple of K; keys and values are never repeated. Values may have a
            width of their own. Gradients are made from score - log-sum-exp: where all scores of a row are beyond 10^5
            they lose precision (weights from scores of 10^6 sum to 1.002).
        codes: who may see whom.
        terms: score functions and their operands; their biases add.
        scale: multiplies <q, k>; usually head_dim ** -0.5. A number: kernels are compiled for it.
        key_bias: one more term of the score for each key and head, float32, or None. It is no mask: numbers of many
            thousands take the digits of the score and of the log-sum-exp, from which the gradients are made.
        key_groups: a partition of the keys; output and log-sum-exp are then given for each of its N key groups apart.
        implementation: a backend by name, or "auto".

    Returns:
        (output in q's dtype, float32 log-sum-exp; 0 and -inf for rows that may see nothing), both
        differentiable in q, k, v and every float operand of the terms.

    Raises:
        ValueError: operands whose shapes do not belong together or that have another type, a score function that does
            not give what it should, or an implementation that is unknown or cannot serve.
    """
    terms = tuple(terms)
    _check(q, k, v, codes, terms, scale, key_bias, key_groups)
    codes = codes._replace(lo=jnp.maximum(codes.lo, NOWHERE + 1))
    label = f"attention, {q.shape[1]} x {k.shape[1]} tokens, heads of {q.shape[-1]}"
    run = OPERATION.backends[OPERATION.choose(implementation, q, k, v, label=label)].run
    added = Terms(terms, key_bias)
    if key_groups is None:
        return run(q, k, v, codes, added, scale)
    # Blocks without a key of the group are out of reach, and kernels skip those.
    parts = [run(q, k, v, of_key_group(codes, key_groups, n), added, scale) for n in range(key_groups.count)]
    out, lse = (jnp.stack(part, axis=2) for part in zip(*parts, strict=True))
    return out, lse


def _check(
    q: Array,
    k: Array,
    v: Array,
    codes: MaskCodes,
    terms: tuple[Term, ...],
    scale: float,
    key_bias: Array | None,
    key_groups: KeyGroups | None,
) -> None:
    wanted: tuple[tuple[str, Any, type], ...] = (
        ("codes", codes, MaskCodes),
        ("key_groups", key_groups, KeyGroups),
        *((f"terms[{n}]", term, Term) for n, term in enumerate(terms)),
    )
    for name, x, kind in wanted:
        if not isinstance(x, kind) and not (x is None and name == "key_groups"):
            raise ValueError(f"attention operand {name} is of type {type(x).__name__}, expected {kind.__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.size == 0:
            axes = "[batch, tokens, heads, width], none of them 0"
            raise ValueError(f"attention operand {name} has shape {x.shape}, expected {axes}")
        if x.dtype not in TYPES or x.dtype != q.dtype:
            expected = f"{q.dtype} as q" if q.dtype in TYPES else ", ".join(TYPES)
            raise ValueError(f"attention operand {name} is {x.dtype}, expected {expected}")
    if isinstance(scale, jax.Array) or not isinstance(scale, Real) or not math.isfinite(scale):
        given = "an array" if isinstance(scale, jax.Array) else repr(scale)
        raise ValueError(f"attention has {given} as its scale, expected a number")
    if key_groups is not None and not (isinstance(key_groups.count, int) and key_groups.count >= 1):
        raise ValueError(f"attention has {key_groups.count} key groups, expected at least 1")
    _check_operands(q, k, v, codes, key_bias, key_groups)
    (B, T, H), (S, K) = q.shape[:3], k.shape[1:3]
    check_terms("attention", terms, TermShapes((B, T, H), (B, S, K), (B, S), H), f"beside q {q.shape}")


def _check_operands(
    q: Array, k: Array, v: Array, codes: MaskCodes, key_bias: Array | None, key_groups: KeyGroups | None
) -> None:
    B, T, H, h = q.shape
    S, K = k.shape[1:3]
    Shape = tuple[int, ...]
    expected: dict[str, tuple[Array, Shape, str]] = {"k": (k, (B, S, K, h), f"{k.dtype}")}
    expected["v"] = (v, (B, S, K, v.shape[-1]), f"{v.dtype}")
    for name in ("lo", "hi", "open_q"):
        expected[f"codes.{name}"] = (getattr(codes, name), (B, T), "int32")
    for name in ("order", "open_k"):
        expected[f"codes.{name}"] = (getattr(codes, name), (B, S), "int32")
    if key_bias is not None:
        expected["key_bias"] = (key_bias, (B, S, H), "float32")
    if key_groups is not None:
        expected["key_groups.of"] = (key_groups.of, (B, S), "int32")
    refuse("attention", expected, f"beside q {q.shape}")
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} kv heads: {H} is not a multiple of {K}")

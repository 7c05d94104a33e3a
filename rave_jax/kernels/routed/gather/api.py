"""The public function, and which backend serves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from rave_jax.kernels.attention import Implementation
from rave_jax.kernels.attention.checks import TermShapes, check_terms
from rave_jax.kernels.attention.score import Term
from rave_jax.kernels.dispatch import Backend, Operation
from rave_jax.kernels.routed.gather import pallas_gpu, pallas_tpu, reference, xla
from rave_jax.kernels.routed.gather.base import Operands, Stack, union
from rave_jax.typing import Array, Bool, Float

OPERATION = Operation(
    "attention to chosen regions",
    {
        "reference": Backend(reference.attention, "every entry of every region"),
        "xla": Backend(xla.attention, "a loop over the chosen regions"),
        "pallas_tpu": Backend(pallas_tpu.attention, "chosen regions alone", ("tpu",), pallas_tpu.against),
        "pallas_gpu": Backend(pallas_gpu.attention, "chosen regions alone", ("gpu",), pallas_gpu.against),
    },
)


def gather_attention(
    q: Float[Array, "B H h"],
    k: Float[Array, "B K R m h"] | Stack,
    v: Float[Array, "B K R m c"] | Stack,
    real: Bool[Array, "B R m"],
    chosen: Bool[Array, "B K N R"],
    most: int,
    terms: Sequence[Term] = (),
    *,
    scale: float,
    implementation: Implementation | Literal["pallas_gpu"] = "auto",
) -> tuple[Float[Array, "B H c"], Float[Array, "B H"]]:
    """Attention of one query a row over the regions that it chose; semantics in `base`.

    Regions that were not chosen are not read (the oracle aside). It is for decoding and has no gradient: its loops
    over as many regions as were chosen cannot be differentiated backwards, and jax says so.

    Args:
        q: the new token's query heads; H must be a multiple of K.
        k, v: keys and values by region, m entries each; values may have a width of their own. Of a stack of layers,
            int8 perhaps, one is read, in q's dtype, and only its chosen regions.
        real: entries that hold a key. The others must hold finite numbers.
        chosen: the regions of each query head (N = G, H/K) or of each kv head with all that read it (N = 1).
        most: no head, or group, chooses more regions than this. A number: shapes come from it.
        terms: score functions and their operands: what belongs to the query is [B,H,...], to keys [B,K,R,m,...], and
            switches of keys are [B,R,m].
        scale: multiplies <q, k>. A number: kernels are compiled for it.
        implementation: a backend by name, or "auto".

    Returns:
        (output in q's dtype, float32 log-sum-exp): 0 and -inf where nothing is open, NaN in both where more than
        `most` regions are chosen, or by all heads of a kv head more than `most` for each.

    Raises:
        ValueError: operands whose shapes do not belong together or that have another type, or an implementation that is
            unknown or cannot serve.
    """
    k, v = (x if isinstance(x, Stack) else Stack(x[None], None, jnp.int32(0)) for x in (k, v))
    terms = tuple(terms)
    _check(q, k, v, real, chosen, most, terms)
    (B, H, h), K = q.shape, k.shape[1]
    operands = Operands(q.reshape(B, K, H // K, h), k, v, real, chosen, terms)
    out, lse = OPERATION.backends[OPERATION.choose(implementation, operands, most)].run(operands, most, scale)
    # Heads of a kv head share a list. It has room for `most` regions of each of them and no more.
    listed = jnp.sum(union(chosen), axis=-1) <= chosen.shape[2] * most
    kept = (jnp.sum(chosen, axis=-1) <= most) & listed[..., None]
    out, lse = jnp.where(kept[..., None], out, jnp.nan), jnp.where(kept, lse, jnp.nan)
    return out.reshape(B, H, -1).astype(q.dtype), lse.reshape(B, H)


def _check(q: Array, k: Stack, v: Stack, real: Array, chosen: Array, most: int, terms: tuple[Term, ...]) -> None:
    for name, x, axes in (("q", q, 3), ("k", k, 5), ("v", v, 5), ("chosen", chosen, 4)):
        if len(x.shape) != axes or 0 in x.shape:
            raise ValueError(f"gather_attention operand {name} has shape {x.shape}, expected {axes} axes, none empty")
    (B, H, h), (K, R, m) = q.shape, k.shape[1:4]
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} kv heads: {H} is not a multiple of {K}")
    if not isinstance(most, int) or not 1 <= most <= R:
        raise ValueError(f"gather_attention has most = {most!r}, expected a number of regions from 1 to {R}")
    N, G = chosen.shape[2], H // K
    if N not in (1, G):
        raise ValueError(f"gather_attention operand chosen has {N} choices for each kv head, expected 1 or {G}")
    expected: dict[str, tuple[Array | Stack, tuple[int, ...]]] = {
        "k": (k, (B, K, R, m, h)),
        "v": (v, (B, K, R, m, v.shape[-1])),
        "real": (real, (B, R, m)),
        "chosen": (chosen, (B, K, N, R)),
    }
    types = {"real": (real, "bool"), "chosen": (chosen, "bool")}
    for name, x in (("k.scale", k), ("v.scale", v)):
        if x.scale is not None:
            expected[name] = (x.scale, x.values.shape[:-1])
            types[name.replace("scale", "values")] = (x.values, "int8")
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(
                f"gather_attention operand {name} has shape {x.shape}, expected {shape} beside q {q.shape}"
            )
    for name, (x, dtype) in types.items():
        if x.dtype != dtype:
            raise ValueError(f"gather_attention operand {name} is {x.dtype}, expected {dtype}")
    for name, x in (("q", q), ("k", k.values), ("v", v.values)):
        scaled = name != "q" and f"{name}.scale" in expected
        if not scaled and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"gather_attention operand {name} is {x.dtype}, expected floats")
    shapes = TermShapes((B, H), (B, K, R, m), (B, R, m), H)
    check_terms("gather_attention", terms, shapes, f"beside q {q.shape}")

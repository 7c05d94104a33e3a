"""The public functions, and which backend serves them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from rave_jax.kernels import support
from rave_jax.kernels.attention import Implementation, KeyGroups, MaskCodes
from rave_jax.kernels.attention.base import NOWHERE, Terms, of_key_group
from rave_jax.kernels.attention.checks import TermShapes, check_terms
from rave_jax.kernels.attention.score import Term
from rave_jax.kernels.dispatch import Backend, Operation
from rave_jax.kernels.routed import pallas_tpu, shards, xla
from rave_jax.kernels.routed.base import Routes, Routing
from rave_jax.typing import Array, Float


def _against_pallas_tpu(
    q: Array, k: Array, v: Array, terms: Terms, key_groups: KeyGroups | None, routing: Routing
) -> str | None:
    regions, sizes = routing.routes.first.shape[1], pallas_tpu.item_sizes(support.target().device_kind)
    return pallas_tpu.against(q, k, v, terms, key_groups, routing.rule, regions, routing.most_keys, sizes)


def _pallas_tpu(
    q: Array, k: Array, v: Array, codes: MaskCodes, terms: Terms, scale: float, routing: Routing
) -> tuple[Array, Array]:
    assert routing.most_keys is not None  # `against` refuses it
    return pallas_tpu.attention(q, k, v, codes, terms, scale, routing.routes, routing.rule, routing.most_keys)


OPERATION = Operation(
    "routed attention",
    {
        "reference": Backend(shards.over_context(xla.whole), "all queries at once"),
        "xla": Backend(
            shards.over_context(xla.attention), "computes every score and masks regions that were not chosen"
        ),
        "pallas_tpu": Backend(
            _pallas_tpu, "queries are gathered for each tile of regions", ("tpu",), _against_pallas_tpu
        ),
    },
)


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Sequence[Term] = (),
    *,
    routing: Routing,
    scale: float,
    key_bias: Float[Array, "B S H"] | None = None,
    key_groups: KeyGroups | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "B T H c"] | Float[Array, "B T N H c"], Float[Array, "B T H"] | Float[Array, "B T N H"]]:
    """Attention over the keys that the mask allows and the query's choice of regions leaves open; see `base`.

    Args:
        q, k, v, codes, terms, scale, key_bias, key_groups: as in `kernels.attention.attention`.
        routing: what the choice is made from, and how.
        implementation: "xla" goes through blocks of queries, "reference" takes all at once, and both make every score;
            "pallas_tpu" skips what was not chosen, and serves hard choices by descriptors. "auto" takes it on a TPU
            where it can serve.

    Returns:
        output and log-sum-exp, as `kernels.attention.attention` gives them. Gradients reach every float operand of the
        attention, and the routes under a soft choice alone.

    Raises:
        ValueError: operands whose shapes do not belong together, or an implementation that cannot serve.
    """
    routes, rule, _ = routing
    _check(q, k, codes, routes)
    (B, T, H), (S, K) = q.shape[:3], k.shape[1:3]
    check_terms("routed attention", terms, TermShapes((B, T, H), (B, S, K), (B, S), H), f"beside q {q.shape}")
    if bool(routes.bias) != rule.with_bias:
        given = "a bias" if routes.bias else "no bias"
        raise ValueError(f"routed attention has {given} to rank by beside a rule of with_bias = {rule.with_bias}")
    codes = codes._replace(lo=jnp.maximum(codes.lo, NOWHERE + 1))
    added = Terms(tuple(terms), key_bias)
    run = OPERATION.backends[OPERATION.choose(implementation, q, k, v, added, key_groups, routing)].run
    if key_groups is None:
        return run(q, k, v, codes, added, scale, routing)
    numbers = range(key_groups.count)
    parts = [run(q, k, v, of_key_group(codes, key_groups, n), added, scale, routing) for n in numbers]
    out, lse = (jnp.stack(part, axis=2) for part in zip(*parts, strict=True))
    return out, lse


def _check(q: Array, k: Array, codes: MaskCodes, routes: Routes) -> None:
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    R, c = routes.descriptor.shape[1], routes.descriptor.shape[-1]
    wanted = {
        "query": (B, T, H, c),
        "descriptor": (B, R, K, c),
        "first": (B, R),
        "last": (B, R),
        "before": (B, T),
        "keys": (B, S),
    }
    for name, shape in wanted.items():
        given = tuple(getattr(routes, name).shape)
        if given != shape:
            raise ValueError(f"routed attention operand {name} has shape {given}, expected {shape} beside q {q.shape}")
    for name, shape in {"codes.lo": codes.lo.shape == (B, T), "codes.order": codes.order.shape == (B, S)}.items():
        if not shape:
            raise ValueError(f"routed attention operand {name} does not belong to q {q.shape} and k {k.shape}")

"""Routed attention on a mesh: each device takes its rows, its kv heads, and under context parallelism its queries.

As in `kernels.attention.shards`, keys and what belongs to them come split like queries and are gathered on the device.
Regions are whole everywhere: every query may choose any of them. Kv heads that the mesh does not divide are replicated,
with their query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from rave_jax.kernels.attention.base import MaskCodes, Terms
from rave_jax.kernels.attention.score import Term
from rave_jax.kernels.attention.shards import place_of_codes, tokens_of, whole_keys
from rave_jax.kernels.routed.base import Routes, Routing
from rave_jax.parallel.sharding import current_mesh, partition_spec
from rave_jax.typing import Array, Float

Run = Callable[[Array, Array, Array, MaskCodes, Terms, Routes], tuple[Array, Array]]


def over_context(run: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """A backend that the compiler can split, with its queries and keys split over the mesh axis `context`."""

    def attention(
        q: Array, k: Array, v: Array, codes: MaskCodes, terms: Terms, scale: float, routing: Routing
    ) -> tuple[Array, Array]:
        if not tokens_of(q.shape[1]):
            return run(q, k, v, codes, terms, scale, routing)

        def of_routes(q: Array, k: Array, v: Array, codes: MaskCodes, terms: Terms, routes: Routes) -> Any:
            return run(q, k, v, codes, terms, scale, routing._replace(routes=routes))

        return split(of_routes, q, k, v, codes, terms, routing.routes)

    return attention


def split(
    run: Run,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Terms,
    routes: Routes,
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """`run` of each device's part, over the current mesh, which is one of several devices."""
    mesh = current_mesh()
    assert mesh is not None
    rows, heads = partition_spec(("batch", "kv_heads"), (q.shape[0], k.shape[2]), mesh)
    tokens, keys = tokens_of(q.shape[1]), tokens_of(k.shape[1])
    row: Any = PartitionSpec(rows)
    of_queries: Any = PartitionSpec(rows, tokens, heads)
    of_keys: Any = PartitionSpec(rows, keys, heads)
    of_regions: Any = PartitionSpec(rows, None, heads)
    of_head: Any = PartitionSpec(heads)
    dense: Any = None if routes.dense is None else PartitionSpec()

    def of_terms(parts: tuple[Term, ...], others: Any, on: Any) -> Any:
        """The same of score terms: specs in the place of arrays, `others` and `on` of what is not queries'."""
        return tuple(
            jax.tree.map(lambda _: others, term)
            .map_queries(lambda _: of_queries)
            .replace(head=dict.fromkeys(term.head, of_head), key_on=None if term.key_on is None else on)
            for term in parts
        )

    def on_device(q: Array, k: Array, v: Array, codes: MaskCodes, terms: Terms, routes: Routes) -> Any:
        k, v, terms = whole_keys(k, keys), whole_keys(v, keys), terms.map_keys(lambda x: whole_keys(x, keys))
        return run(q, k, v, codes, terms, routes)

    on: Any = PartitionSpec(rows, keys)
    added = Terms(of_terms(terms.parts, of_keys, on), None if terms.per_key is None else of_keys)
    before: Any = PartitionSpec(rows, tokens)
    specs = Routes(of_queries, of_regions, row, row, before, row, dense, of_terms(routes.bias, of_regions, row))
    run_split = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(of_queries, of_keys, of_keys, place_of_codes(rows, tokens), added, specs),
        out_specs=(of_queries, of_queries),
        check_vma=False,  # kernels do not say how their outputs vary
    )
    return run_split(q, k, v, codes, terms, routes)

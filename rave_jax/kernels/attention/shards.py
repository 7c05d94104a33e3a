"""The Pallas kernels on a mesh: each device takes its rows and its heads.

The compiler cannot split a kernel by itself, so this file states the split: rows as `batch`, query heads as `heads`, kv
heads as `kv_heads` of the sharding rules. Where the mesh splits query heads finer than there are kv heads, a device
takes the one kv head that its queries read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from rave_jax.kernels import support
from rave_jax.kernels.attention import pallas_tpu as kernels
from rave_jax.kernels.attention.base import MaskCodes, Term, Terms
from rave_jax.kernels.attention.tuning import block_sizes
from rave_jax.parallel.sharding import current_mesh, names_of, partition_spec
from rave_jax.typing import Array, Float


def pallas_tpu(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Terms,
    scale: float,
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """The Pallas TPU kernels, over the current mesh where there is one; see `api.attention`."""
    blocks, interpret = block_sizes(support.target().device_kind), support.interpreter()

    def run(q: Array, k: Array, v: Array, codes: MaskCodes, terms: Terms) -> tuple[Array, Array]:
        return kernels.attention(q, k, v, codes, terms, scale, blocks=blocks, interpret=interpret)

    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return run(q, k, v, codes, terms)
    B, H, K = q.shape[0], q.shape[2], k.shape[2]
    rows, heads, kv_heads = partition_spec(("batch", "heads", "kv_heads"), (B, H, K), mesh)
    ways = 1 if heads is None else math.prod(mesh.shape[name] for name in names_of(heads))
    one_kv_head = heads is not None and kv_heads is None and ways % K == 0
    if kv_heads is None and not one_kv_head:
        heads = None  # a device's queries would read parts of several kv heads

    def on_device(q: Array, k: Array, v: Array, codes: MaskCodes, terms: Terms) -> tuple[Array, Array]:
        if one_kv_head:
            assert heads is not None
            own = jax.lax.axis_index(names_of(heads)) * K // ways

            def cut(x: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, own, 1, axis=2)

            k, v = cut(k), cut(v)
            terms = terms._replace(parts=tuple(_with_kv_heads(term, cut) for term in terms.parts))
        return run(q, k, v, codes, terms)

    # Specs stand in the trees of the operands, in the place of arrays.
    row: Any = PartitionSpec(rows)
    of_heads: Any = PartitionSpec(rows, None, heads)
    of_kv: Any = PartitionSpec(rows, None, kv_heads)
    of_head: Any = PartitionSpec(heads)
    parts = tuple(
        _with_kv_heads(term.map_queries(lambda _: of_heads), lambda _: of_kv).replace(
            head=dict.fromkeys(term.head, of_head), key_on=None if term.key_on is None else row
        )
        for term in terms.parts
    )
    specs = Terms(parts, None if terms.per_key is None else of_heads)
    split = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(of_heads, of_kv, of_kv, MaskCodes(*(row,) * len(codes)), specs),
        out_specs=(of_heads, of_heads),
        check_vma=False,  # kernels do not say how their outputs vary
    )
    return split(q, k, v, codes, terms)


def _with_kv_heads(term: Term, change: Callable[[Array], Any]) -> Term:
    """The same with every array changed that has kv heads."""
    w = None if term.w is None else change(term.w)
    return term.replace(w=w, key={name: change(x) for name, x in term.key.items()})

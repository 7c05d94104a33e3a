"""Attention on a mesh: each device takes its rows, its heads, and under context parallelism its queries.

The compiler cannot split a Pallas kernel by itself, nor see that queries may be split and keys may not, so this file
states the split: rows as `batch`, query heads as `heads`, kv heads as `kv_heads` and tokens as `length` of the sharding
rules. Where the mesh splits query heads finer than there are kv heads, a device takes the one kv head that its queries
read. Keys, values and what else belongs to keys come split like queries; a device gathers them before it runs the
kernel, and sends each other device its part of their gradients behind it.
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

    return run(q, k, v, codes, terms) if _alone() else _split(run, q, k, v, codes, terms)


def over_context(run: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """A backend that the compiler can split, with its queries and keys split over the mesh axis `context`."""

    def attention(q: Array, k: Array, v: Array, codes: MaskCodes, terms: Terms, scale: float) -> tuple[Array, Array]:
        if not tokens_of(q.shape[1]):
            return run(q, k, v, codes, terms, scale)
        return _split(lambda *operands: run(*operands, scale), q, k, v, codes, terms)

    return attention


def tokens_of(count: int) -> str | tuple[str, ...] | None:
    """Mesh axes that so many tokens of a row are split over, as an entry of a PartitionSpec; None: over none."""
    mesh = current_mesh()
    return None if mesh is None else partition_spec(("length",), (count,), mesh)[0]


def whole_keys(x: Array, axes: str | tuple[str, ...] | None) -> Array:
    """All keys of what a device has a part of [B,S,...]; inside `jax.shard_map`."""
    return x if axes is None else jax.lax.all_gather(x, axes, axis=1, tiled=True)


def place_of_codes(rows: Any, tokens: Any) -> Any:
    """Where mask codes go: those of queries with them, those of keys whole; specs in the place of arrays."""
    of_queries: Any = PartitionSpec(rows, tokens)
    of_keys: Any = PartitionSpec(rows)
    return MaskCodes(of_queries, of_queries, of_keys, of_queries, of_keys)


def _alone() -> bool:
    mesh = current_mesh()
    return mesh is None or mesh.size == 1


def _split(
    run: Callable[[Array, Array, Array, MaskCodes, Terms], tuple[Array, Array]],
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Terms,
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """`run` of each device's part, over the current mesh."""
    mesh = current_mesh()
    assert mesh is not None
    B, H, K = q.shape[0], q.shape[2], k.shape[2]
    rows, heads, kv_heads = partition_spec(("batch", "heads", "kv_heads"), (B, H, K), mesh)
    tokens, keys = tokens_of(q.shape[1]), tokens_of(k.shape[1])
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
        k, v, terms = whole_keys(k, keys), whole_keys(v, keys), terms.map_keys(lambda x: whole_keys(x, keys))
        return run(q, k, v, codes, terms)

    # Specs stand in the trees of the operands, in the place of arrays.
    of_heads: Any = PartitionSpec(rows, tokens, heads)
    of_kv: Any = PartitionSpec(rows, keys, kv_heads)
    of_head: Any = PartitionSpec(heads)
    key_on: Any = PartitionSpec(rows, keys)
    per_key: Any = None if terms.per_key is None else PartitionSpec(rows, keys, heads)
    parts = tuple(
        _with_kv_heads(term.map_queries(lambda _: of_heads), lambda _: of_kv).replace(
            head=dict.fromkeys(term.head, of_head),
            key_on=None if term.key_on is None else key_on,
        )
        for term in terms.parts
    )
    specs = Terms(parts, per_key)
    split = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(of_heads, of_kv, of_kv, place_of_codes(rows, tokens), specs),
        out_specs=(of_heads, of_heads),
        check_vma=False,  # kernels do not say how their outputs vary
    )
    return split(q, k, v, codes, terms)


def _with_kv_heads(term: Term, change: Callable[[Array], Any]) -> Term:
    """The same with every array changed that has kv heads."""
    w = None if term.w is None else change(term.w)
    return term.replace(w=w, key={name: change(x) for name, x in term.key.items()})

"""A kernel for chosen regions on a mesh: the compiler cannot split one by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from rave_jax.kernels.routed.gather.base import Operands, Stack
from rave_jax.parallel.sharding import current_mesh, partition_spec
from rave_jax.typing import Array


def split(on_device: Callable[[Operands], tuple[Array, Array]], operands: Operands) -> tuple[Array, Array]:
    """`on_device` of each device's rows and kv heads: output [B,K,G,c] and log-sum-exp [B,K,G]. Kv heads that the mesh
    does not divide are replicated."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return on_device(operands)
    rows, heads = partition_spec(("batch", "kv_heads"), operands.q.shape[:2], mesh)
    both: Any = PartitionSpec(rows, heads)
    of_rows: Any = PartitionSpec(rows)
    of_heads: Any = PartitionSpec(heads)
    everywhere: Any = PartitionSpec()
    of_layers: Any = PartitionSpec(None, rows, heads)
    k, v = (Stack(of_layers, None if x.scale is None else of_layers, everywhere) for x in (operands.k, operands.v))
    terms = tuple(
        jax.tree.map(lambda _: both, term).replace(
            head=dict.fromkeys(term.head, of_heads), key_on=None if term.key_on is None else of_rows
        )
        for term in operands.terms
    )
    specs: Any = Operands(both, k, v, of_rows, both, terms)
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(both, both),
        check_vma=False,  # kernels do not say how their outputs vary
    )
    return run(operands)

"""Token embeddings: rows of a table that the mesh splits by vocabulary and width."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from rave_jax.models.initial import normal
from rave_jax.models.layers import Adapter
from rave_jax.parallel.exchange import MeshAxes, gathered, summed_onto_shard
from rave_jax.parallel.sharding import current_mesh, names_of, partition_spec
from rave_jax.typing import Array, Float, Int

AXES = ("vocab", "embed")


class Embedding(nnx.Module):
    """A table [V, D]; also the output head when a model ties the two. An adapter changes the embedding of tokens alone:
    up [V,r] is a table too, and down [r,D] makes rows of it as wide as those of this one."""

    def __init__(self, vocab_size: int, width: int, *, dtype: jnp.dtype, key: jax.Array):
        table = normal(key, (vocab_size, width), 0.02, dtype)
        self.weight = nnx.Param(table, axes=AXES)
        self.adapter: Adapter | None = nnx.data(None)

    def adapt(self, rank: int, scale: float, dtype: jnp.dtype, key: jax.Array) -> None:
        """Add an adapter."""
        V, D = self.weight.shape
        self.adapter = Adapter((V,), (D,), AXES, rank=rank, scale=scale, dtype=dtype, key=key)

    def __call__(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Rows of the table in this number type."""
        rows = _rows(self.weight[...], tokens, dtype)
        return rows if self.adapter is None else rows + self.adapter.times(_rows(self.adapter.up[...], tokens, dtype))


def _rows(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return table[tokens].astype(dtype)
    return _of_mesh(table, tokens, jnp.dtype(dtype))


class Split(NamedTuple):
    """How the mesh splits the table and the tokens."""

    mesh: Mesh | AbstractMesh
    table: PartitionSpec
    tokens: PartitionSpec

    @classmethod
    def over(cls, mesh: Mesh | AbstractMesh, table: tuple[int, ...], tokens: tuple[int, ...]) -> Split:
        """That of arrays of these shapes."""
        return cls(mesh, partition_spec(AXES, table, mesh), partition_spec(("batch", "length"), tokens, mesh))

    @property
    def vocab(self) -> MeshAxes:
        """Mesh axes that split the rows of the table."""
        return names_of(self.table[0])

    @property
    def embed(self) -> MeshAxes:
        """Mesh axes that split its width."""
        return names_of(self.table[1])

    @property
    def embedded(self) -> PartitionSpec:
        """Of embedded tokens."""
        return PartitionSpec(*self.tokens, None)

    def rows(self, vocab: int) -> int:
        """Rows of the table that a device has, of `vocab`."""
        return vocab // math.prod(self.mesh.shape[axis] for axis in self.vocab)

    def own(self, tokens: Int[Array, "B T"], rows: int) -> Int[Array, "B T"]:
        """Of a device that has `rows` rows of the table: which of them the tokens are, and `rows` for all others."""
        if not self.vocab:
            return tokens
        tokens = tokens - jax.lax.axis_index(self.vocab) * rows
        return jnp.where((tokens >= 0) & (tokens < rows), tokens, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _of_mesh(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """`table[tokens]`, on a mesh.

    Where there are many tokens, each device gathers the width of its part of the table and looks up its own tokens.
    Left to itself the compiler has each device look up the tokens of all devices in the columns that it has, which
    takes as long as the whole batch takes one device. Where there are few, as in decoding, that moves less.

    The gradient is added up on each device from its own tokens, in float32, and sent to the shards of the table once.
    """
    mesh = current_mesh()
    assert mesh is not None
    split = Split.over(mesh, table.shape, tokens.shape)
    if tokens.size <= split.rows(len(table)):
        return table[tokens].astype(dtype)

    def on_device(table: Array, tokens: Array) -> Array:
        table = gathered(table.astype(dtype), 1, split.embed)
        if not split.vocab:
            return table[tokens]
        rows = jnp.take(table, split.own(tokens, len(table)), axis=0, mode="fill", fill_value=0)
        return jax.lax.psum(rows, split.vocab)

    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(split.table, split.tokens), out_specs=split.embedded, check_vma=False
    )
    return run(table, tokens)


def _forward(table: Array, tokens: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    # The table for its shape and number type; no number of it is kept.
    return _of_mesh(table, tokens, dtype), (tokens, table)


def _backward(dtype: jnp.dtype, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    tokens, table = kept
    mesh = current_mesh()
    assert mesh is not None
    split = Split.over(mesh, table.shape, tokens.shape)
    parts = [name for entry in split.tokens for name in names_of(entry)]

    def on_device(tokens: Array, gradient: Array) -> Array:
        rows = split.rows(table.shape[0])
        total = jnp.zeros((rows, table.shape[1]), jnp.float32)
        total = total.at[split.own(tokens, rows)].add(gradient.astype(jnp.float32), mode="drop")
        return summed_onto_shard(total, 1, split.embed, parts)

    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(split.tokens, split.embedded), out_specs=split.table, check_vma=False
    )
    return run(tokens, gradient).astype(table.dtype), None


_of_mesh.defvjp(_forward, _backward)

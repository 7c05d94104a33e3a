"""What a cache keeps of layers without keys: a state of one size, however many tokens came before."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.parallel.sharding import Axes, shard
from rave_jax.typing import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredStates:
    """States of all layers of a run.

    A row's state is that of its last token. The layers let a document's first token find nothing, so what is left in a
    row by the one before it is never read, as in entries of keys.
    """

    states: Any
    """A pytree of arrays [L,B,...]."""
    axes: tuple[Axes, ...] = field(metadata={"static": True})
    """Logical axes of each array behind these two, in the order of the tree's leaves."""

    def of_layer(self, layer: Int[Array, ""]) -> Any:
        """The states of one layer [B,...]."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self.states)

    def with_layer(self, layer: Int[Array, ""], states: Any) -> StoredStates:
        """The states with those of one layer replaced."""

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), layer, 0)

        return replace(self, states=jax.tree.map(put, self.states, states))

    def emptied(self, rows: Bool[Array, "B"]) -> StoredStates:
        """The states as they are: a document's first token finds nothing."""
        return self

    def taken(self, rows: Int[Array, "n"] | None, reach: int) -> StoredStates:
        """The states of some rows (for numbers beyond them, of the last), or of all: whole whatever the reach."""
        if rows is None:
            return self
        return replace(self, states=jax.tree.map(lambda x: x.at[:, rows].get(mode="clip"), self.states))

    def placed(self) -> StoredStates:
        """The states where the sharding rules want them."""
        leaves, structure = jax.tree.flatten(self.states)
        placed = [shard(x, "layers", "batch", *axes) for x, axes in zip(leaves, self.axes, strict=True)]
        return replace(self, states=jax.tree.unflatten(structure, placed))

    def empty(self) -> StoredStates:
        """Zeros in the place of what may be shapes alone."""
        return replace(self, states=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.states))

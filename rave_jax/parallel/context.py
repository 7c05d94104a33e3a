"""Context parallelism: the tokens of each row, split over the mesh axis `context`.

Arrays of a row's tokens lie split in the order of the row, a stretch of it on each device. Under a causal mask the
queries of the last stretch would meet as many keys as those of all others together, so queries are dealt out anew: the
row is cut into 2n pieces for n devices, and device i takes the pieces i and 2n - 1 - i, which makes all shares of the
causal map equal. Keys stay in the order of the row.

Source of the cut: Llama 3 (arXiv 2407.21783), section 3.3.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from rave_jax.config import require
from rave_jax.parallel.sharding import current_mesh
from rave_jax.typing import Array, Float, Int, NpArray

AXIS = "context"


def ways() -> int:
    """Into how many parts the current mesh splits the tokens of a row; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[AXIS]


def check_tokens(tokens: int, parts: int, field: str) -> None:
    """Refuse rows that cannot be dealt out to so many devices.

    Raises:
        ConfigError: names the field that says how many tokens a row has.
    """
    fits = parts == 1 or tokens % (2 * parts) == 0
    require(fits, field, tokens, f"a multiple of {2 * parts}: two pieces of a row for each of mesh.context {parts}")


def dealt_order(tokens: int, parts: int) -> Int[NpArray, "T"]:
    """Which token of the row stands at each place once queries are dealt out to `parts` devices."""
    pieces = np.arange(tokens, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([pieces[[n, 2 * parts - 1 - n]].reshape(-1) for n in range(parts)])


def dealt(x: Array, axis: int = 1) -> Array:
    """What belongs to each token, small enough to lie whole on every device, in the order of `dealt_order`."""
    parts = ways()
    if parts == 1:
        return x
    pieces = jnp.split(x, 2 * parts, axis)
    return jnp.concatenate([pieces[p] for n in range(parts) for p in (n, 2 * parts - 1 - n)], axis)


def deal(x: Float[Array, "B T *rest"]) -> Float[Array, "B T *rest"]:
    """The tokens of rows, from the order of the row to `dealt_order`: each device sends its two halves."""
    return _exchanged(x, True)


def gather_in(x: Float[Array, "B T *rest"]) -> Float[Array, "B T *rest"]:
    """The inverse of `deal`."""
    return _exchanged(x, False)


def _exchanged(x: Array, dealing: bool) -> Array:
    mesh, parts = current_mesh(), ways()
    if mesh is None or parts == 1:
        return x
    # Piece p lies first on device p // 2, in half p % 2, and is dealt to `owner[p]`, who holds its even piece in the
    # half `p % 2` of what is below: an even and an odd piece each.
    owner = [min(p, 2 * parts - 1 - p) for p in range(2 * parts)]
    routes = [[(p // 2, owner[p]) for p in range(half, 2 * parts, 2)] for half in (0, 1)]

    def on_device(x: Array) -> Array:
        own = jax.lax.axis_index(AXIS)
        halves = jnp.split(x, 2, axis=1)
        # The first piece of device i is piece i: the even one of the two where i is even.
        odd = own % 2 == 1
        if dealing:
            even_piece, odd_piece = (jax.lax.ppermute(y, AXIS, way) for y, way in zip(halves, routes, strict=True))
            halves = jnp.where(odd, odd_piece, even_piece), jnp.where(odd, even_piece, odd_piece)
        else:
            pieces = jnp.where(odd, halves[1], halves[0]), jnp.where(odd, halves[0], halves[1])
            back = [[(to, source) for source, to in way] for way in routes]
            halves = tuple(jax.lax.ppermute(y, AXIS, way) for y, way in zip(pieces, back, strict=True))
        return jnp.concatenate(halves, axis=1)

    # The other axes of the mesh stay the compiler's: nothing moves over them.
    place = PartitionSpec(None, AXIS)
    split = jax.shard_map(on_device, mesh=mesh, in_specs=place, out_specs=place, axis_names={AXIS}, check_vma=False)
    return split(x)

"""Which regions queries choose by chance: the share of the places that small regions at the edge of a picture get.

Keys and queries are random, so every region should be chosen as often as any other. A picture of 12 x 13 tokens has, in
regions of 6 x 6, four of 36 tokens and two of 6: a third. No model is trained, and nothing is timed.

    python benchmarks/ragged_regions.py
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.attention.gaze import descriptors
from rave_jax.layout import FixedRegions

GRID, REGIONS, HEAD_DIM, QUERIES, PICTURES = (1, 12, 13), FixedRegions(6, 6), 128, 64, 400


def share_of_small(common: float, normalise: bool) -> list[float]:
    """Share of the first place, and of the first two, of all queries that regions of 6 tokens get.

    Args:
        common: how large the part is that all keys share, beside a random part of size 1.
        normalise: is `Gaze.normalise` "keys"?
    """
    rng = np.random.default_rng(0)
    frame, row, col = (x.ravel() for x in np.indices(GRID))
    _, down, across = REGIONS.coordinates((frame, row, col), GRID)
    region = 1 + down * REGIONS.shape(GRID)[2] + across
    R = int(region.max())
    small = np.bincount(region)[1:] < REGIONS.tokens
    of_pictures = jnp.asarray(np.tile(region, (PICTURES, 1)), jnp.int32)
    keys = rng.normal(size=(PICTURES, len(region), 1, HEAD_DIM))
    keys = jnp.asarray(keys + common * rng.normal(size=(PICTURES, 1, 1, HEAD_DIM)), jnp.float32)
    queries = rng.normal(size=(PICTURES, QUERIES, HEAD_DIM)).astype(np.float32)
    summary = descriptors.summarise("mean", keys, None, of_pictures, R)
    place = jnp.zeros((PICTURES, R), jnp.int32)
    found = descriptors.describe("mean", summary, (PICTURES, R, 1, HEAD_DIM), place)
    if normalise:
        found = descriptors.evened(found, summary, jnp.broadcast_to(jnp.arange(R) == 0, place.shape), REGIONS.tokens)
    scores = np.einsum("btc,brc->btr", queries, np.asarray(found[:, :, 0]))
    ranked = small[np.argsort(-scores, axis=-1)]
    return [float(ranked[..., :places].mean()) for places in (1, 2)]


def main() -> None:
    """Print the table."""
    jax.config.update("jax_platforms", "cpu")
    print("regions of 6 tokens are a third of all; their share of the first place and of the first two")
    print("part that all keys share | normalise | first | first two")
    for common, normalise in itertools.product((0.0, 3.0), (False, True)):
        first, two = share_of_small(common, normalise)
        print(f"{common} | {'keys' if normalise else 'none'} | {first:.1%} | {two:.1%}")


if __name__ == "__main__":
    main()

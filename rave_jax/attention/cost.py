"""What one layer reads of pictures: the types in which a mechanism states its cost (`MechanismConfig.reading`)."""

from __future__ import annotations

from typing import NamedTuple

from rave_jax.typing import Bool, Float, Int, NpArray


class PicturesBefore(NamedTuple):
    """What stands of pictures before each of N text queries of a row.

    Fields:
        visual: visual tokens.
        sizes: tokens of each of R regions.
        candidates: which regions stand whole before the query.
    """

    visual: Int[NpArray, "N"]
    sizes: Int[NpArray, "R"]
    candidates: Bool[NpArray, "N R"]


class LayerReading(NamedTuple):
    """One layer's part for each query.

    Fields:
        mean: visual entries that it reads; an entry is the key and value of one token.
        most: the most of them that any choice reads.
        routing: FLOPs of the choice.
        bytes: read from the cache, padding counted.
    """

    mean: Float[NpArray, "N"]
    most: Int[NpArray, "N"]
    routing: Float[NpArray, "N"]
    bytes: Float[NpArray, "N"]

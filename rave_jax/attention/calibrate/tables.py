"""Tables of chosen heads as what configs name: heads, and the layers that have these."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rave_jax.typing import Bool, NpArray


def heads_and_layers(chosen: Bool[NpArray, "L H"]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The chosen heads of a layer and all layers with the same, in the order of the first of them. Layers without a
    chosen head are left out."""
    layers_of: dict[tuple[int, ...], list[int]] = {}
    for layer, row in enumerate(chosen):
        if row.any():
            layers_of.setdefault(tuple(int(n) for n in np.flatnonzero(row)), []).append(layer)
    for heads, layers in layers_of.items():
        yield heads, tuple(layers)

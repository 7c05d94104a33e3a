"""What a layer with Gaze reads of pictures. Formulas and what is left out: `evaluation/accounting.py`."""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.attention.base import AttentionDims
from rave_jax.attention.cost import LayerReading, PicturesBefore
from rave_jax.attention.gaze import descriptors
from rave_jax.attention.gaze.descriptors import DescriptorName
from rave_jax.kernels.routed import RouteRule
from rave_jax.layout import Regions


class RoutesRegions(Protocol):
    """A config of a mechanism whose queries choose regions of the layout."""

    @property
    def regions(self) -> Regions:
        """How visual tokens are grouped."""
        ...

    @property
    def rule(self) -> RouteRule:
        """How a query chooses."""
        ...

    @property
    def share(self) -> str:
        """Who has a choice of its own: "head" or "group"."""
        ...

    @property
    def descriptor(self) -> DescriptorName:
        """What ranks a region."""
        ...

    @property
    def skips_keys(self) -> bool:
        """Does a decoding step read the chosen regions alone?"""
        ...


def reading(gaze: RoutesRegions, pictures: PicturesBefore, dims: AttentionDims, number_bytes: int) -> LayerReading:
    """The reading of each query in one layer.

    Args:
        gaze: the config.
        pictures: what stands before the queries.
        dims: of the layer.
        number_bytes: of a number in the cache.
    """
    H, K, h, _ = dims
    visual, sizes, candidates = pictures
    found = candidates.sum(1)
    # Tokens of regions that are no candidates stay under the plain mask; behind whole pictures there are none.
    held = candidates @ sizes
    count = np.array([gaze.rule.most(int(n)) for n in found])
    mean = visual - held + count * held / np.maximum(found, 1)
    largest = -np.sort(-(candidates * sizes), axis=1)
    taken = np.arange(largest.shape[1]) < count[:, None]
    most = visual - held + (largest * taken).sum(1)
    width = descriptor_width(gaze, h)
    routing = 2 * H * width * found if gaze.rule.by == "descriptor" else 2 * H * h * held
    union = np.minimum(count * (H // K), found) if gaze.share == "head" else count
    keys = union * gaze.regions.tokens + visual - held if gaze.skips_keys else visual
    read = 2 * h * number_bytes * K * keys + 4 * width * K * found
    return LayerReading(mean, most, routing, read)


def descriptor_width(gaze: RoutesRegions, h: int) -> int:
    """c: numbers in a descriptor."""
    q = jax.ShapeDtypeStruct((1, 1, 1, h), jnp.float32)
    place = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(functools.partial(descriptors.features, gaze.descriptor), q, place).shape[-1]

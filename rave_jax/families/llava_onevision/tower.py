"""The vision tower of LLaVA-OneVision: the learned row that ends a line of a picture beside the tiles' units."""

from __future__ import annotations

import jax
from flax import nnx

from rave_jax.batch import Patches
from rave_jax.families.llava_onevision.config import AnyresConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.initial import normal
from rave_jax.models.tower import mixed_units
from rave_jax.models.vit import VitTower
from rave_jax.typing import Array, Float


class Tower(VitTower):
    """Patches of tiles to visual tokens, which are interpolated between the units of tiles."""

    def __init__(self, config: AnyresConfig, options: ModelOptions, *, key: jax.Array):
        keys = jax.random.split(key)
        super().__init__(config, options, key=keys[0])
        width = config.out_size
        self.newline = nnx.Param(normal(keys[1], (width,), width**-0.5, options.params), axes=(None,))

    def __call__(self, patches: Patches) -> Float[Array, "B M O"]:
        """Visual tokens of these patches [B,P, ...].

        Raises:
            ValueError: C is not what the patch projection reads.
        """
        return mixed_units(self.units(patches), patches, self.newline[...])

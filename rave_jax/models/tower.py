"""What the model asks of a vision tower. Each family has its own (`families/*/tower`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rave_jax.batch import Patches
from rave_jax.models.forward import ImageFeatures
from rave_jax.models.stack import LayerRun
from rave_jax.typing import Array, Float


class Tower(Protocol):
    """An nnx module, made as `Tower(config, options, key=key)` from its family's `TowerConfig`.

    Attributes:
        layer_runs: its blocks, in runs of equal ones. Adapters on `vision.` paths stand in these.
    """

    @property
    def layer_runs(self) -> Sequence[LayerRun]: ...

    def __call__(self, patches: Patches) -> Float[Array, "B M O"] | ImageFeatures:
        """The visual tokens of rows of patches, P / merge_unit of them, in the order of their patches; with what is
        added to them in the decoder where the config's `deep_layers` is above 0."""
        ...

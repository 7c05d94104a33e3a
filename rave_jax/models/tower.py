"""What the model asks of a vision tower. Each family has its own (`families/*/tower`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rave_jax.models.stack import LayerRun
from rave_jax.typing import Array, Float, Int, UInt8


class Tower(Protocol):
    """An nnx module, made as `Tower(config, options, key=key)` from its family's `TowerConfig`.

    Attributes:
        layer_runs: its blocks, in runs of equal ones. Adapters on `vision.` paths stand in these.
    """

    @property
    def layer_runs(self) -> Sequence[LayerRun]: ...

    def __call__(
        self,
        patches: UInt8[Array, "B P C"],
        frame: Int[Array, "B P"],
        place: Int[Array, "B P 2"],
        window: Int[Array, "B P"],
    ) -> Float[Array, "B M O"]:
        """The visual tokens of rows of patches (`Batch`), P / merge_unit of them, in the order of their patches."""
        ...

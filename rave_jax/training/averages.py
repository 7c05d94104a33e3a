"""An exponential moving average of the trained parameters, beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from rave_jax.config import check_fields, check_ranges, require
from rave_jax.training.rounding import to_bfloat16
from rave_jax.typing import Array, Int

Weights = Literal["trained", "ema"]
"""The parameters of the last step, or their average."""


@dataclass(frozen=True)
class Ema:
    """average = decay average + (1 - decay) parameters, after each step."""

    decay: float = 0.999
    """Share of the average that a step keeps."""
    start: int = 0
    """Steps after which averaging begins; until then the average is the parameters."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type in which the average is kept."""
    evaluate: bool = False
    """Do the evaluations of the run itself take the average?"""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 <= self.decay < 1, "ema.decay", self.decay, "from 0 to below 1")
        check_ranges(self, start=(0, 2**31 - 1))

    def first(self, trained: Mapping[str, Array]) -> dict[str, Array]:
        """The average before the first step."""
        # A new array: parameters and average are donated to the step as two.
        return {name: jnp.array(x, self.dtype, copy=True) for name, x in trained.items()}

    def after(
        self, average: Mapping[str, Array], trained: Mapping[str, Array], step: Int[Array, ""]
    ) -> dict[str, Array]:
        """The average after one more step.

        Args:
            average: before it.
            trained: parameters after it.
            step: steps done before it.
        """
        decay = jnp.where(step < self.start, 0.0, self.decay)

        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            x = decay * old.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)
            return to_bfloat16(x, step) if self.dtype == "bfloat16" else x

        return {name: mean(old, trained[name]) for name, old in average.items()}

"""Mechanisms whose numbers are found for each prompt, by a pass of their own before it is read.

The model as built holds no numbers: `given` is None. Generation finds them for every prompt (`inference/prompted.py`),
keeps them in its slot, and puts them into a copy of the model while a program is traced, every array with the layer
axis in front. A pass over whole rows has no such numbers, and is refused.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import Features, Mechanism
from rave_jax.attention.checks import name_of
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from rave_jax.typing import Array, Float


class Prompted(Mechanism):
    """Asks for numbers of each prompt."""

    given: Any

    def __init__(self) -> None:
        self.given = nnx.data(None)

    @property
    def numbers(self) -> Any:
        """What was found for the prompts of these rows.

        Raises:
            ConfigError: nothing was.
        """
        if self.given is None:
            raise ConfigError(
                f"{name_of(self)} is decided for each prompt while it is answered, and other passes over whole rows "
                "(training, logits, attention of words) have no such numbers: take it out of the model's mechanisms"
            )
        return self.given


class PromptedHeads(Prompted):
    """Heads times numbers of the prompt: [L,B,H] in a stack, [B,H] in its scan."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def head_gate(self, x: Features, out: Float[Array, "B T H h"], info_q: TokenInfo) -> Float[Array, "B 1 H"]:
        """The numbers, for every token of a row."""
        return self.numbers[:, None]


def largest_half(values: Float[Array, "*B H"]) -> Array:
    """Which heads are the half with the largest values, at least one; of equal ones the first."""
    count = max(values.shape[-1] // 2, 1)
    order = jnp.argsort(-values, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True) < count

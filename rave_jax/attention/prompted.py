"""Mechanisms whose numbers are found for each prompt, by a pass of their own before it is read.

The model as built holds no numbers: `given` is None. Generation runs one pass over the prompts
(`inference/prompted.py`), asks each class of such mechanisms what the pass says (`found`), keeps that in the prompt's
slot, and puts it into a copy of the model while a program is traced, every array with the layer axis in front. All
mechanisms of one class share what was found. A pass over whole rows has no numbers, and is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import Mechanism
from rave_jax.attention.checks import name_of
from rave_jax.attention.statistics import Statistics, WantedStatistics
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from rave_jax.typing import Array, Bool, Float


class PromptSizes(NamedTuple):
    """Sizes that numbers may have.

    Fields:
        layers: global numbers of the layers that attend.
        heads: query heads of a layer.
        tokens: offsets that a prompt and its answer have at most.
    """

    layers: tuple[int, ...]
    heads: int
    tokens: int


class PromptPass(NamedTuple):
    """What the pass says of N prompts, one a row, padding on the right; L counts the layers that attend.

    Fields:
        info: token codes.
        hidden: behind the last layer.
        gates: what the outputs of heads were multiplied by; None where nobody says `GATES`.
        statistics: what `wanted` asked for; None where nobody asks.
        looks: the attention that the vision tower's class token gives each visual token, summed over heads, in its
            first block and in its last but one; 0 of other tokens. None where no config says `reads_class_token`.
    """

    info: TokenInfo
    hidden: Float[Array, "N T D"]
    gates: Float[Array, "L N T H"] | None
    statistics: Statistics | None
    looks: Float[Array, "N T 2"] | None = None


class Prompted(Mechanism):
    """Asks for numbers of each prompt. `found` has to be written, and `neutral`; the rest has a default."""

    BLIND: ClassVar[bool] = False
    """Does the pass need the prompts without their pictures too? They stand behind the others, as many rows."""
    GATES: ClassVar[bool] = False
    """Does `found` read what heads were multiplied by? Nothing else of the model may have a `head_gate` then."""

    given: Any

    def __init__(self) -> None:
        self.given = nnx.data(None)

    @property
    def words(self) -> bool:
        """Does `wanted` read which tokens belong to content words?"""
        return False

    @property
    def shared(self) -> Mapping[str, Any]:
        """Fields of the config, by name, that have to be equal in all configs of its class, since `found` reads them
        of one."""
        return {}

    def wanted(self, info: TokenInfo, content: Bool[Array, "N T"] | None) -> WantedStatistics | None:
        """Which statistics of the prompts' map are wanted; one class of a model may want some.

        Args:
            info: of the prompts.
            content: which tokens belong to content words; None where `words` does not ask for them.
        """
        return None

    def finder(self, layers: int) -> Mechanism:
        """What stands in its place in the pass, in a stack of so many layers, every array of it with the layer axis in
        front; the default changes nothing."""
        return Mechanism()

    @abstractmethod
    def neutral(self, rows: int, sizes: PromptSizes) -> Any:
        """Numbers that change nothing: a pytree of arrays [rows,...] as `found` gives them."""

    @abstractmethod
    def found(self, prompts: PromptPass, sizes: PromptSizes) -> Any:
        """The numbers of prompts: a pytree of arrays [N,...]."""

    def of_layers(self, numbers: Any, start: int, count: int) -> Any:
        """`given` of layers start .. start + count - 1, counting those that attend: arrays [count,B,...]. By default
        all layers have the same."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), numbers)

    def try_on(self, rows: int, heads: int, tokens: int) -> None:
        """With numbers that change nothing."""
        numbers = self.of_layers(self.neutral(rows, PromptSizes((0,), heads, tokens)), 0, 1)
        self.given = jax.tree.map(lambda x: x[0], numbers)

    @property
    def numbers(self) -> Any:
        """What was found for the prompts of these rows, in one layer.

        Raises:
            ConfigError: nothing was.
        """
        if self.given is None:
            raise ConfigError(
                f"{name_of(self)} is decided for each prompt while it is answered, and other passes over whole rows "
                "(training, logits, attention of words) have no such numbers: take it out of the model's mechanisms"
            )
        return self.given


def largest_half(values: Float[Array, "*B H"]) -> Array:
    """Which heads are the half with the largest values, at least one; of equal ones the first."""
    count = max(values.shape[-1] // 2, 1)
    order = jnp.argsort(-values, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True) < count

"""DyVTE: all visual tokens of a prompt leave after a layer that a small router chooses for it.

Source: arXiv 2411.19628, github DoubtedSteam/DyVTE b4a3396. Behind layer l

    f_l(x) = W2 GELU(W1 x)        W1: 2D -> 2048, W2: 2048 -> 2, no bias

reads x, the mean of the hidden states of the text between the picture and the prompt's last token, and the hidden state
of that token. The visual tokens leave at the first layer where the second output is above the first; positions of the
others do not change. The backbone is frozen while the routers learn (`rave-jax calibrate dyvte`,
`rave_jax/attention/calibrate/dyvte.py`).

W2 starts at zero: then nothing leaves. Ours: which token is the last one of a prompt (`tokens.py`), and that the mean
is 0 where no text is between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims, Candidates, Mechanism
from rave_jax.attention.declared import ALL_BUT_LAST, Layers, MechanismConfig
from rave_jax.attention.scores import pick
from rave_jax.attention.tokens import of_each_decider
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class Dyvte(MechanismConfig):
    """All visual tokens leave after a layer that a router chooses (DyVTE)."""

    WORDS: ClassVar = {"all": ALL_BUT_LAST}
    width: int = 2048
    """Hidden width of the routers."""
    layers: Layers = "all"
    """Decoder layers with a router, by global number, behind which visual tokens may leave. All means all but the
    last."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.width <= 2**20, "width", self.width, "a number from 1 to 1,048,576")

    @property
    def looks_ahead(self) -> bool:
        """A prompt's last token decides."""
        return True

    def stays(self, visual: int, pictures: int) -> tuple[int, ...]:
        """None but those that always stay, or all."""
        return min(visual, 2 * pictures + 1), visual

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer."""
        return ExitRouter(self.width, dims.hidden_size, key)


class ExitRouter(Mechanism):
    """Parameters: first [F,2,D], the mean's and the last token's, and second [2,F], of staying and of leaving."""

    OWNS = ("tokens",)

    def __init__(self, width: int, hidden: int, key: jax.Array):
        first = jax.random.normal(key, (width, 2, hidden)) * max(2 * hidden, 1) ** -0.5
        # No gradient reaches them, so training of the model leaves them alone, weight decay too.
        self.first = nnx.Param(first, axes=(None, None, "embed"), unused=True)
        self.second = nnx.Param(jnp.zeros((2, width)), axes=(None, None), unused=True)

    def tokens(self, given: Candidates) -> Bool[Array, "B T"]:
        """All tokens of a prompt, or none."""

        def change(stays: Array, decider: Array) -> Array:
            x = router_input(given.hidden, given.info, given.by, decider)
            z = router_logits(x, self.first[...], self.second[...])
            return stays & ~((given.by == decider) & (z[:, 1] > z[:, 0])[:, None])

        return of_each_decider(given.by, change, jnp.ones(given.by.shape, bool))


def router_input(
    hidden: Float[Array, "B T D"], info: TokenInfo, by: Int[Array, "B T"], decider: Int[Array, "B 1"]
) -> Float[Array, "B 2 D"]:
    """The mean over the text behind the last visual token that this token decides about, and this token; float32."""
    index = jnp.arange(by.shape[1], dtype=by.dtype)
    last = jnp.max(jnp.where(by == decider, index, -1), axis=1, keepdims=True)
    between = (index > last) & (index < decider) & (info.kind == Kind.TEXT)
    hidden = hidden.astype(jnp.float32)
    total = jnp.einsum("BT,BTD->BD", between.astype(jnp.float32), hidden)
    mean = total / jnp.maximum(jnp.sum(between, axis=1, keepdims=True), 1)
    return jnp.stack([mean, pick(hidden, decider)[:, 0]], axis=1)


def router_logits(
    x: Float[Array, "B 2 D"], first: Float[Array, "F 2 D"], second: Float[Array, "2 F"]
) -> Float[Array, "B 2"]:
    """f(x): of staying and of leaving."""
    inner = jax.nn.gelu(jnp.einsum("BND,FND->BF", x, first.astype(jnp.float32)), approximate=False)
    return jnp.einsum("BF,NF->BN", inner, second.astype(jnp.float32))

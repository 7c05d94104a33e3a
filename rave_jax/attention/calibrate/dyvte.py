"""What the routers of DyVTE learn, with the backbone frozen; `rave_jax/training/routers.py` has the steps.

Source: github DoubtedSteam/DyVTE b4a3396. At each step a layer l is drawn, every one as often. The batch is read twice:
as it is, and with the visual tokens hidden behind layer l. A sample may leave there if its answer does not change: more
than 0.99 of the answer's tokens are the same first guesses, and the loss of the second is below 1.03 times that of the
first, each a mean over the answer. The router of layer l learns this by cross-entropy from the hidden states of the
first.

Hidden here means a bias of -1e30 on visual keys, which leaves exactly no weight to them; so one program serves all
layers. The optimizer is Adam; the paper's own settings were not found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import Features, Mechanism, Score
from rave_jax.attention.calibrate.traced import Stack, with_mechanism
from rave_jax.attention.dyvte import router_logits
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.typing import Array, Bool, Float, Int

HIDDEN = -1e30
"""Bias of a key that gets no weight beside any other."""


@dataclass(frozen=True)
class DyvteTraining:
    """How routers are trained."""

    steps: int = 500
    """Steps; each trains the router of one layer by one block of samples."""
    rate: float = 1e-3
    """Learning rate of Adam."""
    width: int = 2048
    """Hidden width of the routers."""
    agreement: float = 0.99
    """A sample may leave where more than this share of its answer's tokens stay the first guesses."""
    worse: float = 1.03
    """And where the loss of its answer is below so many times the loss with the picture."""
    seed: int = 0
    """Of layers, blocks and the routers' start."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(0 < self.rate <= 1, "rate", self.rate, "a number above 0, at most 1")
        require(1 <= self.width <= 2**20, "width", self.width, "a number from 1 to 1,048,576")
        require(0 <= self.agreement < 1, "agreement", self.agreement, "a share from 0 to below 1")
        require(0 < self.worse <= 1e6, "worse", self.worse, "a number above 0")


class Routers(NamedTuple):
    """The routers behind all layers but the last, as `ExitRouter` has them."""

    first: Float[Array, "L F 2 D"]
    second: Float[Array, "L 2 F"]


def new_routers(key: jax.Array, layers: int, width: int, hidden: int) -> Routers:
    """Routers that let nothing leave."""
    first = jax.random.normal(key, (layers, width, 2, hidden)) * (2 * hidden) ** -0.5
    return Routers(first, jnp.zeros((layers, 2, width)))


class HiddenPictures(Mechanism):
    """No weight on visual keys in layers that are on. Without parameters."""

    def __init__(self, on: Bool[Array, "*L"]):
        self.on = nnx.data(on)

    def score(self, x: Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """-1e30 on visual keys."""
        bias = jnp.where((info_k.kind == Kind.VISUAL) & self.on, HIDDEN, 0.0)
        return Score(key_bias=jnp.broadcast_to(bias[..., None], (*bias.shape, x.q.shape[2])))


def without_pictures[S: Stack](decoder: S, layer: Int[Array, ""], layers: int) -> S:
    """The decoder in which visual tokens are hidden behind a layer, for `with_mechanism`."""
    on = jnp.arange(layers) > layer
    return with_mechanism(decoder, lambda run: HiddenPictures(on[run.start : run.stop]))


def may_leave(
    training: DyvteTraining,
    plain: Float[Array, "B N V"],
    hidden: Float[Array, "B N V"],
    answer: Int[Array, "B N"],
) -> Bool[Array, "B"]:
    """Does the answer of a sample stay as it is?

    Args:
        training: the limits.
        plain, hidden: logits for the answer's tokens, with the picture and without.
        answer: those tokens; -1 fills up.
    """
    given = answer >= 0
    count = jnp.maximum(jnp.sum(given, axis=1), 1)
    same = jnp.sum((jnp.argmax(plain, axis=-1) == jnp.argmax(hidden, axis=-1)) & given, axis=1) / count

    def loss(logits: Array) -> Float[Array, "B"]:
        chosen = cross_entropy(logits, jnp.maximum(answer, 0))
        return jnp.sum(jnp.where(given, chosen, 0.0), axis=1) / count

    return (same > training.agreement) & (loss(hidden) < training.worse * loss(plain))


def lesson(
    router: Routers, x: Float[Array, "B 2 D"], leaves: Bool[Array, "B"], real: Bool[Array, "B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss of one layer's router, and how often it is right.

    Args:
        router: without the layer axis.
        x: what it reads.
        leaves: what it should say.
        real: which rows hold a sample.
    """
    weight = real / jnp.maximum(jnp.sum(real), 1)
    z = router_logits(x, router.first, router.second)
    right = (z[:, 1] > z[:, 0]) == leaves
    return jnp.sum(weight * cross_entropy(z, leaves.astype(jnp.int32))), jnp.sum(weight * right)


def cross_entropy(logits: Float[Array, "*rows V"], wanted: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Of the softmax, float32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, wanted[..., None], axis=-1)[..., 0]

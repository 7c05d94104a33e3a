"""Knock-out: how likely an answer is when some visual tokens are hidden from all text.

Source: the question is that of attention knockout (Geva et al., arXiv 2304.14767), which hides tokens from others by
their scores; here from every text token and in every layer, so that a hidden token reaches the answer only by way of
visual tokens (and of context tokens) that saw it. Gated delta layers keep what they read in a state, from which nothing
can be hidden; models with such layers are refused where a knock-out is asked for.

Tokens are hidden by a mechanism that is put into a copy of the model that shares its weights. Its score term is HIDDEN
for text and a hidden token, and exactly 0 for all other pairs. So it goes with every other mechanism and kernel, and
one program serves all choices of tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention import Features, Mechanism
from rave_jax.attention.base import Score
from rave_jax.batch import Batch, Kind, TokenInfo
from rave_jax.kernels.attention import Term
from rave_jax.kernels.attention.score import Tile
from rave_jax.models.vlm import Vlm
from rave_jax.typing import Array, Bool, Float, Int

HIDDEN = -8192.0
"""Added to a score that is hidden: exp of it is 0 in float32."""
NOTHING = -1
"""Stands for no token of an answer."""


class HiddenTokens(Mechanism):
    """Hides tokens from text. It is in no config: nothing is trained or answered with it."""

    def __init__(self, hidden: Bool[Array, "*L B S"]):
        """
        Args:
            hidden: which tokens; in a layer run with the axis of its layers in front.
        """
        self.hidden = nnx.Variable(hidden)  # a plain array would be the same in all layers

    def score(self, x: Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """HIDDEN for text queries and hidden keys."""
        hidden = self.hidden.get_value()
        text = info_q.kind == Kind.TEXT
        return Score(terms=(Term(_hide, key={"hidden": jnp.where(hidden, 1.0, 0.0)}, query_on=text, key_on=hidden),))


def _hide(tile: Tile) -> Array:
    return HIDDEN * tile.key["hidden"]


def with_hidden(model: Vlm, hidden: Bool[Array, "B S"]) -> Vlm:
    """The model with these tokens hidden from text in every layer that attends; it shares its arrays."""
    model = jax.tree.map(lambda x: x, model)
    for run in model.decoder.layer_runs:
        layers = run.stop - run.start
        run.layers.mechanisms.append(HiddenTokens(jnp.broadcast_to(hidden, (layers, *hidden.shape))))
    return model


def log_probability(
    model: Vlm, batch: Batch, hidden: Bool[Array, "B S"], at: Int[Array, "B N"], answer: Int[Array, "B N"]
) -> Float[Array, "B"]:
    """Natural log of the probability of each row's answer, with some tokens hidden from text.

    Args:
        model: the model.
        batch: one document to a row: a prompt with its answer.
        hidden: the visual tokens that no text sees.
        at: queries that choose the answer's tokens; anything for fillers.
        answer: the answer's tokens; NOTHING for fillers.
    """
    states = with_hidden(model, hidden).forward(batch).hidden
    logits = model.logits(jnp.take_along_axis(states, at[..., None], axis=1)).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.maximum(answer, 0)[..., None], axis=-1)[..., 0]
    each = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(jnp.where(answer == NOTHING, 0.0, each), axis=1)

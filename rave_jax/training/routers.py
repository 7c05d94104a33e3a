"""Trains the routers of `Dyvte`: a step is for one layer, and the model stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rave_jax.attention.calibrate.dyvte import (
    DyvteTraining,
    Routers,
    lesson,
    may_leave,
    new_routers,
    without_pictures,
)
from rave_jax.attention.dyvte import router_input
from rave_jax.attention.tokens import deciders
from rave_jax.batch import Batch
from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example
from rave_jax.evaluation.calibration import NOTHING, asked_at
from rave_jax.evaluation.heads import blocks
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.rows import batch_shardings
from rave_jax.parallel.sharding import shard, use_mesh
from rave_jax.typing import Array, Bool, Float, Int, NpArray


class Trained(NamedTuple):
    """Routers, and of every step the layer, how often its router was right, and how many samples could leave."""

    routers: Routers
    layer: Int[NpArray, "N"]
    right: Float[NpArray, "N"]
    leaving: Float[NpArray, "N"]


def train_routers(
    model: Vlm,
    processor: Processor,
    examples: Sequence[Example],
    mesh: Mesh,
    rows: int,
    training: DyvteTraining,
    advance: Callable[[], None] = lambda: None,
) -> Trained:
    """Routers behind every layer but the last, that know whose answer needs its picture no more.

    Args:
        model: on the mesh; it does not change.
        processor, examples, mesh, rows: as in `evaluation.leaving.attention_by_place`; with answers.
        training: how.
        advance: called after every step.

    Raises:
        ConfigError: there are no examples, the model has one layer, or a router is no longer finite.
    """
    layers, rng = model.config.text.num_layers, np.random.default_rng(training.seed)
    if layers < 2:
        raise ConfigError("the model has one layer, and behind it nothing is spared: give one with more")
    places = [asked_at(example, "accuracy") for example in examples]
    width = max(len(at) for at, _ in places)
    optimizer = optax.adam(training.rate)
    found = []
    with use_mesh(mesh):
        kept = []
        for span, batch in blocks(processor, examples, mesh, rows):
            B = batch.tokens.shape[0]
            at, answer = np.zeros((B, width), np.int32), np.full((B, width), NOTHING, np.int32)
            for row, (here, tokens) in enumerate(places[span]):
                at[row, : len(here)], answer[row, : len(tokens)] = here, tokens
            kept.append((batch, *jax.device_put((at, answer), batch_shardings(mesh, B).tokens)))
        key = jax.random.key(training.seed)
        routers = new_routers(key, layers - 1, training.width, model.config.text.hidden_size)
        state = routers, jax.vmap(optimizer.init)(routers)
        for _ in range(training.steps):
            layer, block = rng.integers(layers - 1), rng.integers(len(kept))
            state, told = _step(model, *kept[block], np.int32(layer), state, training=training)
            found.append((layer, *told))
            advance()
    columns = [np.array([np.asarray(one) for one in column]) for column in zip(*found, strict=True)]
    routers = jax.tree.map(np.asarray, state[0])
    if not all(np.isfinite(x).all() for x in routers):
        raise ConfigError("a router is not finite: check the model's weights, or give a smaller --rate")
    return Trained(routers, *columns)


@functools.partial(jax.jit, static_argnames="training")
def _step(
    model: Vlm,
    batch: Batch,
    at: Int[Array, "B N"],
    answer: Int[Array, "B N"],
    layer: Int[Array, ""],
    state: tuple[Routers, Any],
    training: DyvteTraining,
) -> tuple[tuple[Routers, Any], tuple[Array, Array]]:
    """The routers after a step, how often that of the layer was right, and the share of samples that may leave."""
    info, tokens, layers = batch.info, model.embedded(batch), model.config.text.num_layers
    seen = model.decoder(tokens, info, batch.positions, Want(inputs=True))
    blind = without_pictures(model.decoder, layer, layers)(tokens, info, batch.positions)
    plain, hidden = (
        model.logits(jnp.take_along_axis(out.hidden, at[..., None], axis=1, mode="clip")) for out in (seen, blind)
    )
    leaves = may_leave(training, plain, hidden, answer)
    by = deciders(info)
    decider = jnp.min(by, axis=1, keepdims=True)
    assert seen.inputs is not None
    after = jax.lax.dynamic_index_in_dim(seen.inputs, layer + 1, keepdims=False)
    real = (decider[:, 0] < by.shape[1]) & jnp.any(answer >= 0, axis=1)
    x = router_input(after, info, by, jnp.minimum(decider, by.shape[1] - 1))
    routers, moments, right = learned(*state, optax.adam(training.rate), layer, x, leaves, real)
    share = jnp.sum(leaves & real) / jnp.maximum(jnp.sum(real), 1)
    return jax.tree.map(lambda y: shard(y, *[None] * y.ndim), ((routers, moments), (right, share)))


def learned(
    routers: Routers,
    moments: Any,
    optimizer: optax.GradientTransformation,
    layer: Int[Array, ""],
    x: Float[Array, "B 2 D"],
    leaves: Bool[Array, "B"],
    real: Bool[Array, "B"],
) -> tuple[Routers, Any, Float[Array, ""]]:
    """The routers after a step of one layer's, and how often that one was right before it.

    Args:
        routers, moments, optimizer: so far; the moments of each layer by itself, as the routers.
        layer: whose router learns.
        x, leaves, real: as in `lesson`.
    """
    mine, own = jax.tree.map(lambda kept: kept[layer], (routers, moments))
    gradient, right = jax.grad(lesson, has_aux=True)(mine, x, leaves, real)
    updates, own = optimizer.update(gradient, own, mine)
    after = (optax.apply_updates(mine, updates), own)
    routers, moments = jax.tree.map(lambda kept, new: kept.at[layer].set(new), (routers, moments), after)
    return routers, moments, right

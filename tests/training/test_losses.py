"""Losses of mechanisms in the step: one mean over the whole batch, whatever the layout, beside the token loss."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rave_jax.attention import Avar, MechanismConfig, Moba, SlidingWindow, ZeroTuning
from rave_jax.batch import Batch, Kind, Role
from rave_jax.families.config import ExpertsConfig
from rave_jax.models.config import ModelOptions, Remat
from rave_jax.models.forward import Embedded, Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import global_batch
from rave_jax.parallel.sharding import use_mesh
from rave_jax.training.loop import named_values
from rave_jax.training.objective import chunked_cross_entropy
from rave_jax.training.optimizers import OptimizerConfig
from rave_jax.training.step import StepMetrics, micro_batches
from tests.models.made import model as made
from tests.training.small import (
    CONFIG,
    TEXT,
    first_state,
    random_batch,
    rows_of,
    session_of,
)

MECHANISMS: tuple[MechanismConfig, ...] = (
    Avar(enhance=0.5),
    ZeroTuning(0.5, route="merge"),
    ZeroTuning(3.0, heads=(1,), route="after"),
    Moba(4, top_k=2),
)
OPTIONS = ModelOptions(mechanisms=MECHANISMS)
Z_LOSS = 0.01


def told(rows: int = 8) -> Batch:
    """Rows of one or two documents, of which some have no answer, no picture or no system prompt."""
    batch = random_batch(0, rows, patches=0)
    info = jax.tree.map(np.copy, batch.info)
    info.role[:, :2], info.role[:, 14:] = Role.SYSTEM, Role.RESPONSE
    info.role[0, :2], info.role[1, 14:] = Role.QUESTION, Role.QUESTION
    info.kind[2:4] = Kind.TEXT
    info.document[4:, 9:] = 2
    info.offset[4:, 9:] -= 9
    info.kind[5, 10:13], info.kind[6, 20:] = Kind.VISUAL, Kind.PAD
    info.document[6, 20:] = 0
    return batch._replace(info=info)


def one_step(session: Any, options: ModelOptions = OPTIONS) -> tuple[dict[str, np.ndarray], StepMetrics]:
    state, batch = first_state(session, TEXT, options), told()
    with use_mesh(session.mesh):
        rows = global_batch(lambda span: rows_of(batch, span.start, span.stop), session.mesh, 8)
        state, metrics = session.step(state, rows)
    return jax.tree.map(np.asarray, state.trained), jax.device_get(metrics)


@functools.cache
def whole() -> tuple[dict[str, np.ndarray], StepMetrics]:
    return one_step(session_of(OptimizerConfig(decay="none"), config=TEXT, options=OPTIONS, z_loss=Z_LOSS))


def test_the_step_descends_the_sum_of_all_losses() -> None:
    session = session_of(OptimizerConfig(decay="none"), config=TEXT, options=OPTIONS, z_loss=Z_LOSS)
    batch = jax.tree.map(jnp.asarray, told())

    @jax.jit
    def by_hand(trained: Any) -> Any:
        def loss(trained: Any) -> Any:
            model = session.graph.merge(trained)
            out = model.forward(batch, Want(losses=True))
            weights = model.loss_weights(batch.info)
            of_tokens = batch.targets, batch.loss_weights
            tokens = chunked_cross_entropy(out.hidden, model.head_weight(), *of_tokens, 24, Z_LOSS)
            means = {name: out.losses[name] / weights[name] for name in weights}
            return tokens.loss / tokens.weight + sum(means.values()), means | {"z": tokens.z / tokens.weight}

        (total, means), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        return total, means, optax.tree.norm(gradients)

    total, means, norm = by_hand(first_state(session, TEXT, OPTIONS).trained)
    metrics = whole()[1]
    assert set(metrics.losses) == {"avar_enhance", "avar_suppress", "z"} and metrics.bad_step == -1
    assert 0 < metrics.routing["Moba/read"] < metrics.routing["Moba/effective"] < 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics.losses, means)
    np.testing.assert_allclose(metrics.loss + sum(metrics.losses.values()), total, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(None, id="one device", marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=2, tensor=2, data=1), id="mesh"),
    ],
)
def test_accumulation_and_meshes_change_nothing(mesh: MeshConfig | None) -> None:
    """Micro-batches have different numbers of documents with each loss, so a mean of means would differ."""
    optimizer = OptimizerConfig(decay="none", accumulation=4 if mesh is None else 2)
    place = None if mesh is None else make_mesh(mesh, jax.devices()[:4])
    _, metrics = one_step(session_of(optimizer, place, config=TEXT, options=OPTIONS, z_loss=Z_LOSS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), metrics, whole()[1])


def test_routers_of_experts_add_the_mean_of_the_losses_of_micro_batches() -> None:
    """Weighted by tokens. What an expert is chosen for is counted within a micro-batch."""
    experts = ExpertsConfig(count=4, chosen=2, mlp_size=8, balance=0.5)
    config = dataclasses.replace(TEXT, text=dataclasses.replace(TEXT.text, experts=experts))
    session = session_of(OptimizerConfig(decay="none", accumulation=2), config=config, options=ModelOptions())
    state = first_state(session, config, ModelOptions())
    batch = jax.tree.map(jnp.asarray, told())

    @jax.jit
    def by_hand(trained: Any) -> jax.Array:
        model = session.graph.merge(trained)
        halves = [jax.tree.map(lambda x, n=n: x[n], micro_batches(batch, 2)) for n in range(2)]
        sums = [model.forward(half, Want(losses=True)).losses["router"] for half in halves]
        return sum(sums) / model.loss_weights(batch.info)["router"]

    wanted = by_hand(state.trained)
    with use_mesh(session.mesh):
        metrics = session.step(state, batch)[1]
    # Balanced experts would have a loss of 0.5 * chosen.
    assert set(metrics.losses) == {"router"} and float(wanted) > 1.0
    np.testing.assert_allclose(metrics.losses["router"], wanted, rtol=1e-5)


def test_a_mechanism_without_losses_adds_nothing_to_the_metrics() -> None:
    options = ModelOptions(mechanisms=(SlidingWindow(9),))
    session = session_of(OptimizerConfig(), config=TEXT, options=options)
    with use_mesh(session.mesh):
        metrics = jax.eval_shape(session.step, session.state, told())[1]
    assert metrics.losses == {}


def test_losses_are_logged_by_name() -> None:
    empty = StepMetrics(*map(np.float32, range(len(StepMetrics._fields))))
    of = empty._replace(losses={"avar_enhance": np.float32(0.5)}, group_norms={}, mechanisms={"gain": np.float32(1)})
    of = of._replace(routing={"Gaze/read": np.float32(0.25)})
    values = named_values(of)
    assert values["loss/avar_enhance"] == 0.5 and values["routing/Gaze/read"] == 0.25 and "losses" not in values


@functools.cache
def of_two_layers(scan: bool, remat: Remat) -> Any:
    """Losses, hidden states and the gradient of what goes in, where one of two layers changes its attention."""
    mechanisms = (Avar(), ZeroTuning(3.0, route="after", layers=(1,)))
    config = dataclasses.replace(TEXT, text=CONFIG.text)
    options = ModelOptions(mechanisms=mechanisms, scan_layers=scan, remat=remat)
    batch = jax.tree.map(jnp.asarray, told())

    @jax.jit
    def run(model: Vlm) -> Any:
        def loss(embedded: jax.Array) -> Any:
            out = model.decoder(Embedded(embedded), batch.info, batch.positions, Want(losses=True))
            return sum(out.losses.values()), (out.losses, out.hidden, model.loss_weights(batch.info))

        return jax.value_and_grad(loss, has_aux=True)(model.embedded(batch).x)

    return run(made(config, options))


@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        pytest.param(True, "full", marks=pytest.mark.slow),
        pytest.param(True, "dots", marks=pytest.mark.slow),
        pytest.param(False, "none", marks=pytest.mark.slow),
        pytest.param(False, "full", marks=pytest.mark.slow),
    ],
)
def test_layers_and_what_they_keep_change_no_loss(scan: bool, remat: Remat) -> None:
    ours, theirs = of_two_layers(scan, remat), of_two_layers(True, "none")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), ours, theirs)
    assert np.abs(theirs[1]).max() > 1e-3

"""Master copies in float32 and the moving average: what a step makes of them, and what is saved and read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.checkpoint.store import Store
from rave_jax.config import ConfigError
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.sharding import use_mesh
from rave_jax.training.averages import Ema
from rave_jax.training.config import TrainConfig
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup
from rave_jax.training.session import group_rows
from rave_jax.training.state import parameters_of, parameters_target, state_of
from tests.training.small import TEXT, first_state, run_steps, session_of

SHORT = ModelOptions(param_dtype="bfloat16", compute_dtype="bfloat16")
CONFIG = OptimizerConfig(
    learning_rate=1e-5,
    decay="none",
    master_copies=True,
    ema=Ema(decay=0.75, start=1, evaluate=True),
    groups=(ParameterGroup("norms", "norm", frozen=True),),
)
NAME = "decoder.layer_runs.0.layers.mlp.up.weight"


def run() -> tuple[Any, list[Any]]:
    """A session and its states after 0 to 3 steps, on the host."""
    session = session_of(CONFIG, config=TEXT, options=SHORT)
    state = first_state(session, TEXT, SHORT)
    states = [jax.device_get(state)]
    for step in range(3):
        state, _ = run_steps(session, state, range(step, step + 1), patches=0)
        states.append(jax.device_get(state))
    return session, states


@pytest.fixture(scope="module")
def made() -> tuple[Any, list[Any]]:
    return run()


def test_small_steps_add_up_in_float32(made: tuple[Any, list[Any]]) -> None:
    session, states = made
    first, last = states[0].trained[NAME], states[3].trained[NAME]
    assert first.dtype == np.float32 and session.graph.shapes[NAME].dtype == jnp.bfloat16
    # AdamW's first updates have a size of about one learning rate each.
    np.testing.assert_allclose(np.abs(last - first).max(), 3e-5, rtol=0.2)
    large = np.abs(first) > 0.1
    np.testing.assert_array_equal(last.astype(jnp.bfloat16)[large], first.astype(jnp.bfloat16)[large])
    assert {x.dtype.name for x in states[3].frozen.values()} == {"bfloat16"}


def test_the_average_follows_the_parameters_from_its_start_on(made: tuple[Any, list[Any]]) -> None:
    session, states = made
    one, two, three = (state.trained[NAME] for state in states[1:])
    np.testing.assert_array_equal(states[1].ema[NAME], one)
    wanted = 0.75 * (0.75 * one + 0.25 * two) + 0.25 * three
    np.testing.assert_allclose(states[3].ema[NAME], wanted, rtol=1e-6)
    asked = session.model(jax.tree.map(jnp.asarray, states[3])).decoder.layer_runs[0].layers.mlp.up.weight[...]
    np.testing.assert_array_equal(asked, np.asarray(wanted).astype(jnp.bfloat16))
    assert asked.dtype == jnp.bfloat16


def test_a_checkpoint_holds_both_and_is_read_with_and_without_the_optimizer(
    made: tuple[Any, list[Any]], tmp_path: Path
) -> None:
    session, states = made
    with use_mesh(session.mesh), Store(tmp_path, 1) as store:
        shardings = jax.tree.map(lambda x: x.sharding, session.state)
        placed = jax.device_put(states[3], shardings)
        store.save(3, parameters_of(placed), placed.optimizer, {})
        store.wait()
        target = parameters_target(session.graph, session.mesh, CONFIG)
        assert target == parameters_of(session.state)
        alone = store.restore_parameters(3, target)
        parameters, optimizer, _ = store.restore(3, parameters_of(session.state), session.state.optimizer)
    back = state_of(parameters, optimizer, session.state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), states[3])
    np.testing.assert_array_equal(alone["ema"][NAME], states[3].ema[NAME])
    again, _ = run_steps(session, back, range(3, 4), patches=0)
    straight, _ = run_steps(session, jax.device_put(states[3], shardings), range(3, 4), patches=0)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(straight))


def test_the_table_counts_the_average_and_the_master_copies(made: tuple[Any, list[Any]]) -> None:
    session, states = made
    rows = {row.group: row for row in group_rows(session, CONFIG)}
    count = sum(x.size for x in states[0].trained.values())
    assert rows["rest"].bytes == 4 * count and rows["rest"].optimizer_bytes == 3 * 4 * count
    assert rows["norms"].bytes == 2 * sum(x.size for x in states[0].frozen.values())


def test_without_them_a_state_is_what_it_was() -> None:
    session = session_of(dataclasses.replace(CONFIG, master_copies=False, ema=None), config=TEXT, options=SHORT)
    assert set(parameters_of(session.state)) == {"step", "values"}
    assert {x.dtype.name for x in session.state.trained.values()} == {"bfloat16"}


def test_an_average_in_bfloat16_moves() -> None:
    ema = Ema(decay=0.999, dtype="bfloat16")

    @jax.jit
    def after(steps: int) -> jax.Array:
        start = ema.first({"x": jnp.zeros((64, 64))})
        return jax.lax.fori_loop(0, steps, lambda n, x: ema.after(x, {"x": jnp.ones((64, 64))}, n), start)["x"]

    np.testing.assert_allclose(np.mean(after(500), dtype=np.float32), 1 - 0.999**500, rtol=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ema(decay=1.0), "ema.decay is 1.0, expected from 0 to below 1"),
        (
            lambda: TrainConfig(optimizer=OptimizerConfig(master_copies=True)),
            "optimizer.master_copies is True, expected False: parameters are stored in float32 already",
        ),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()

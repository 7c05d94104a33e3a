"""Routers of `Dyvte` learn one layer at a time; `tests/tools/test_calibrate_tokens.py` trains those of a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rave_jax.attention.calibrate.dyvte import new_routers
from rave_jax.attention.dyvte import router_logits
from rave_jax.training.routers import learned


def test_a_router_learns_and_the_others_stay() -> None:
    """Samples whose last token points one way may leave."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(64, 2, 4)), jnp.float32)
    leaves, real = x[:, 1, 0] > 0, jnp.arange(64) < 60
    optimizer = optax.adam(0.03)
    start = new_routers(jax.random.key(0), 3, 16, 4)
    assert not np.any(start.second), "at the start nothing leaves"
    state = start, jax.vmap(optimizer.init)(start)
    step = jax.jit(lambda routers, moments: learned(routers, moments, optimizer, jnp.int32(1), x, leaves, real))
    for _ in range(60):
        *state, right = step(*state)
    routers = state[0]
    assert float(right) > 0.95
    z = np.asarray(router_logits(x, routers.first[1], routers.second[1]))[:60]
    assert np.mean((z[:, 1] > z[:, 0]) == np.asarray(leaves)[:60]) > 0.95
    for old, new in zip(start, routers, strict=True):
        np.testing.assert_array_equal(np.asarray(new)[[0, 2]], np.asarray(old)[[0, 2]])

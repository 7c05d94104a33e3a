"""RAVE's forms as score functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.attention.rave_forms import FLOOR, log_gate


def test_log_gate_is_accurate_everywhere_and_exact_at_zero():
    z = np.concatenate([-np.logspace(-6, 2.5, 200), np.logspace(-6, 2.5, 200)])
    expected = np.log(2.0) - np.logaddexp(0, -np.maximum(z, FLOOR))
    np.testing.assert_allclose(log_gate(jnp.asarray(z, jnp.float32)), expected, rtol=3e-6, atol=1e-7)
    assert float(log_gate(jnp.float32(0))) == 0.0
    slopes = jax.vmap(jax.grad(log_gate))(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(slopes, 1 / (1 + np.exp(np.minimum(z, 80))), rtol=1e-4, atol=1e-6)

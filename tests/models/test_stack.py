"""Stacks of layers: what the backward pass keeps, whether the layers are one loop or apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.models.layers import SwiGlu
from rave_jax.models.stack import LayerRun

LAYERS, WIDTH, HIDDEN, TOKENS = 6, 32, 128, 256


def layer_runs(scan_layers):
    """The same layers as one layer run or as one each."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    cuts = [(0, LAYERS)] if scan_layers else [(n, n + 1) for n in range(LAYERS)]
    return [LayerRun(*cut, lambda k: SwiGlu(WIDTH, HIDDEN, bias=True, dtype=jnp.float32, key=k), keys) for cut in cuts]


def loss(stack, x, remat):
    scale = jnp.cos(jnp.float32(x.shape[1]))  # traced, as a rotation is: shared by layers, without a gradient
    for run in stack:
        x, _ = run.scan(lambda layer, x, _, scale: (x + scale * layer(x), None), x, None, scale, remat)
    return jnp.sum(x**2)


def compiled(stack, x, remat):
    return jax.jit(jax.grad(functools.partial(loss, remat=remat), (0, 1))).lower(stack, x).compile()


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_layers_apart_keep_no_more_than_a_loop_and_give_its_gradients(remat):
    x = jax.random.normal(jax.random.key(1), (2, TOKENS, WIDTH))
    loop, apart = layer_runs(scan_layers=True), layer_runs(scan_layers=False)
    of_loop, of_apart = compiled(loop, x, remat), compiled(apart, x, remat)
    # A loop stacks what it keeps; beyond that, layers apart may not hold on to more than a tenth.
    assert of_apart.memory_analysis().temp_size_in_bytes < 1.1 * of_loop.memory_analysis().temp_size_in_bytes

    (d_loop,), dx_loop = of_loop(loop, x)
    d_apart, dx_apart = of_apart(apart, x)
    joined = jax.tree.map(lambda *layers: jnp.concatenate(layers), *map(jax.tree.leaves, d_apart))
    for a, b in zip([*jax.tree.leaves(d_loop), dx_loop], [*joined, dx_apart], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def test_full_remat_of_layers_apart_is_not_undone():
    x = jax.random.normal(jax.random.key(1), (2, TOKENS, WIDTH))
    kept = {
        r: compiled(layer_runs(scan_layers=False), x, r).memory_analysis().temp_size_in_bytes for r in ("none", "full")
    }
    # Less is kept: gate and up, two arrays as wide as the hidden layer, of all layers but the one at work.
    assert kept["none"] - kept["full"] > (LAYERS - 2) * 2 * 2 * TOKENS * HIDDEN * 4


def test_a_program_of_layers_apart_can_be_differentiated_from_outside():
    x = jax.random.normal(jax.random.key(1), (1, 8, WIDTH))
    apart = layer_runs(scan_layers=False)
    inside = jax.jit(jax.grad(lambda x: loss(apart, x, "none")))(x)
    outside = jax.grad(jax.jit(lambda x: loss(apart, x, "none")))(x)
    np.testing.assert_allclose(outside, inside, rtol=1e-5, atol=1e-5)

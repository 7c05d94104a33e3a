"""Numbers in 8 bits and in bfloat16: how far off they are, and that small changes add up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.parallel.sharding import Axes
from rave_jax.training.rounding import SIGNED, UNSIGNED, Blocks, blocks_of, quantised, restored, to_bfloat16

WEIGHT: Axes = ("layers", "mlp", "embed")


@pytest.fixture(scope="module")
def numbers() -> np.ndarray:
    """Magnitudes over ten decades, zeros and a block of zeros."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 64, 8)) * 10 ** rng.uniform(-10, 0, (3, 64, 8))
    x[0, :5], x[1, 32:, 2] = 0, 0
    return x.astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_becomes_one_of_its_two_neighbours(numbers: np.ndarray, signed: bool) -> None:
    x, top = (numbers, SIGNED) if signed else (np.abs(numbers), UNSIGNED)
    packed = quantised(jnp.asarray(x), Blocks(1, 32), jnp.int32(7), signed=signed)
    assert packed.codes.dtype == (jnp.int8 if signed else jnp.uint8) and packed.scales.shape == (3, 2, 8)
    back = np.asarray(restored(packed))
    largest = np.repeat(np.abs(x).reshape(3, 2, 32, 8).max(2), 32, axis=1).reshape(x.shape)
    # Neighbours are 1 / top apart in the fourth root of the share of the block's largest number.
    root, wanted = (np.where(largest > 0, (np.abs(y) / np.maximum(largest, 1e-30)) ** 0.25, 0) for y in (back, x))
    assert np.abs(root - wanted).max() <= 1 / top + 1e-6
    assert (np.sign(back) * np.sign(x) >= 0).all(), "no number changes its sign"
    np.testing.assert_array_equal(back[x == 0], 0)
    at_top = np.abs(x) == largest
    np.testing.assert_allclose(back[at_top], x[at_top], rtol=1e-6)
    if not signed:
        assert (back[x > 0] > 0).all(), "what is divided by never becomes 0"


def test_small_changes_add_up() -> None:
    """A mean that decays by a thousandth a step: rounded to the nearest it would stay where it is."""

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = Blocks(0, 32)

        def body(step, kept):
            packed, short = kept
            new = 0.999 * restored(packed)
            return quantised(new.at[0].set(1.0), blocks, step, signed=False), to_bfloat16(
                0.999 * short.astype(jnp.float32), step
            )

        start = (quantised(x, blocks, jnp.int32(0), signed=False), x.astype(jnp.bfloat16))
        packed, short = jax.lax.fori_loop(1, 1001, body, start)
        return restored(packed), short.astype(jnp.float32)

    packed, short = run(jnp.ones((32, 64)))
    np.testing.assert_allclose(np.mean(packed[1:]), 0.999**1000, rtol=0.02)
    np.testing.assert_allclose(np.mean(short), 0.999**1000, rtol=0.01)


@pytest.mark.parametrize(
    ("axes", "shape", "wanted"),
    [
        (("layers", "heads", "head_dim", "embed"), (28, 28, 128, 3584), Blocks(2, 128)),
        (("layers", "embed", "heads", "head_dim"), (28, 3584, 28, 128), Blocks(3, 128)),
        (("layers", "mlp", "embed"), (28, 18944, 3584), Blocks(1, 64)),
        (("layers", "embed", "mlp"), (28, 3584, 18944), Blocks(2, 64)),
        (("vocab", "embed"), (152064, 3584), Blocks(0, 64)),
        (("layers", "experts", None, "embed"), (2, 128, 768, 2048), Blocks(2, 128)),
        (("layers", None), (28, 3584), Blocks(1, 128)),
        (("layers", "heads", "head_dim"), (1, 28, 128), None),
        (("mlp", "embed"), (3420, 27), None),
    ],
)
def test_blocks_are_whole_on_their_devices(axes: Axes, shape: tuple[int, ...], wanted: Blocks | None) -> None:
    """An axis that no mesh splits, or pieces that eight devices have whole; few numbers stay as they are."""
    assert blocks_of(axes, shape) == wanted

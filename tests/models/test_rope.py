from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from rave_jax.attention.rotation import rotate
from rave_jax.models.rope import patch_rotation, text_rotation


def test_equal_axes_make_mrope_one_dimensional() -> None:
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (3, 1, 9))
    plain, sections = text_rotation(positions, 16, 1e4), text_rotation(positions, 16, 1e4, (2, 3, 3))
    np.testing.assert_array_equal(plain.cos, sections.cos)
    np.testing.assert_array_equal(plain.sin, sections.sin)


def test_each_section_turns_with_its_own_axis() -> None:
    rotation = text_rotation(jnp.array([5, 0, 0], jnp.int32).reshape(3, 1, 1), 16, 1e4, (2, 3, 3))
    assert (rotation.sin[0, 0] != 0).tolist() == [True] * 2 + [False] * 6
    rotation = text_rotation(jnp.array([0, 5, 0], jnp.int32).reshape(3, 1, 1), 16, 1e4, (2, 3, 3))
    assert (rotation.sin[0, 0] != 0).tolist() == [False] * 2 + [True] * 3 + [False] * 3


def test_interleaved_sections_take_turns() -> None:
    """Height and width have every third frequency until each has its number; what is left is temporal."""

    def turning(axis: int) -> list[int]:
        at = jnp.zeros((3, 1, 1), jnp.int32).at[axis].set(5)
        sin = text_rotation(at, 20, 1e4, (5, 3, 2), interleaved=True).sin
        return np.flatnonzero(sin[0, 0]).tolist()

    assert (turning(1), turning(2)) == ([1, 4, 7], [2, 5])
    assert turning(0) == [0, 3, 6, 8, 9]


def test_scores_see_differences_of_position_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 6, 2, 16)), jnp.float32) for _ in range(2))
    places = rng.integers(0, 30, (3, 1, 6)).astype(np.int32)

    def scores(shift: int) -> np.ndarray:
        rotation = text_rotation(jnp.asarray(places + shift), 16, 1e4, (2, 3, 3))
        return np.einsum("BTHh,BSHh->BHTS", rotate(q, rotation), rotate(k, rotation))

    np.testing.assert_allclose(scores(0), scores(1000), atol=2e-4)
    assert np.abs(scores(0) - np.einsum("BTHh,BSHh->BHTS", q, k)).max() > 0.1


def test_tower_rows_and_columns_turn_different_halves() -> None:
    rotation = patch_rotation(jnp.array([[[3, 0], [0, 3]]], jnp.int32), 16, 1e4)
    assert (rotation.sin[0] != 0).tolist() == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]


def test_half_precision_is_turned_in_float32() -> None:
    rotation = text_rotation(jnp.full((3, 1, 1), 12345, jnp.int32), 8, 1e4)
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    turned = rotate(x, rotation)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rotate(x.astype(jnp.float32), rotation).astype(jnp.bfloat16))

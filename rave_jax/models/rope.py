"""Rotary position: angles from positions (1-D, M-RoPE, 2-D of the tower). Angles are float32.

What is done with them is in `attention/rotation.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.attention.rotation import Rotation
from rave_jax.families.config import DynamicRope, LinearRope, RopeScaling
from rave_jax.typing import Array, Float, Int


def _frequencies(count: int, theta: float) -> np.ndarray:
    """theta ** (-n / count) for n = 0 .. count - 1, rounded to float32 where the checkpoints' own code rounds."""
    exponents = np.arange(count, dtype=np.float32) / np.float32(count)
    return np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling | None) -> np.ndarray:
    """The frequencies as the checkpoint wants them, float32 throughout as in the checkpoints' own code."""
    if scaling is None or isinstance(scaling, DynamicRope):
        return frequencies
    divided = frequencies / np.float32(scaling.factor)
    if isinstance(scaling, LinearRope):
        return divided
    turns = np.float32(scaling.original_max_position) / (np.float32(2 * np.pi) / frequencies)
    low, high = np.float32(scaling.low_factor), np.float32(scaling.high_factor)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * divided + kept * frequencies


def text_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Float[Array, "half"]:
    """Frequencies of the decoder's pairs; see `text_rotation`."""
    return jnp.asarray(_scaled(_frequencies(head_dim // 2, theta), scaling))


def text_rotation(
    positions: Int[Array, "3 B T"],
    head_dim: int,
    theta: float,
    sections: tuple[int, ...] = (),
    *,
    interleaved: bool = False,
    scaling: RopeScaling | None = None,
) -> Rotation:
    """Rotation of the decoder's queries and keys.

    Args:
        positions: temporal, height and width position of each token.
        head_dim: h, even.
        theta: base of the frequencies.
        sections: M-RoPE (Qwen2-VL, arXiv 2409.12191): how many of the h/2 frequencies turn with the temporal,
            then the height, then the width position, and round again; empty: all with the temporal one.
        interleaved: do the frequencies take turns instead (Qwen3-VL, arXiv 2511.21631)? Then `sections` has three
            numbers, and every third frequency from the second on is height's and from the third on width's, until each
            has its number; the others are temporal.
        scaling: of the frequencies.
    """
    frequencies = text_frequencies(head_dim, theta, scaling)
    if not sections:
        angles = positions[0, ..., None].astype(jnp.float32) * frequencies
    else:
        axis = _interleaved(sections) if interleaved else np.repeat(np.arange(len(sections)) % 3, sections)
        angles = jnp.moveaxis(positions, 0, -1)[..., axis].astype(jnp.float32) * frequencies
    return _rotation(angles)


def _interleaved(sections: tuple[int, ...]) -> np.ndarray:
    """Axis of each frequency: 0 temporal, 1 height, 2 width."""
    number = np.arange(sum(sections))
    turn = number % 3
    return np.where(number < 3 * np.asarray(sections)[turn], turn, 0)


def patch_rotation(place: Int[Array, "B P 2"], head_dim: int, theta: float) -> Rotation:
    """Rotation of the tower's queries and keys: the first half of the pairs turns with the row, the other with
    the column, at the same h/4 frequencies."""
    frequencies = jnp.asarray(_frequencies(head_dim // 4, theta))
    angles = place[..., None].astype(jnp.float32) * frequencies
    return _rotation(angles.reshape(*place.shape[:-1], head_dim // 2))


def _rotation(angles: Float[Array, "B T half"]) -> Rotation:
    # An array of its own: where layers stand apart, the CPU compiler would else compute it again in each of them, and
    # there for every head.
    return Rotation(*jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles))))

"""Pictures for tests."""

from __future__ import annotations

import numpy as np


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A picture of noise, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)

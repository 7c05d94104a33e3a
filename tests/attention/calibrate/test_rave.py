"""Heads of RAVE: those with the largest visual mass of all layers together."""

from __future__ import annotations

import numpy as np
import pytest

from rave_jax.attention import Rave
from rave_jax.attention.calibrate.rave import RaveSearch, configs_of
from rave_jax.config import ConfigError

MASS = np.array([[0.1, 0.5, 0.2], [0.6, 0.0, 0.0], [0.0, 0.5, 0.0]])


def test_the_heads_of_largest_mass_get_a_gate() -> None:
    chosen = RaveSearch(fraction=1 / 3).chosen(MASS)
    assert np.argwhere(chosen).tolist() == [[0, 1], [1, 0], [2, 1]]
    assert configs_of(chosen) == (Rave(heads=(1,), layers=(0, 2)), Rave(heads=(0,), layers=(1,)))
    assert RaveSearch(fraction=0.01).chosen(MASS).sum() == 1 and RaveSearch(fraction=1.0).chosen(MASS).all()
    assert configs_of(np.ones((2, 3), bool)) == (Rave(),)
    for fraction in (0.0, 1.5):
        with pytest.raises(ConfigError, match="fraction"):
            RaveSearch(fraction)

"""What TPU kernels cannot lower is named, on a machine without a TPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.kernels.attention.score import Shape
from rave_jax.kernels.support import against_lowering
from tests.kernels.drawn import FORMS, form_of
from tests.kernels.score_terms import bent_score, distance, soft_cap

TILE = Shape(True, ("row",), ("key",), ("gain",)).tile(lambda size: jax.ShapeDtypeStruct(size, jnp.float32))
TABLE = np.arange(128, dtype=np.float32)


FUNCTIONS: dict[str, Any] = {name: form_of(name) for name in FORMS}
FUNCTIONS |= {"distance": distance, "bent_score": bent_score, "soft_cap": soft_cap}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_tpu_kernels_can_lower_is_not_refused(function):
    assert against_lowering(function, TILE) is None


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda tile: jnp.sort(tile.dot), "TPU kernels have no operation sort"),
        (lambda tile: tile.pair + jnp.arctan(tile.query["row"]), "TPU kernels have no operation atan"),
        (lambda tile: tile.dot * TABLE, "it holds arrays of its own, which belong among the features of its term"),
    ],
    ids=["sort", "atan", "an array"],
)
def test_what_they_cannot_is_named(function, why):
    assert against_lowering(function, TILE) == why


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_gpu_kernels_lower_other_operations():
    for function in FUNCTIONS.values():
        assert against_lowering(function, TILE, "gpu") is None
    assert against_lowering(lambda tile: jnp.round(tile.dot), TILE, "gpu") == "GPU kernels have no operation round"


def test_a_mesh_of_the_caller_changes_nothing():
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("fsdp",))):
        assert against_lowering(soft_cap, TILE) is None

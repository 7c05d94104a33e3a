"""Whole models whose rows are split over the mesh axis `context`: packed rows with RAVE and Gaze give what one device
gives, with losses and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rave_jax.attention import Gaze, Rave
from rave_jax.batch import Batch
from rave_jax.layout import FixedRegions
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.parameters import shardings
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.models.made import model as made
from tests.models.outcome import same
from tests.models.test_routing import CONFIG, rows

OPTIONS = ModelOptions(
    (Rave(rank=2, start="random", layers=(0, 1)), Gaze(FixedRegions(2, 2), top_k=1, choice="soft_bias", layers=(1, 2))),
    sequence_parallel=True,
)


def learned(model: Vlm, batch: Batch) -> Any:
    """Gradients, logits, losses and sums over choices, of a forward pass that asks for nothing by places of tokens."""

    def loss(model: Vlm) -> Any:
        out = model.forward(batch, Want(losses=True, choices=True))
        logits = jnp.where((batch.info.document > 0)[..., None], model.logits(out.hidden), 0.0)
        return jnp.sum(logits**2) / 1e3 + sum(out.losses.values()), (logits, out.losses, out.choices)

    return jax.grad(loss, has_aux=True)(model)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"fsdp": 1, "context": 4, "tensor": 2}, {"fsdp": 4, "context": 2}], ids=str)
def test_a_row_over_devices_gives_the_same_numbers(layout: dict[str, int]) -> None:
    mesh, model, batch = make_mesh(MeshConfig(**layout), jax.devices()[:8]), made(CONFIG, OPTIONS), rows()
    expected = jax.jit(lambda m, b: learned(m, b))(model, batch)
    with use_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        found = jax.jit(lambda m, b: learned(m, b))(placed, batch)
    same(found, expected)

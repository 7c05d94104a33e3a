"""All that a whole model gives of a batch, and that a mesh of eight devices or other options give the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.batch import Batch
from rave_jax.families.config import VlmConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.parameters import shardings
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.models.made import model as made

MESHES = pytest.mark.parametrize("layout", [{"fsdp": 2, "tensor": 2, "data": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
"""Layouts of eight devices, for `check_mesh_of_eight`."""


@jax.jit
def outcome(model: Vlm, batch: Batch) -> Any:
    """Gradients, and of the forward pass logits, losses, gates and what queries choose."""

    def loss(model: Vlm) -> Any:
        out = model.forward(batch, Want(losses=True, gates=True, choices=True))
        logits = jnp.where((batch.info.document > 0)[..., None], model.logits(out.hidden), 0.0)
        return jnp.sum(logits**2) / 1e3 + sum(out.losses.values()), (logits, out.losses, out.gates, out.choices)

    return jax.grad(loss, has_aux=True)(model)


def same(found: Any, expected: Any) -> None:
    """Equal but for the order of sums."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(np.abs(b).max(), 1e-6))


def check_mesh_of_eight(config: VlmConfig, options: ModelOptions, batch: Batch, layout: dict[str, int]) -> Any:
    """Devices that share parameters, heads and rows find what one finds; returns that. Four that share heads share the
    tokens of the residual stream too."""
    mesh, expected = make_mesh(MeshConfig(**layout), jax.devices()[:8]), outcome(made(config, options), batch)
    model = made(config, dataclasses.replace(options, sequence_parallel=layout["tensor"] == 4))
    with use_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        # Traced anew: the program above knows nothing of the mesh.
        found = jax.jit(lambda m, b: outcome.__wrapped__(m, b))(placed, batch)
    same(found, expected)
    return expected


def check_options(config: VlmConfig, options: ModelOptions, batch: Batch, change: dict[str, Any]) -> None:
    """Other options with the same parameters change nothing."""
    other = made(config, dataclasses.replace(options, **change))
    same(outcome(other, batch), outcome(made(config, options), batch))

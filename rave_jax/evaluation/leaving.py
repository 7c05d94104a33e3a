"""What the last tokens of prompts attend to in pictures, on a calibration set: for the bias for places."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rave_jax.attention.pruning import place_of
from rave_jax.attention.tokens import deciders
from rave_jax.batch import Batch
from rave_jax.config import require
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example
from rave_jax.evaluation.heads import blocks
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.sharding import shard, use_mesh
from rave_jax.typing import Array, Float, Int, NpArray


def attention_by_place(
    model: Vlm, processor: Processor, examples: Sequence[Example], mesh: Mesh, rows: int, layer: int
) -> tuple[Float[NpArray, "N"], Float[NpArray, "N"]]:
    """Places of the visual tokens of each sample's first prompt with a picture, and the attention of the prompt's last
    token to them, as a mean over heads.

    Args:
        model: on the mesh.
        processor: of the model.
        examples: with pictures.
        mesh: the devices.
        rows: samples measured at once.
        layer: whose attention is meant.

    Raises:
        ConfigError: there are no examples, or the model has no such layer.
    """
    layers = model.config.text.num_layers
    require(layer < layers, "layer", layer, f"a number from 0 to {layers - 1}")
    places, attention = [], []
    with use_mesh(mesh):
        for span, batch in blocks(processor, examples, mesh, rows):
            some = slice(None, len(examples[span]))
            place, found, mine = (np.asarray(x)[some] for x in _by_place(model, batch, np.int32(layer)))
            places.append(place[mine])
            attention.append(found[mine])
    return np.concatenate(places), np.concatenate(attention)


@jax.jit
def _by_place(model: Vlm, batch: Batch, layer: Int[Array, ""]) -> tuple[Array, Array, Array]:
    by = deciders(batch.info)
    T = by.shape[1]
    first = jnp.min(by, axis=1, keepdims=True)
    want = Want(queries=jnp.minimum(first, T - 1))
    out = model.decoder(model.embedded(batch), batch.info, batch.positions, want)
    assert out.attention is not None
    found = jnp.mean(jax.lax.dynamic_index_in_dim(out.attention, layer, keepdims=False)[:, 0], axis=1)
    mine = (by == first) & (by < T)
    return shard(place_of(batch.info), None, None), shard(found, None, None), shard(mine, None, None)

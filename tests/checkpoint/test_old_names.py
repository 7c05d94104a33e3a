"""Checkpoints of earlier versions, which called runs of equal layers segments, are read as today's."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from rave_jax.checkpoint import digests, native
from rave_jax.checkpoint.old_names import has_old_names, new_name, old_name, renamed
from rave_jax.checkpoint.store import Store, abstract
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters
from tests.models import made

NAMES = ("embed.weight", "decoder.layer_runs.0.layers.mlp.up.weight", "vision.layer_runs.1.layers.mlp.up.bias")


def test_a_name_goes_there_and_back() -> None:
    assert [new_name(old_name(name)) for name in NAMES] == list(NAMES)
    assert [old_name(name) for name in NAMES] == [
        "embed.weight",
        "decoder.segments.0.layers.mlp.up.weight",
        "vision.segments.1.layers.mlp.up.bias",
    ]
    assert new_name("decoder.layers.segments.0") == "decoder.layers.segments.0"


def test_a_step_of_a_run_is_restored_with_its_optimizer(tmp_path: Path) -> None:
    values = {name: jnp.arange(4.0) + n for n, name in enumerate(NAMES)}
    optimizer = optax.adam(0.1).init(values)
    parameters = {"step": jnp.int32(3), "values": values}
    with Store(tmp_path, 1) as store:
        store.save(3, renamed(parameters, old_name), renamed(optimizer, old_name), {"step": 3})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = [abstract(tree, jax.tree.map(lambda _: sharding, tree)) for tree in (parameters, optimizer)]
    with Store(tmp_path, 1) as store:
        found = store.restore_newest(*targets)
    assert found is not None and found.data == {"step": 3}
    jax.tree.map(np.testing.assert_array_equal, (found.parameters, found.optimizer), (parameters, optimizer))


@pytest.mark.parametrize("as_stored", [False, True])
def test_a_native_checkpoint_is_read(tmp_path: Path, as_stored: bool) -> None:
    model = made.model(tiny())
    values = {old_name(path): param[...] for path, param in named_parameters(model).items()}
    assert has_old_names(values)
    native.write_into(tmp_path, model, other_key_style=False)
    folder = tmp_path / native.PARAMETERS
    ocp.save(str(folder), values, overwrite=True)
    digests.write(folder)
    found = native.restore(tmp_path, tiny(), ModelOptions(), None, jax.random.key(0), as_stored=as_stored)
    jax.tree.map(np.testing.assert_array_equal, found, model)

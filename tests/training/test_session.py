"""Which parameters a run trains."""

from __future__ import annotations

import jax
import pytest

from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.config import ConfigError
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import is_unused, named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup
from rave_jax.training.session import group_rows, make_session


def test_parameters_that_nothing_is_computed_with_are_frozen() -> None:
    """Weight decay would change them although they have no gradient."""
    config = tiny_config(Tiny(family="llava"))
    model = jax.eval_shape(lambda: Vlm(config, ModelOptions(), key=jax.random.key(0)))
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    optimizer = OptimizerConfig(weight_decay=0.1, groups=(ParameterGroup("tower", "^vision"),))
    session = make_session(model, optimizer, mesh, steps=10, rows=1, loss_chunk=8)
    unused = {name for name, param in named_parameters(model).items() if is_unused(param)}
    assert unused and set(session.state.frozen) == unused
    assert {row.group: row.state for row in group_rows(session, optimizer)} == {
        "tower": "trained",
        "rest": "trained",
        "unused": "frozen",
    }
    everything = OptimizerConfig(groups=(ParameterGroup("all", "", frozen=True),))
    with pytest.raises(ConfigError, match="expected groups that leave something to train"):
        make_session(model, everything, mesh, steps=10, rows=1, loss_chunk=8)

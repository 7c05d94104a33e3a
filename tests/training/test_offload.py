"""What is kept in the hosts' memory: where it lies, and that no number changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.training.averages import Ema
from rave_jax.training.config import TrainConfig, differences
from rave_jax.training.optimizers import OptimizerConfig
from rave_jax.training.state import HOST
from tests.training.small import TEXT, first_state, run_steps, session_of

CONFIG = OptimizerConfig(learning_rate=1e-3, ema=Ema(), offload=True)


def kinds(tree: Any) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def test_optimizer_state_and_average_rest_on_the_host() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    state = session_of(CONFIG, mesh, config=TEXT).state
    assert kinds((state.optimizer, state.ema)) == {HOST} and kinds((state.trained, state.frozen)) == {"device"}
    inside = session_of(dataclasses.replace(CONFIG, offload=False), mesh, config=TEXT).state
    assert kinds(inside) == {"device"}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=1, fsdp=4, tensor=2)], ids=["one device", "mesh"])
def test_no_number_changes(mesh: MeshConfig | None) -> None:
    ends = []
    for offload in (True, False):
        place = None if mesh is None else make_mesh(mesh)
        session = session_of(dataclasses.replace(CONFIG, offload=offload), place, config=TEXT)
        state, _ = run_steps(session, first_state(session, TEXT), range(2), patches=0)
        assert kinds(state.optimizer) == ({HOST} if offload else {"device"})
        ends.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_run_may_be_continued_with_and_without() -> None:
    runs = [TrainConfig(optimizer=dataclasses.replace(CONFIG, offload=offload)) for offload in (True, False)]
    assert differences(*runs) == []

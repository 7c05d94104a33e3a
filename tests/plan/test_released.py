"""What chips send each other in the steps of released configs, and the memory these take, against what is kept."""

from __future__ import annotations

import json

import pytest

from rave_jax.config import load_file
from rave_jax.plan.chips import parse_topology
from rave_jax.plan.compile import Wanted, compile_step
from rave_jax.plan.models import model_of
from rave_jax.plan.record import differences, record_of
from rave_jax.plan.report import Plan
from tests.conftest import REPO

KEPT = json.loads((REPO / "benchmarks" / "plans.json").read_text())
"""What `python benchmarks/plans.py --keep` wrote: by config, topology and number of slices."""


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", KEPT)
def test_memory_and_collectives_are_those_that_are_kept(name: str) -> None:
    config_name, topology_name, slices = name.split()
    config, topology = load_file(REPO / "configs" / f"{config_name}.py"), parse_topology(topology_name, int(slices))
    vlm, source = model_of(config.init)
    plan = Plan(config_name, source, topology, compile_step(Wanted(config, vlm, topology)))
    assert differences(KEPT[name], record_of(plan)) == [], "python benchmarks/plans.py --keep writes what is expected"
    assert plan.share <= 0.85

"""Changes that are tried for a config that does not fit; what is compiled of them is in test_compile.py."""

from __future__ import annotations

import dataclasses

from rave_jax.command_line import override
from rave_jax.data.config import DataConfig
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.plan.changes import Room, candidate_changes
from rave_jax.plan.result import Hbm
from rave_jax.training.algorithms import Adafactor
from rave_jax.training.config import TrainConfig

CONFIG = TrainConfig(data=DataConfig(rows=64), mesh=MeshConfig(data=2, fsdp=-1, tensor=2))


def test_each_change_is_what_its_flags_say() -> None:
    found = list(candidate_changes(CONFIG, 16))
    assert len(found) >= 5
    for flags, why, changed in found:
        assert override(CONFIG, flags.split()) == changed
        assert changed != CONFIG and why


def test_what_costs_least_comes_first_and_all_kinds_are_tried() -> None:
    flags = [flags for flags, _, _ in candidate_changes(CONFIG, 16)]
    assert flags[0] == "--model.remat full"
    for part in (
        "accumulation 2",
        "data.rows 32",
        "mesh.data 1",
        "mesh.tensor 4",
        "first-moment bfloat16",
        "second-moment 8-bit",
        "optimizer.offload",
    ):
        assert any(part in one for one in flags), part
    first = [
        next(n for n, one in enumerate(flags) if part in one) for part in ("remat", "accum", "mesh", "mom", "offl")
    ]
    assert first == sorted(first)
    assert all(one.count("--") >= 4 for one in flags[-2:]), "the last are several together"


def test_activations_wait_at_the_host_where_rematerialisation_is_not_enough() -> None:
    full = dataclasses.replace(CONFIG, model=ModelOptions(remat="full"))
    flags = [flags for flags, _, _ in candidate_changes(full, 16)]
    assert "--model.remat offload" in flags and not any("remat full" in one for one in flags)
    assert "--model.remat offload --optimizer.offload True" in flags[-1]


def test_nothing_is_tried_that_is_so_already_or_that_rows_do_not_divide() -> None:
    config = dataclasses.replace(
        CONFIG,
        model=ModelOptions(remat="full"),
        data=DataConfig(rows=8),
        optimizer=dataclasses.replace(CONFIG.optimizer, algorithm=Adafactor()),
        mesh=MeshConfig(fsdp=8, tensor=2),
    )
    flags = [flags for flags, _, _ in candidate_changes(config, 16)]
    assert flags == [
        "--mesh.data 1 --mesh.fsdp -1 --mesh.tensor 4",
        "--model.remat offload",
        "--optimizer.offload True",
    ]


def test_slices_keep_a_copy_each_before_anything_else_is_tried() -> None:
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=-1, tensor=2))
    flags, _, changed = next(candidate_changes(config, 16, slices=2))
    assert flags == "--mesh.data 2 --mesh.fsdp -1" and override(config, flags.split()) == changed


def test_rows_are_divided_until_it_may_be_enough() -> None:
    """State of 6 bytes and 48 that grow with the rows, where there are 20: four parts may be enough, two cannot be."""
    room = Room(Hbm(parameters=2, optimizer=4, batch=0, temporaries=48, code=0, peak=54), usable=20)
    config = dataclasses.replace(CONFIG, data=DataConfig(rows=256))
    flags = [flags for flags, _, _ in candidate_changes(config, 16, room=room)]
    assert [one for one in flags if one.startswith("--optimizer.accumulation")][:2] == [
        "--optimizer.accumulation 4",
        "--optimizer.accumulation 8",
    ]
    assert [one for one in flags if one.startswith("--data.rows")] == ["--data.rows 64", "--data.rows 32"]

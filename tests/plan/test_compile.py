"""Whole plans, by the TPU's own compiler: a config that fits, and one that does not with the changes that make it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rave_jax.plan import changes
from rave_jax.tools.cli import main

pytestmark = pytest.mark.tpu_compiler

CONFIG = """
from rave_jax.attention import Rave
from rave_jax.checkpoint.tiny import Tiny
from rave_jax.data.config import DataConfig
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.config import TrainConfig


def get_config():
    return TrainConfig(
        init=Tiny(family="qwen3", num_layers=2),
        model=ModelOptions(mechanisms=(Rave(rank=8),)),
        data=DataConfig(rows={rows}, tokens=2048, patches=0),
        mesh=MeshConfig(fsdp=2, tensor=2),
    )
"""


def planned(tmp_path: Path, rows: int, *flags: str) -> tuple[int, dict]:
    config, told = tmp_path / "small.py", tmp_path / "plan.json"
    config.write_text(CONFIG.format(rows=rows))
    code = main(("plan", str(config), "--topology", "v5e:2x2", "--json", str(told), *flags))
    return code, json.loads(told.read_text())


def test_a_small_config_is_planned(tmp_path, capsys) -> None:
    code, told = planned(tmp_path, 4)
    text = capsys.readouterr().out
    assert code == 0 and told["fits"] and "changes_that_fit" not in told
    assert "bounds, not measurements" in text
    hbm = told["hbm_bytes_per_chip"]
    assert hbm["optimizer"] == pytest.approx(2 * hbm["parameters"], rel=0.01), "AdamW has two moments of each"
    assert hbm["parameters"] + hbm["optimizer"] + hbm["batch"] + hbm["temporaries"] + hbm["code"] == hbm["peak"]
    assert {axis for row in told["collectives"] for axis in row["axes"]} == {"fsdp", "tensor"}
    assert any("pallas_tpu" in line for line in told["attention"])
    bounds = told["bounds_seconds"]
    assert 0 < bounds["mfu_exposed"] <= bounds["mfu"] < 1 and bounds["hbm"] > 0 and told["loops_counted_once"] == []


def test_state_that_waits_at_the_host_is_no_part_of_the_chips_memory(tmp_path, capsys) -> None:
    code, told = planned(tmp_path, 4, "--optimizer.offload", "True")
    hbm = told["hbm_bytes_per_chip"]
    assert code == 0 and hbm["optimizer"] < 1000, "counters alone"
    state = 2 * hbm["parameters"]
    assert state <= hbm["host"] <= 2 * state, "padded to tiles"
    moved = told["bytes_to_host_and_back_per_chip"]
    assert 2 * state <= moved <= 2 * hbm["host"], "there and back"
    assert told["bounds_seconds"]["host"] > 0 and "memory of the host" in capsys.readouterr().out


def test_making_code_changes_nothing_that_a_plan_says(tmp_path) -> None:
    """The program's own size apart, which --full adds."""
    plain = "--model.attention", "xla"  # the code of the fused kernels takes a minute
    (_, found), (_, full) = planned(tmp_path, 4, *plain), planned(tmp_path, 4, *plain, "--full")
    code = full["hbm_bytes_per_chip"].pop("code")
    assert code > 0 and found["hbm_bytes_per_chip"].pop("code") == 0
    for plan in (found, full):
        del plan["seconds_to_compile"], plan["hbm_bytes_per_chip"]["share"]
    full["hbm_bytes_per_chip"]["peak"] -= code
    assert found == full


def test_what_does_not_fit_comes_with_changes_that_do(tmp_path, monkeypatch, capsys) -> None:
    """Only two of the changes are compiled here: rematerialisation, which is not enough, and micro-batches."""
    every = changes.candidate_changes
    some = ("--model.remat full", "--optimizer.accumulation 4")
    monkeypatch.setattr(changes, "candidate_changes", lambda *given: (c for c in every(*given) if c[0] in some))
    code, told = planned(tmp_path, 2048)
    assert code == 1 and not told["fits"]
    assert (
        told["hbm_bytes_per_chip"]["peak"] > told["hbm_bytes_per_chip"]["capacity"] and told["bounds_seconds"] is None
    )
    assert told["changes_that_fit"]
    text = capsys.readouterr().out
    for change in told["changes_that_fit"]:
        assert change["flags"] in some
        assert change["hbm_peak_bytes_per_chip"] <= told["hbm_bytes_per_chip"]["capacity"]
        assert change["flags"] in text


def test_a_shape_that_libtpu_does_not_know_is_one_line(tmp_path, capsys) -> None:
    config = tmp_path / "small.py"
    config.write_text(CONFIG.format(rows=4).replace("fsdp=2, tensor=2", "fsdp=-1"))
    assert main(("plan", str(config), "--topology", "v5e:3x3")) == 2
    assert "--topology is 'v5e:3x3', which libtpu refuses" in capsys.readouterr().err

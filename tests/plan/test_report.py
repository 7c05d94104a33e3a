"""Bounds and reports are pure functions of what was compiled."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rave_jax.plan.bounds import bounds
from rave_jax.plan.chips import parse_topology
from rave_jax.plan.collectives import Traffic
from rave_jax.plan.flops import StepFlops
from rave_jax.plan.report import BOUND, Plan, as_json, as_text
from rave_jax.plan.result import Hbm, Moved, Placed, Step

TOPOLOGY = parse_topology("v5e:4x4")
CHIP = TOPOLOGY.chip
GATHER = Moved(Traffic("all-gather", ("fsdp",), 16, True, 2, 8, 0.2 * CHIP.link_bandwidth), links=4, slices=1)
SUM = Moved(Traffic("all-reduce", ("tensor",), 4, False, 1, 4, 0.4 * CHIP.link_bandwidth), links=2, slices=1)
STEP = Step(
    fits=True,
    hbm=Hbm(2**30, 2**31, 2**20, 2**32, 2**20, 8 * 2**30),
    seconds=12.34,
    mesh="mesh: data 1 x fsdp 4 x tensor 4 over 16 devices",
    placed=(Placed("rest", "fsdp, tensor", "trained", 3, 10**9, 2**30, "decoder.mlp.up.weight"),),
    flops=StepFlops(model=0.6 * 16 * CHIP.flops, mechanisms=0.012 * 16 * CHIP.flops, again=0.2 * 16 * CHIP.flops),
    devices=16,
    backends=("attention, 4096 x 4096 tokens: pallas_tpu (tuned blocks)",),
    moved=(GATHER, SUM),
    hbm_traffic=0.3 * CHIP.hbm_bandwidth,
)
PLAN = Plan("seven", "the released one", TOPOLOGY, STEP)


def test_bounds_are_seconds_at_the_peaks_of_the_chip() -> None:
    found = bounds(STEP, TOPOLOGY)
    assert found.parts == pytest.approx({"compute": 0.8, "HBM": 0.3, "ICI": 0.05 + 0.2, "DCN": 0, "host": 0})
    assert (found.largest, found.overlapped, found.mfu) == ("compute", pytest.approx(0.8), pytest.approx(0.75))
    assert (found.exposed, found.mfu_exposed) == (pytest.approx(1.0), pytest.approx(0.6))


def test_the_largest_bound_is_named() -> None:
    slow = dataclasses.replace(STEP, hbm_traffic=2 * CHIP.hbm_bandwidth)
    assert (bounds(slow, TOPOLOGY).largest, bounds(slow, TOPOLOGY).overlapped) == ("HBM", pytest.approx(2))


def test_between_slices_goes_what_each_slice_has_left_to_say() -> None:
    """16 chips in two slices: a chip sends its eighth of the array once for an all-reduce's half, and once back."""
    size = 8.0 * 2**20
    both = Moved(Traffic("all-reduce", ("fsdp",), 16, False, 1, 1, 2 * size * 15 / 16), links=4, slices=2)
    assert both.between_slices == pytest.approx(2 * size / 8 / 2)
    assert dataclasses.replace(both, slices=1).between_slices == 0
    two = parse_topology("v5e:4x2", 2)
    found = bounds(dataclasses.replace(STEP, moved=(both,)), two)
    assert found.dcn == pytest.approx(size / 8 / CHIP.dcn_bandwidth)
    assert found.ici == pytest.approx((both.traffic.sent - size / 8) / (4 * CHIP.link_bandwidth))


def test_text_and_json_say_the_same_and_call_it_bounds() -> None:
    text, told = as_text(PLAN), json.loads(json.dumps(as_json(PLAN)))
    assert BOUND in text.splitlines()[0] and told["what"] == BOUND
    assert "HBM of one chip: 8.00 GiB at the fullest of 16.00 GiB, 50%: fits" in text
    assert told["hbm_bytes_per_chip"]["share"] == 0.5 and told["fits"]
    assert "of which mechanisms 2.0%" in text
    assert "compute          0.8 s   the largest" in text and told["bounds_seconds"]["largest"] == "compute"
    assert "MFU at most 75.0%" in text and told["bounds_seconds"]["mfu"] == pytest.approx(0.75)
    assert [row["asynchronous"] for row in told["collectives"]] == [True, False]
    assert "pallas_tpu (tuned blocks)" in text and told["attention"] == list(STEP.backends)
    assert told["parameters"][0]["axes"] == "fsdp, tensor"


def test_what_waits_at_the_host_is_told_and_its_way_is_a_bound() -> None:
    """There and back at once: half of the bytes each way."""
    waiting = dataclasses.replace(
        STEP, hbm=dataclasses.replace(STEP.hbm, host=3 * 2**30), host_traffic=6 * CHIP.host_bandwidth
    )
    found = bounds(waiting, TOPOLOGY)
    assert (found.largest, found.overlapped) == ("host", pytest.approx(3))
    text, told = as_text(dataclasses.replace(PLAN, step=waiting)), as_json(dataclasses.replace(PLAN, step=waiting))
    assert "memory of the host, for each chip: 3.00 GiB" in text and "host" not in as_text(PLAN)
    assert told["hbm_bytes_per_chip"]["host"] == 3 * 2**30
    assert told["bytes_to_host_and_back_per_chip"] == 6 * CHIP.host_bandwidth


def test_what_mechanisms_add_is_against_the_step_without_them() -> None:
    less = dataclasses.replace(STEP, flops=dataclasses.replace(STEP.flops, again=0.18 * 16 * CHIP.flops))
    both = dataclasses.replace(PLAN, plain=less)
    added = as_json(both)["mechanisms_add_to_bounds"]
    assert added == pytest.approx({"overlapped": 0.8 / 0.78 - 1, "synchronous_exposed": 1.0 / 0.98 - 1})
    assert "mechanisms add 2.6% to the time" in as_text(both) and as_json(PLAN)["mechanisms_add_to_bounds"] is None


def test_a_step_that_does_not_fit_has_no_bounds() -> None:
    large = dataclasses.replace(
        STEP, fits=False, moved=(), hbm_traffic=0.0, hbm=dataclasses.replace(STEP.hbm, peak=20 * 2**30)
    )
    text, told = as_text(dataclasses.replace(PLAN, step=large)), as_json(dataclasses.replace(PLAN, step=large))
    assert "20.00 GiB at the fullest of 16.00 GiB, 125%: DOES NOT FIT" in text
    assert "least time" not in text and told["bounds_seconds"] is None

"""Steps of fewer layers, and the step of all that follows of them."""

from __future__ import annotations

import dataclasses

import pytest

from rave_jax.attention import Rave
from rave_jax.families.config import DeltaConfig, VlmConfig
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.models.config import ModelOptions
from rave_jax.plan.collectives import Kind, Traffic
from rave_jax.plan.depth import depths, extrapolated, shortened
from rave_jax.plan.flops import StepFlops
from rave_jax.plan.result import Hbm, Moved, Step

SEVEN = qwen2_5_vl_7b()


def test_layers_that_are_one_loop_are_all_compiled() -> None:
    assert depths(SEVEN, ModelOptions(mechanisms=(Rave(),))) is None


def test_layers_that_are_compiled_one_by_one_are_not() -> None:
    options = ModelOptions(mechanisms=(Rave(),), scan_layers=False)
    assert depths(SEVEN, options) == (4, 8)
    assert shortened(SEVEN, 8).text.num_layers == 8
    some = dataclasses.replace(options, mechanisms=(Rave(layers=(0, 5)),))
    assert depths(SEVEN, some) is None, "they are not alike"


def turns(layers: int) -> VlmConfig:
    """Every third layer attends."""
    deltas = tuple(n for n in range(layers) if n % 3 != 2)
    text = dataclasses.replace(SEVEN.text, num_layers=layers, delta=DeltaConfig(layers=deltas))
    return dataclasses.replace(SEVEN, text=text)


def test_layers_of_two_kinds_that_take_turns_are_compiled_by_whole_turns() -> None:
    assert depths(turns(24), ModelOptions(mechanisms=(Rave(),))) == (6, 9)
    assert shortened(turns(24), 6).text.layer_kinds == turns(24).text.layer_kinds[:6]
    assert depths(turns(25), ModelOptions()) is None, "the last turn is not whole"
    assert depths(turns(9), ModelOptions()) is None, "there are few"


def step(layers: int, *kinds: Kind) -> Step:
    sent = tuple(
        Moved(Traffic(kind, ("fsdp",), 4, False, 2 * layers, 3 * layers, 5.0 * layers), links=2, slices=1)
        for kind in kinds
    )
    hbm = Hbm(1000, 2000, 10, temporaries=100 + 7 * layers, code=50 + layers, peak=0, host=layers)
    return Step(
        fits=True,
        hbm=hbm,
        seconds=1.0,
        mesh="",
        placed=(),
        flops=StepFlops(1.0, 0.0, 0.0),
        devices=4,
        backends=(),
        moved=sent,
        hbm_traffic=11.0 * layers,
        host_traffic=2.0 * layers,
    )


def test_what_grows_by_the_layer_is_on_a_line() -> None:
    found = extrapolated(step(4, "all-gather"), step(8, "all-gather"), (4, 8), 28, 10_000)
    assert found.hbm == dataclasses.replace(step(28).hbm, peak=1000 + 2000 + 10 + 100 + 7 * 28 + 50 + 28)
    assert found.moved == step(28, "all-gather").moved
    assert (found.hbm_traffic, found.host_traffic, found.seconds) == (11.0 * 28, 2.0 * 28, 2.0)
    assert found.fits and found.depths == (4, 8, 28)
    assert not extrapolated(step(4), step(8), (4, 8), 28, 3000).fits, "all layers together are too large"


def test_a_collective_of_one_of_the_two_alone_is_counted_too() -> None:
    found = extrapolated(step(4, "all-gather"), step(8, "all-gather", "all-reduce"), (4, 8), 28, 10_000)
    summed = next(one for one in found.moved if one.traffic.kind == "all-reduce")
    assert summed.traffic.sent == pytest.approx(40 + 5 * 40)


def test_a_step_that_is_refused_is_not_followed_by_traffic() -> None:
    large = dataclasses.replace(step(8), fits=False, hbm_traffic=0.0)
    found = extrapolated(step(4, "all-gather"), large, (4, 8), 28, 10_000)
    assert not found.fits and found.moved == () and found.hbm_traffic == 0
